"""A batch of two on both sides of `beside_kvpress.py`, beside the same prompts alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from _kvpress_prompts import METHODS, PRESSES, Other, Prompt, method, prompt_of
from torch import Tensor

import foveate
from foveate import tiny

FIRST_SCENE = 3_000_000
Pair = tuple[Prompt, list[Prompt]]
"""A batch of two, and its rows alone."""


def pairs(model: Any, processor: Any, count: int, equal: bool) -> Iterator[Pair]:
    """Questions about two scenes, as long as one another or padded on the left."""
    pick = (min, min if equal else max)
    for first in range(FIRST_SCENE, FIRST_SCENE + 2 * count, 2):
        scenes = [tiny.draw_scene(first + i) for i in range(2)]
        texts = [
            least((f"<image> {q.text}" for q in scene.questions), key=lambda t: len(t.split()))
            for scene, least in zip(scenes, pick, strict=True)
        ]
        images, ask = [s.image for s in scenes], {"return_tensors": "pt", "padding": True}
        pair = prompt_of(model, processor(images=images, text=texts, **ask))
        alone = [
            prompt_of(model, processor(images=image, text=text, **ask))
            for image, text in zip(images, texts, strict=True)
        ]
        if (pair.mask is None) == equal:
            yield pair, alone


def batches(model: Any, processor: Any, other: Other, given: list[Pair]) -> dict[str, Any]:
    """How far rows of a batch are from what they get alone, for each contender."""
    rows: dict[str, list[dict[str, float]]] = {}
    for pair, alone in given:
        other.send("prompts", [
            {"embeds": one.embeds, "mask": torch.ones_like(one.visual).long()
             if one.mask is None else one.mask}
            for one in (pair, *alone)
        ])  # fmt: skip
        for name in (None, *METHODS[:2]):
            apart = _ours(model, name and method(name), pair, alone)
            rows.setdefault(f"foveate: {name or 'all tokens'}", []).append(apart)
        for name in (None, *PRESSES[:3]):
            apart = _theirs(other, name, pair, alone)
            rows.setdefault(f"kvpress: {name or 'all tokens'}", []).append(apart)
    return {
        "pairs": len(given),
        "padding": statistics.mean(_padding(pair) for pair, _ in given),
        "rows": {name: _summary(each) for name, each in rows.items()},
    }


def _padding(pair: Prompt) -> int:
    return 0 if pair.mask is None else int((pair.mask == 0).sum())


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """The largest difference, and means of the rest."""
    means = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    return {**means, "difference": max(row["difference"] for row in rows)}


def _ours(model: Any, of: Any, pair: Prompt, alone: list[Prompt]) -> dict[str, float]:
    """How far the logits of a row's second token are from those that it gets alone."""

    def second(one: Prompt) -> Tensor:
        made = model.generate(
            **one.inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return made.logits[1]

    with foveate.use(model, of) if of else nullcontext():
        return _apart(second(pair), torch.cat([second(one) for one in alone]))


def _theirs(other: Other, name: str | None, pair: Prompt, alone: list[Prompt]) -> dict[str, float]:
    """The same of the other side, and the share of padding that it keeps."""
    press = [name and one.press(name) for one in (pair, *alone)]
    if name == "SnapKV":  # one window for all, that of the shorter question
        window = min(one["options"]["window_size"] for one in press[1:])
        for one in press:
            one["options"]["window_size"] = window
    made = [other.fetch("second", prompt=i, press=one) for i, one in enumerate(press)]
    found = _apart(made[0]["logits"], torch.cat([one["logits"] for one in made[1:]]))
    if name and pair.mask is not None:
        left = other.ask("padding", prompt=0, press=press[0])
        found["padding_kept"] = sum(left) / _padding(pair)
    return found


def _apart(together: Tensor, alone: Tensor) -> dict[str, float]:
    same = together.argmax(-1) == alone.argmax(-1)
    return {
        "difference": (together - alone).abs().max().item(),
        "same_token": same.float().mean().item(),
    }
