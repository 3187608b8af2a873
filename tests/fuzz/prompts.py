"""Prompts of a cell: the padded batch, and each row alone.

A row is a list of text lengths with an image between two, as in the zoo: `[3, 0, 5]` is three
tokens of text, two images next to each other, and five tokens of text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.conformance.zoo import Member
from tests.conformance.zoo.member import fresh
from tests.fuzz.models import MROPE, OF_ONE_SIZE

LETTERS = (3, 80)  # ids of text


@dataclass(eq=False)
class Images:
    """The images of a batch, in order of appearance.

    Args:
        member: whose.
        counts: visual tokens of each.
        pixels: what the encoder eats, or `None` where features are made by hand.
        features: (V, D) of each, or `None`.
    """

    member: Member
    counts: list[int]
    pixels: dict[str, Any] | None = None
    features: list[Tensor] | None = None

    @classmethod
    def draw(cls, member: Member, model: Any, number: int, pixels: bool, seed: int) -> Images:
        """Some images, of several sizes where the family has them."""
        if not number:
            return cls(member, [])
        if pixels:
            fed = member.pixels(number, seed)
            return cls(member, member.counts(model, fed), pixels=fed)
        generator = torch.Generator().manual_seed(seed)
        ragged = not member.stacked and member.name not in OF_ONE_SIZE
        counts = [(16, 9, 20)[i % 3] if ragged else member.visual for i in range(number)]
        width = member.config().get_text_config().hidden_size
        features = [torch.randn(count, width, generator=generator) for count in counts]
        return cls(member, counts, features=features)

    def given(self, start: int, stop: int, rows: list[int] | None = None) -> dict[str, Any]:
        """Arguments of a forward that hand over some of them.

        Args:
            start: the first.
            stop: the first that is not.
            rows: how many each row of the batch has.
        """
        if start == stop:
            return {}
        if self.pixels is not None:
            if rows is not None:
                chosen = self.pixels
                if stop < len(self.counts):
                    chosen = self.member.take(self.pixels, start, stop)
                return fresh(self.member.batch(chosen, rows))
            return fresh(self.member.take(self.pixels, start, stop))
        return {"mm_encoder_outputs": {self.member.modality: self.output(start, stop)}}

    def output(self, start: int, stop: int) -> Any:
        """Features made by hand, in the family's container."""
        assert self.features is not None
        chosen = [feature.clone() for feature in self.features[start:stop]]
        if len({len(feature) for feature in chosen}) == 1:
            return self.member.output(torch.stack(chosen))
        return BaseModelOutputWithPooling(pooler_output=chosen)


@dataclass(eq=False)
class Prompt:
    """A batch.

    Args:
        member: whose prompts these are.
        rows: ids of each row, without padding.
        images: all images.
        owned: for each row, the numbers of its images.
        start: of a later turn, ids of each row that are cached already.
    """

    member: Member
    rows: list[list[int]]
    images: Images
    owned: list[list[int]]
    spans: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def draw(cls, member: Member, pieces: list[list[int]], images: Images, seed: int) -> Prompt:
        """Random text around the images."""
        generator = torch.Generator().manual_seed(seed)
        rows, owned, spans, first = [], [], [], 0
        for row in pieces:
            ids: list[int] = []
            columns = []
            for number, length in enumerate(row):
                if number:
                    begin, end = _around(member)
                    ids += begin
                    count = images.counts[first + number - 1]
                    columns.append(torch.arange(len(ids), len(ids) + count))
                    ids += [member.image_id] * count + end
                ids += torch.randint(*LETTERS, (length,), generator=generator).tolist()
            rows.append(ids)
            owned.append(list(range(first, first + len(row) - 1)))
            spans.append(columns)
            first += len(row) - 1
        return cls(member, rows, images, owned, spans)

    @property
    def numbers(self) -> list[int]:
        """How many images each row has."""
        return [len(owned) for owned in self.owned]

    def batch(self, side: str) -> dict[str, Any]:
        """The padded batch."""
        width = max(map(len, self.rows))
        ids, mask = [], []
        for row in self.rows:
            gap = [0] * (width - len(row))
            ids.append(gap + row if side == "left" else row + gap)
            ones = [1] * len(row)
            mask.append(gap + ones if side == "left" else ones + gap)
        padded = torch.tensor(ids)
        number = sum(self.numbers)
        inputs = {"input_ids": padded, "attention_mask": torch.tensor(mask)}
        return (
            inputs | self.member.extras(padded, number) | self.images.given(0, number, self.numbers)
        )

    def alone(self, row: int, more: list[int], features: Any = None) -> dict[str, Any]:
        """A row without padding, with what is said after it.

        Args:
            row: its number.
            more: ids that follow.
            features: what the row's images look like after they were merged, in place of what
                they are.
        """
        ids = torch.tensor([self.rows[row] + more])
        owned = self.owned[row]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= self.member.extras(ids, len(owned))
        if self.member.name.startswith("paligemma"):
            inputs["token_type_ids"][:, len(self.rows[row]) :] = 1
        if not owned:
            return inputs
        given = self.images.given(owned[0], owned[-1] + 1)
        if features is not None:
            grids = {name: value for name, value in given.items() if name.endswith("grid_thw")}
            given = {"mm_encoder_outputs": {self.member.modality: features}} | grids
        return inputs | given


def _around(member: Member) -> tuple[list[int], list[int]]:
    """Ids before and after the visual tokens of an image."""
    if member.name in MROPE:  # where images touch, transformers takes them for one
        return [LETTERS[0]], []
    ids = member.image_ids()
    first = ids.index(member.image_id)
    last = len(ids) - ids[::-1].index(member.image_id)
    return ids[:first], ids[last:]
