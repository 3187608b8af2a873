"""Which methods are measured on a tower, why others are not, and how each is set to a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import foveate
from foveate.core import Learning, Method, VisualTokens, get_method, list_methods
from foveate.core.video import VideoMethod
from foveate.methods import VTCCLS, ClsDrop, PixelPrune, ToMe
from foveate.methods.pixelprune import anchored

KEEPS = (0.25, 0.5, 0.125, 0.0625)  # the most telling first
LAYERS, TOKENS = 12, 196
PROBED = (1, 3, 6, 9)
"""Layers in which patches are dropped for embeddings; 1 is the default of `cls-drop`."""
TOWER = "clip_vision_model"
Name = tuple[str, float]
"""A method, as the tables call it, and what it keeps; 1.0 if it removes nothing."""


def reason(slug: str) -> str:
    """Why a registered method is not measured on a tower; empty if it is."""
    kind = get_method(slug)
    if kind.stage == "llm":
        return "acts between decoder layers"
    if issubclass(kind, VideoMethod):
        return "compares the frames of a video, and leaves an image as it is"
    if any(need.startswith(("question", "text")) for need in kind.needs):
        return "reads the question, and this tower has no text that fits it"
    supported = SUPPORT[slug].get(TOWER, "yes")
    if kind.stage == "vision" and supported != "yes":
        return supported.partition(";")[0]  # what foveate itself says
    if kind.learned is not Method.learned or issubclass(kind, Learning):
        return "is for models that were trained with it"
    return ""


SUPPORT: dict[str, dict[str, str]] = json.loads(
    (Path(foveate.__file__).parent / "families" / "support.json").read_text(encoding="utf-8")
)


def left_out() -> dict[str, list[str]]:
    """Reason -> methods that are not measured for it."""
    found: dict[str, list[str]] = {}
    for slug in list_methods():
        if why := reason(slug):
            found.setdefault(why, []).append(slug)
    return found


def measured(stage: str, removes: bool = True) -> list[str]:
    """Methods of a stage that are measured; those that remove nothing apart."""
    kinds = {slug: get_method(slug) for slug in list_methods() if not reason(slug)}
    return [s for s, kind in kinds.items() if (kind.stage, kind.removes) == (stage, removes)]


@dataclass(frozen=True)
class RandomDrop(ClsDrop):
    """The control of `cls-drop`: as many patches at the same place, whatever they show."""

    seed: int = 0

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Random numbers: (G, V)."""
        return torch.rand(tokens.index.shape, generator=torch.Generator().manual_seed(self.seed))


def stepwise(keep: float) -> tuple[float, float, float]:
    """Three equal cuts that end at `keep`."""
    return keep ** (1 / 3), keep ** (2 / 3), keep


def tome(keep: float, tokens: int = TOKENS) -> ToMe:
    """Equal numbers in all layers, or equal shares where those would be over half of a layer."""
    if keep * tokens >= tokens / (LAYERS + 1) + 1:
        return ToMe(keep=keep)
    left = [round(tokens * keep ** (layer / LAYERS)) for layer in range(LAYERS)]
    left.append(int(tokens * keep))
    return ToMe(r=tuple(a - b for a, b in pairwise(left)))


def threshold(pixels: Tensor, keep: float, cell: int = 16) -> float:
    """The threshold of `pixelprune` at which (N, 3, H, W) images keep a share on average."""
    cells = pixels.unfold(2, cell, cell).unfold(3, cell, cell)
    grid = cells.permute(0, 2, 3, 1, 4, 5).flatten(3)
    low, high = 0.0, float(pixels.max() - pixels.min())
    for _ in range(16):
        middle = (low + high) / 2
        if float(anchored(grid, middle).double().mean()) > keep:
            low = middle
        else:
            high = middle
    return high


def inside(keep: float, equal: float) -> dict[str, Callable[[], Method]]:
    """Methods that run inside the tower, but for those of `drops`.

    Args:
        keep: what they keep; `pixelprune` has no budget, and keeps what its threshold makes of it.
        equal: the threshold of `pixelprune`.
    """
    special: dict[str, Callable[[], Method]] = {
        "tome": lambda: tome(keep),
        "pixelprune": lambda: PixelPrune(threshold=equal),
        "zero-tprune": lambda: get_method("zero-tprune")(keep=stepwise(keep)),
        "token-transforming": lambda: get_method("token-transforming")(keep=stepwise(keep)),
    }
    return {
        slug: special.get(slug, lambda slug=slug: get_method(slug)(keep=keep))
        for slug in measured("vision")
        if slug != ClsDrop.slug
    }


def drops(keep: float, seeds: Iterable[int]) -> dict[str, list[ClsDrop]]:
    """`cls-drop` within the first layer that it sees, and its control for each seed."""
    chance = [RandomDrop((0,), keep, seed=seed) for seed in seeds]
    return {"cls-drop": [ClsDrop((0,), keep)], "random": list[ClsDrop](chance)}


def after() -> dict[Name, Method]:
    """Methods that one encoding answers for; `random` is drawn without it."""
    slugs = [slug for slug in measured("pre_llm") if slug != "random"]
    made: dict[Name, Method] = {(s, k): get_method(s)(keep=k) for s in slugs for k in KEEPS}
    for layer in range(LAYERS):
        for keep in KEEPS:
            count = ClsDrop.rounding(TOKENS * keep)
            made[f"cls-drop, layer {layer}", keep] = VTCCLS(keep=count, layers=(layer,))
    return made
