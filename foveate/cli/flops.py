"""`foveate flops`: what a method saves on a model, from its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.core import Method
from foveate.engine.planning import make_plan
from foveate.errors import InputError
from foveate.families import Family, find_family
from foveate.io.writing import write_json
from foveate.loading import load_image_processor, load_skeleton
from foveate.measure.account import Account, account, unpruned, visual_tokens
from foveate.measure.checkpoints import checkpoints
from foveate.measure.conventions import Convention
from foveate.measure.flops import kv_bytes, state_bytes
from foveate.measure.planned import fed, planned
from foveate.measure.units import human_bytes, human_flops
from foveate.record.record import Record
from foveate.report.report import idle_notes
from foveate.report.tables import layer_ranges

HALF = torch.float16  # what the cache holds


@dataclass(frozen=True)
class Question:
    """What is to be counted.

    Args:
        model: hub id, local folder, `tiny` or `small`; facts of well-known checkpoints are bundled.
        methods: what removes tokens, in stream order.
        convention: what counts.
        images: images in the prompt.
        size: width and height of each.
        text_tokens: of the prompt.
        decode: whether to show one decoding step too.
        keep_total: most visual tokens of the prompt; `None` for any number.
    """

    model: str
    methods: tuple[Method, ...]
    convention: Convention
    images: int = 1
    size: tuple[int, int] = (672, 672)
    text_tokens: int = 64
    decode: bool = False
    keep_total: int | None = None


@dataclass(frozen=True)
class Answer:
    """FLOPs, cache bytes and tokens with all tokens and with a method; the bytes of running states
    are the same in both.
    """

    question: Question
    record: Record
    before: Account
    after: Account
    kv_bytes: tuple[int, int]
    state_bytes: int
    notes: tuple[str, ...]
    step: str = "one decoding step"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; FLOPs and bytes are whole numbers."""
        question, record = self.question, self.record
        described = [method.to_dict() for method in question.methods]
        return {
            "model": question.model,
            "method": described[0] if len(described) == 1 else described,
            "convention": question.convention.name,
            "keep_total": question.keep_total,
            "images": question.images,
            "size": list(question.size),
            "prompt_tokens": record.prompt_tokens[0],
            "image_tokens": [image.total for image in record.images],
            "visual_tokens": [row[0] for row in visual_tokens(record)],
            "flops": {"before": _plain(self.before), "after": _plain(self.after)},
            "kv_bytes": {"before": self.kv_bytes[0], "after": self.kv_bytes[1]},
            "state_bytes": self.state_bytes,
            "notes": list(self.notes),
        }

    def show(self, console: Console) -> None:
        """Print the tables."""
        question, convention = self.question, self.question.convention
        names = " + ".join(method.slug for method in question.methods)
        console.print(f"[bold]{escape(question.model)}[/] with [bold]{names}[/]")
        console.print(f"[dim]{convention.name}: {escape(convention.what)}[/]", soft_wrap=True)
        console.print(self._layers())
        console.print(self._costs())
        for note in self.notes:
            console.print(f"[yellow]note: {escape(note)}[/]", soft_wrap=True)

    def _layers(self) -> Table:
        table = _table("decoder layers")
        table.add_column("visual tokens", justify="right")
        table.add_column("of all", justify="right")
        table.add_column("each layer", justify="right")
        total = sum(image.total for image in self.record.images)
        seen = [row[0] for row in visual_tokens(self.record)]
        ranges = layer_ranges(seen)
        for (name, first), end in zip(
            ranges, [*(i for _, i in ranges[1:]), len(seen)], strict=True
        ):
            visual, share = str(seen[first]), f"{seen[first] / total:.1%}"
            if self.record.last_tokens_from is not None and first >= self.record.last_tokens_from:
                visual, share = "last token", ""
            each = self.after.layers[first:end]
            costs = dict.fromkeys(human_flops(cost) for cost in (min(each), max(each)))
            table.add_row(name, visual, share, " to ".join(costs))
        return table

    def _costs(self) -> Table:
        table = _table("")
        for heading in ("all tokens", "now", "now / all"):
            table.add_column(heading, justify="right")
        before, after = self.before, self.after
        rows = [
            ("vision tower", before.tower, after.tower),
            ("projector", before.projector, after.projector),
            ("selection", 0, after.selection),
            ("language model, prompt", before.prefill, after.prefill),
            ("total", before.total, after.total),
        ]
        if self.question.decode:
            rows.append((self.step, before.decode, after.decode))
        for name, old, new in rows:
            if old is not None and new is not None:
                share = f"{new / old:.1%}" if old else ""
                table.add_row(name, human_flops(old), human_flops(new), share)
        old, new = self.kv_bytes
        table.add_row("KV cache, 16 bit", human_bytes(old), human_bytes(new), f"{new / old:.1%}")
        if self.state_bytes:
            held = human_bytes(self.state_bytes)
            table.add_row("state of recurrent layers", held, held, "100.0%")
        return table


