"""`foveate list --model`: what works on a model, and why not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from foveate.cli.console import progress
from foveate.cli.listing import plain_table
from foveate.core import Method, get_method
from foveate.core.catalog import catalog
from foveate.core.from_text import signature
from foveate.engine.planning import plain_plan
from foveate.errors import FoveateError, UnsupportedModelError
from foveate.families import Family, find_family
from foveate.loading import load_skeleton


@dataclass(frozen=True)
class Verdicts:
    """What works on a model with default settings.

    Args:
        model: its name.
        description: its sizes, in words.
        works: stage -> methods that work.
        refused: reason -> methods that do not.
    """

    model: str
    description: str
    works: dict[str, list[str]]
    refused: dict[str, list[str]]

    def show(self, console: Console) -> None:
        """Print what works, and under it the refusals, those of one reason together."""
        works = sum(map(len, self.works.values()))
        refused = sum(map(len, self.refused.values()))
        console.print(f"[bold]{escape(self.model)}[/] is {escape(self.description)}")
        console.print(f"{works} of {works + refused} methods work on it\n")
        table = plain_table("stage", "methods that work")
        for stage, names in self.works.items():
            table.add_row(stage, escape(", ".join(names)))
        console.print(table)
        if self.refused:
            console.print("\n[bold cyan]methods that do not, and why[/]")
        for why, names in self.refused.items():
            each = "each " if len(names) > 1 else ""
            console.print(f"[yellow]{escape(', '.join(names))}[/]: {each}{escape(why)}")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        refused = {name: why for why, names in self.refused.items() for name in names}
        return {
            "model": self.model,
            "description": self.description,
            "works": self.works,
            "refused": refused,
        }


def judge_model(name: str) -> Verdicts:
    """What works on a model; weights are not looked at.

    Args:
        name: hub id, local folder, `tiny` or `small`.

    Raises:
        FoveateError: there is no such model, or it is not supported.
    """
    works: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    with progress() as steps:
        steps.say(f"reading the config of {name}")
        family = find_family(load_skeleton(name))
        entries = catalog()
        steps.say("trying methods", len(entries))
        for entry in entries:
            why = why_not(family, get_method(entry.slug))
            group, title = (refused, why) if why else (works, entry.stage)
            group.setdefault(title, []).append(entry.slug)
            steps.tick()
    return Verdicts(name, describe_family(family), works, refused)


def why_not(family: Family, cls: type[Method]) -> str:
    """Why a method with its default settings does not work on a model, without the names of both;
    nothing if it works.
    """
    try:
        plain_plan(family, [cls()])
    except FoveateError as error:
        kind = re.escape(family.model_type)
        why = re.sub(rf"^'?{re.escape(cls.slug)}'? ", "", str(error))
        return re.sub(rf"this '?{kind}'?(?!\w)|'{kind}'", "this model", why)
    except TypeError:
        return f"needs settings: {signature(cls)}"
    return ""


def describe_family(family: Family) -> str:
    """One line about the sizes of a model."""
    try:
        encoder = f"{family.vision_layers} encoder layers"
    except UnsupportedModelError:
        encoder = "an encoder that foveate cannot look into"
    return f"{family.model_type}: {encoder}, {family.text_layers} decoder layers"
