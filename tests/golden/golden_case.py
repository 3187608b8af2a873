"""A recorded case, and which adapter reads it."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ADAPTERS = {
    "biformer": "golden_biformer",
    "cdpruner": "golden_cdpruner",
    "dart": "golden_dart",
    "divprune": "golden_divprune",
    "dtop": "golden_dtop",
    "dycoke": "golden_video",
    "evs": "golden_video",
    "fastervlm": "golden_encoder",
    "fastv": "golden_llm",
    "fastvggt": "golden_fastvggt",
    "fastvid": "golden_video",
    "feather": "golden_drops",
    "flashvid": "golden_video",
    "flowcut": "golden_flowcut",
    "fopru": "golden_patches",
    "gtp-vit": "golden_gtpvit",
    "hiprune": "golden_patches",
    "holitom": "golden_video",
    "holitom-inner": "golden_drops",
    "holov": "golden_recorded",
    "hot": "golden_hot",
    "idpruner": "golden_recorded",
    "llava-prumerge": "golden_patches",
    "lrs-vqa": "golden_lrsvqa",
    "m3": "golden_m3",
    "prunesid": "golden_recorded",
    "prunevid": "golden_video",
    "pyramiddrop": "golden_llm",
    "recoverable-compression": "golden_recoverable",
    "scope": "golden_recorded",
    "sparsevlm": "golden_drops",
    "stvit": "golden_stvit",
    "tome": "golden_vision",
    "transprune": "golden_drops",
    "vflowopt": "golden_vflowopt",
    "vidcom2": "golden_video",
    "visionzip": "golden_patches",
    "vispruner": "golden_recorded",
    "vtc-cls": "golden_encoder",
    "yopo": "golden_yopo",
    "zero-tprune": "golden_zerotprune",
}
# Where a folder holds more than the cases of one method: folder and names of those of each.
SOURCES = {
    "gtp-vit": ("gtp-vit", "case*"),
    "holitom": ("holitom", "outer_*"),
    "holitom-inner": ("holitom", "inner_*"),
    "hot": ("hot", "case*"),
}
Check = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One file of recorded arrays.

    Args:
        slug: the method.
        path: the file.
        root: folder of all methods' cases, where models that cases share are found.
    """

    slug: str
    path: Path
    root: Path

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the arrays, read without loading them."""
        with safe_open(self.path, "pt") as file:
            return frozenset(file.keys())

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        """The arrays by name."""
        return load_file(self.path)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What was recorded beside the arrays: the file's metadata, and the json of its name."""
        with safe_open(self.path, "pt") as file:
            stored = file.metadata() or {}
        facts = {name: _decoded(text) for name, text in stored.items()}
        beside = self.path.with_suffix(".json")
        return facts | (json.loads(beside.read_text()) if beside.exists() else {})

    def runs(self) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Each run's hyper-parameters and its arrays, without the `run{j}.` prefix."""
        return [
            (
                run,
                {
                    name.removeprefix(f"run{j}."): array
                    for name, array in self.arrays.items()
                    if name.startswith(f"run{j}.")
                },
            )
            for j, run in enumerate(self.facts["runs"])
        ]


def cases_of(slug: str, root: Path) -> list[Case]:
    """All cases of a method under a folder."""
    folder, names = SOURCES.get(slug, (slug, "*"))
    return [Case(slug, path, root) for path in sorted((root / folder).glob(f"{names}.safetensors"))]


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def checks_of(case: Case) -> dict[str, Check]:
    """What can be checked in a case, by name."""
    if case.slug not in ADAPTERS:
        return {"no-adapter": partial(pytest.fail, f"no adapter reads the cases of {case.slug}")}
    return importlib.import_module(ADAPTERS[case.slug]).checks(case)


def assert_close(got: Tensor, expected: Tensor, atol: float, what: str) -> None:
    """Compare in absolute terms, and say what differs."""
    torch.testing.assert_close(
        got, expected, rtol=0, atol=atol, msg=lambda message: f"{what}: {message}"
    )


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Compare indices exactly."""
    assert got.tolist() == expected.tolist(), what


class Watch:
    """Calls `look(module, (hidden,), kwargs)` with what a decoder layer works on, once cut.

    The layer's own hooks see what the model hands it; its norm and its attention see what is left.
    """

    def __init__(self, layer: torch.nn.Module, look: Callable[..., object]) -> None:
        self.look, self.hidden = look, None
        self.handles = [
            layer.input_layernorm.register_forward_pre_hook(self._norm),
            layer.self_attn.register_forward_pre_hook(self._attend, with_kwargs=True),
        ]

    def _norm(self, module: torch.nn.Module, args: tuple) -> None:
        self.hidden = args[0]

    def _attend(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.look(module, (self.hidden,), kwargs)

    def remove(self) -> None:
        """Watch no more."""
        for handle in self.handles:
            handle.remove()