def count(question: Question) -> Answer:
    """Count, from a config alone.

    Raises:
        FoveateError: the model is not known or not supported, or the method does not work on it.
    """
    family = find_family(load_skeleton(question.model))
    processor = load_image_processor(question.model)
    plan = make_plan(family, question.methods, question.keep_total)
    given = fed(family, processor, question.images, question.size)
    record = planned(family, plan, given, question.text_tokens)
    full, idle = unpruned(record), idle_notes(record, family, question.methods)
    before = account(full, family, (), question.convention)
    after = account(record, family, question.methods, question.convention)
    stored = [kv_bytes(family, made.cache_slots, 1, HALF) for made in (full, record)]
    notes = tuple(_notes(question, family, idle, record.last_tokens_from))
    state = state_bytes(family, 1, HALF)
    step = "one decoding step" if family.expert is None else "one step of the expert"
    return Answer(question, record, before, after, (stored[0], stored[1]), state, notes, step)


def parse_size(text: str) -> tuple[int, int]:
    """Read `WIDTHxHEIGHT`.

    Raises:
        InputError: it is something else.
    """
    width, x, height = text.lower().partition("x")
    if not (x and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise InputError(f"--image-size takes WIDTHxHEIGHT such as 672x336, got {text!r}")
    return int(width), int(height)


def save(answer: Answer, path: Path) -> None:
    """Write everything as JSON."""
    write_json(path, answer.to_dict())


def _notes(
    question: Question, family: Family, idle: Sequence[str], shared: int | None
) -> list[str]:
    notes = list(idle)
    if (known := checkpoints().get(question.model)) is not None:
        remark = f"; {known.remark}" if known.remark else ""
        notes.append(f"counted from bundled config facts; nothing was downloaded{remark}")
    if shared is not None:
        notes.append(
            f"layers from {shared} on read the keys of earlier layers, and compute only the last "
            "token of a prompt, even with all tokens; there, removing tokens only saves reading "
            "their keys"
        )
    for method in question.methods:
        keep = method.keep
        assumed = "all tokens, as it has no keep" if keep is None else f"keep={keep}"
        if method.adaptive and not any(note.startswith(f"{method.slug} ") for note in idle):
            notes.append(
                f"how many tokens {method.slug} keeps depends on the image; the count assumes "
                f"{assumed}. The report of a run shows the actual number"
            )
        if note := method.note_on(family):
            notes.append(f"{method.slug}: {note}")
    return notes


def _plain(counted: Account) -> dict[str, Any]:
    return {
        "total": counted.total,
        "tower": counted.tower,
        "projector": counted.projector,
        "selection": counted.selection,
        "prefill": counted.prefill,
        "entry": counted.entry,
        "head": counted.head,
        "layers": list(counted.layers),
        "decode": counted.decode,
    }


def _table(heading: str) -> Table:
    return Table(heading, box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
