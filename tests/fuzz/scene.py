"""A cell that is ready to be played, and claims: what must be so of each of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

import foveate
from tests.fuzz.cell import Cell
from tests.fuzz.models import member_of, model_of
from tests.fuzz.oracle import Row
from tests.fuzz.prompts import Images, Prompt

GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}


@dataclass(eq=False)
class Told:
    """What the engine says of one image: tokens before, and after each place."""

    total: int
    grid: tuple[int, int]
    kept: dict[str, Tensor]
    frames: int = 1


@dataclass(eq=False)
class Claim:
    """What must be so of a row.

    Args:
        row: its number in the batch.
        prompt: the prompts of the whole conversation.
        more: ids after the prompt.
        told: of each image of the row, what the engine says; `None` where it has not said it.
        asks: for each image, columns of the tokens that rank.
        check: distance between what was seen and the oracle's row.
        turn: for each image, its turn.
        training: whether the model was in training.
        unseen: (T) tokens that the caller hides.
    """

    row: int
    prompt: Prompt
    more: list[int]
    told: list[Told | None]
    asks: list[tuple[int, ...]]
    check: Callable[[Row], float]
    turn: list[int] = field(default_factory=list)
    training: bool = False
    unseen: Tensor | None = None

    @property
    def plain(self) -> Claim:
        """The same without anything removed."""
        return replace(self, told=[None] * len(self.told))


@dataclass(eq=False)
class Scene:
    """A cell that is ready to be played.

    Args:
        cell: the cell.
        model: under its attention kernel.
        prompt: its prompts.
        run: the session; `None` to run the bare model.
        slots: for each decoder layer, slots of the cache where that is to be compared, and how
            many tokens after the prompt it holds.
    """

    cell: Cell
    model: Any
    prompt: Prompt
    run: Any = None
    slots: tuple[list[int], int] | None = None

    @classmethod
    def of(cls, cell: Cell) -> Scene:
        """Set it up."""
        member = member_of(cell.shape)
        model = model_of(cell.shape, cell.attention)
        number = sum(len(row) - 1 for row in cell.rows)
        more = cell.mode == "new-image"
        images = Images.draw(member, model, number + more, cell.pixels, cell.number)
        prompt = Prompt.draw(member, [list(row) for row in cell.rows], images, cell.number)
        return cls(cell, model, prompt)

    @property
    def batch(self) -> dict[str, Any]:
        """What the model is called with."""
        inputs = self.prompt.batch(self.cell.side)
        real = inputs["attention_mask"].bool()
        if self.cell.positions:
            inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
        seen = real.clone()
        for row, hidden in enumerate(self.unseen):
            if hidden is not None:
                columns = real[row].nonzero()[:, 0]
                seen[row, columns[hidden]] = False
        inputs["attention_mask"] = seen.long()
        if self.cell.mask == "4d":
            length = real.shape[1]
            may = torch.ones(length, length).tril().bool() & seen[:, None]
            mask = torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float).min)
            inputs["attention_mask"] = mask[:, None]
        return inputs

    @property
    def unseen(self) -> list[Tensor | None]:
        """For each row, (T) tokens that the caller hides; never the last one."""
        found: list[Tensor | None] = []
        for ids, shares in zip(self.prompt.rows, self.cell.unseen, strict=True):
            hidden = torch.zeros(len(ids), dtype=torch.bool)
            for mille in shares:
                hidden[mille * (len(ids) - 1) // 1000] = True
            found.append(hidden if shares else None)
        return found

    def said(self, beams: int = 1) -> list[list[Told | None]]:
        """What the engine says of the images of each row, just now."""
        if self.run is None:
            return [[None] * n for n in self.prompt.numbers]
        record = self.run.record
        rows: list[list[Told | None]] = [[] for _ in self.prompt.rows]
        for image in record.images if record is not None else []:
            if image.row % beams == 0:
                kept = {place: kept.clone() for place, kept in image.kept.items()}
                rows[image.row // beams].append(Told(image.total, image.grid, kept, image.frames))
        return rows

    def claims(self, more: list[list[int]], checks: list[Any], **fields: Any) -> list[Claim]:
        """One for each row, whose prompt's last token ranks."""
        told = fields.pop("told", None) or self.said(fields.pop("beams", 1))
        return [
            Claim(
                row, self.prompt, more[row], told[row],
                [(len(ids) - 1,)] * len(told[row]), checks[row], **fields,
            )
            for row, ids in enumerate(self.prompt.rows)
        ]  # fmt: skip

    def cache(self) -> Any:
        """An empty static cache, or nothing."""
        if not self.cell.static:
            return None
        width = max(map(len, self.prompt.rows))
        return StaticCache(self.model.config.get_text_config(), max_cache_len=width + 24)


@contextmanager
def session(scene: Scene) -> Iterator[Scene]:
    """The scene under a session with the cell's methods."""
    methods = [chosen.build() for chosen in scene.cell.methods]
    with foveate.use(scene.model, methods if len(methods) > 1 else methods[0]) as run:
        yield Scene(scene.cell, scene.model, scene.prompt, run)


def nearest(alive: Tensor) -> Tensor:
    """(T) for each column the nearest one at or before it that is left, or else the first."""
    order = torch.arange(len(alive)).masked_fill(~alive, -1)
    found = order.cummax(0).values
    return torch.where(found < 0, alive.nonzero()[0, 0], found)


def slots_of(cache: Any) -> list[int]:
    """Slots of the layers of a dynamic cache that see everything; -1 for other layers."""
    return [
        layer.keys.shape[2] if "Static" not in type(layer).__name__
        and getattr(layer, "sliding_window", None) is None else -1
        for layer in cache.layers
    ]  # fmt: skip
