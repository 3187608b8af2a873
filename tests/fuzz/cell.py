"""Cells: everything that a seed decides about one run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from random import Random

from tests.conformance.zoo.mrope import UNPLACED
from tests.fuzz.methods import Chosen, Facts, draw, merges
from tests.fuzz.models import BLOCKS, FAMILIES, MROPE, TWO_WAY, Shape, kinds_of, planes_of

MODES = {
    "forward": 6, "decode": 4, "generate": 6, "no-cache": 2, "beams": 3, "turn": 3, "new-image": 2,
    "lookup": 2, "train": 4, "chunked": 1, "sample": 2, "packed": 2,
}  # fmt: skip
ONE_ROW = ("lookup", "new-image")
HAND_MADE = {"perception_lm", "fast_vlm"}  # towers from timm


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        key: `SEED:NUMBER`.
        shape: the model.
        attention: its attention kernel.
        pixels: whether images go through the encoder, or are features made by hand.
        rows: for each row lengths of text pieces, with an image between two.
        side: where padding is.
        methods: in stream order.
        mode: how the model is run.
        steps: tokens generated, or decoding steps.
        width: beams, drafted tokens, or the size of a chunk.
        static: whether the cache is static.
        hidden_states: whether these are compared, too.
        logits_to_keep: the last so many; 0 for all.
        mask: `2d`, or `4d` where the caller makes the causal mask.
        positions: whether position ids are given.
        unseen: for each row, columns that the caller's mask hides.
        new: text before and after the image of a second turn.
        again: whether all is done twice in one session.
    """

    key: str
    shape: Shape
    attention: str
    pixels: bool
    rows: tuple[tuple[int, ...], ...]
    side: str
    methods: tuple[Chosen, ...]
    mode: str
    steps: int
    width: int
    static: bool
    hidden_states: bool
    logits_to_keep: int
    mask: str
    positions: bool
    unseen: tuple[tuple[int, ...], ...]
    new: tuple[int, int]
    again: bool

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @property
    def number(self) -> int:
        """A seed for what is drawn with torch."""
        return int(self.key.replace(":", "")) % 2**31


def cell_of(seed: int, number: int) -> Cell:
    """The cell of a seed and a number, the same on every machine."""
    r = Random(f"{seed}:{number}")
    family = r.choice(sorted(FAMILIES))
    shape = Shape(family, r.choice([4, 5, 6, 6, 8]), r.choice([1, 2, 2, 4]))
    mode = _mode(r, family)
    pixels = family not in HAND_MADE and "-video" not in family and r.random() < 0.5
    pixels = pixels or (mode == "new-image" and family in MROPE)
    rows = _rows(r, mode, pixels)
    kinds = kinds_of(shape)
    facts = Facts(
        depth=shape.depth,
        seers=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
        first=planes_of(shape),
        one_dimensional=family not in MROPE,
        rows=len(rows),
        pixels=pixels,
        class_token=FAMILIES[family].class_attention is not None,
        flat="-video" not in family,
        windowed=family == "llava-window",
        free=frozenset(range(shape.depth)),
    )
    forward = mode == "forward"
    plain = forward and family not in MROPE | BLOCKS
    causal = plain and set(kinds) == {"full_attention"} and family != "llava-window"
    mask = "4d" if causal and r.random() < 0.25 else "2d"
    side = r.choice(["left", "right"]) if mode in ("forward", "train") else "left"
    methods = tuple(draw(r, facts, _asks(r, mode)))
    if merges(methods):  # features are taken from a row alone, whose prompt is not known there
        rows = tuple(row if row[-1] or len(row) == 1 else (*row[:-1], 1) for row in rows)
    return Cell(
        key=f"{seed}:{number}",
        shape=shape,
        attention=r.choice(["sdpa", "sdpa", "eager"]),
        pixels=pixels,
        rows=rows,
        side=side,
        methods=methods,
        mode=mode,
        steps=r.randint(1, 4),
        width=r.randint(2, 3) if mode != "chunked" else r.randint(5, 40),
        static=mode in ("decode", "generate", "beams", "turn") and r.random() < 0.25,
        hidden_states=forward and r.random() < 0.4,
        logits_to_keep=r.choice([0, 0, 1, 3]) if forward else 0,
        mask=mask,
        positions=plain and r.random() < 0.3,
        unseen=_unseen(r, rows) if plain else ((),) * len(rows),
        new=(r.randint(0, 3), r.randint(1, 4)),
        again=r.random() < 0.2,
    )


def _asks(r: Random, mode: str) -> str:
    """Which methods may ask the prompt in a mode."""
    if mode == "no-cache":
        return "ranked"
    return "none" if mode == "chunked" and r.random() < 0.8 else "any"


def _mode(r: Random, family: str) -> str:
    """A way of running that the bare model offers."""
    while True:
        mode = r.choices(list(MODES), list(MODES.values()))[0]
        if mode == "train" and family in TWO_WAY:
            continue
        if mode == "packed" and family in MROPE | BLOCKS | {"llava-window"}:
            continue
        if mode == "new-image" and (family in BLOCKS or family in UNPLACED or "-video" in family):
            continue
        return mode


def _rows(r: Random, mode: str, pixels: bool) -> tuple[tuple[int, ...], ...]:
    """Rows of text and images; some begin with an image, some have two next to each other."""
    number = 1 if mode in ONE_ROW else r.choice([1, 1, 2, 3, 4])
    left = 3 if pixels else 6  # images that there are
    rows = []
    for row in range(number):
        images = min(r.choice([0, 1, 1, 1, 2, 2, 3]), left)
        if row == 0 and mode == "new-image":
            images = 1
        left -= images
        pieces = [r.choice([0, 1, 2, 3, 5, 8]) for _ in range(images + 1)]
        if images == 0:
            pieces = [r.randint(2, 9)]
        elif pieces[-1] == 0 and (mode == "no-cache" or r.random() < 0.5):
            # Without a cache each step has a prompt of its own, and one record tells the last.
            pieces[-1] = r.randint(1, 6)
        rows.append(tuple(pieces))
    if not any(len(row) > 1 for row in rows) and r.random() < 0.9:
        rows[0] = (*rows[0], r.randint(1, 6))
    return tuple(rows)


def _unseen(r: Random, rows: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Shares of the row, in per mille, at which tokens are hidden."""
    if r.random() < 0.7:
        return ((),) * len(rows)
    return tuple(tuple(sorted(r.sample(range(1000), r.randint(0, 6)))) for _ in rows)
