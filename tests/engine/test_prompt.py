"""What is derived from the tokens of a prompt equals a naive loop over rows, images and columns."""

from itertools import groupby

import pytest
import torch

from foveate.engine.masks import left_align
from foveate.engine.prompt import PromptTokens

BATCH, LENGTH = 3, 30
KINDS = {
    "plain": {},
    "padded left": {"real": "left"},
    "padded right": {"real": "right"},
    "hidden in all rows": {"real": "one row"},
    "hidden in between": {"real": "between"},
    "drafts": {"trailing": 2},
    "labels": {"supervised": True},
    "labels and padding": {"supervised": True, "real": "right"},
    "packed": {"sample": True},
    "packed labels": {"supervised": True, "sample": True},
}


def prompt(kind: str, seed: int) -> tuple[PromptTokens, list[tuple[int, int]]]:
    """A random prompt, and (row, end) of its images; a row in three ends in one."""
    draw, said = torch.Generator().manual_seed(seed), KINDS[kind]
    blocks = torch.rand(BATCH, LENGTH // 3, generator=draw) < 0.4
    blocks[0, -1], blocks[0, 2] = True, True
    visual = blocks.repeat_interleave(3, 1)
    order, real = torch.arange(LENGTH), None
    pads = torch.randint(1, 8, (BATCH, 1), generator=draw)
    if said.get("real") == "left":
        real = order >= pads
    elif said.get("real") == "right":
        real = order < LENGTH - pads
    elif said.get("real") == "one row":  # a mask of four dimensions may be one for all rows
        real = (order < LENGTH - 4)[None]
    elif said.get("real") == "between":
        real = torch.rand(BATCH, LENGTH, generator=draw) < 0.8
    if said.get("real") in ("left", "right"):
        visual &= real
    supervised = torch.rand(BATCH, LENGTH, generator=draw) < 0.4 if "supervised" in said else None
    cuts = torch.rand(BATCH, LENGTH, generator=draw) < 0.15
    sample = cuts.cumsum(1) if "sample" in said else None
    tokens = PromptTokens(
        visual,
        real,
        said.get("trailing", 0),
        None if supervised is None else supervised & ~visual,
        sample,
    )
    ends = [(r, c) for r in range(BATCH) for c in range(LENGTH) if _ends_image(tokens, r, c)]
    return tokens, ends


def _ends_image(tokens, row, column) -> bool:
    visual = tokens.visual[row]
    return bool(visual[column]) and (column + 1 == LENGTH or not visual[column + 1])


class Naive:
    """The same by loops."""

    def __init__(self, tokens: PromptTokens) -> None:
        every, none = torch.ones(BATCH, LENGTH).bool(), torch.zeros(BATCH, LENGTH)
        self.tokens, self.visual = tokens, tokens.visual.tolist()
        self.real = (every if tokens.real is None else tokens.real.expand(BATCH, -1)).tolist()
        self.sample = (none if tokens.sample is None else tokens.sample).tolist()
        self.labels = (none if tokens.supervised is None else tokens.supervised).bool().tolist()

    def last(self, row: int, visual_too: bool = False) -> set[int]:
        """Columns of the last tokens of the prompts in a row."""
        real = [
            c for c in range(LENGTH) if self.real[row][c] or (visual_too and self.visual[row][c])
        ]
        last = {real[-1] - self.tokens.trailing}
        if self.tokens.sample is not None:
            runs = groupby(range(LENGTH), key=lambda c: self.sample[row][c])
            last |= {[*columns][-1] for _, columns in runs}
        return last

    def before_spans(self, row: int) -> set[int]:
        labels = self.labels[row]
        return {c for c in range(LENGTH - 1) if not labels[c] and labels[c + 1]}

    def own(self, row: int, end: int) -> set[int]:
        return {c for c in range(LENGTH) if self.sample[row][c] == self.sample[row][end]}

    def query(self, row: int, end: int) -> set[int]:
        own = self.own(row, end)
        if self.tokens.supervised is None:
            return self.last(row) & own if self.tokens.sample is not None else self.last(row)
        spans = {c for c in self.before_spans(row) if self.real[row][c]}
        spans = {c for c in spans if self.sample[row][c] == self.sample[row][c + 1]}
        return {c for c in spans & own if c >= end}

    def text(self, row: int, end: int) -> set[int]:
        """The question text of an image, or what stands for it."""
        own = self.own(row, end)
        text = self.text_after(row, end) & own
        return text if text or self.tokens.supervised is not None else self.last(row) & own

    def text_after(self, row: int, end: int) -> set[int]:
        """Text of all samples of a row after a column."""
        return {
            c
            for c in range(end + 1, max(self.last(row)) + 1)
            if self.real[row][c] and not self.visual[row][c] and not self.labels[row][c]
        }

    def readout(self, row: int) -> set[int]:
        read = self.last(row, True) if self.tokens.supervised is None else self.before_spans(row)
        return {c for c in read if self.visual[row][c]}


def chosen(columns, mask) -> list[set[int]]:
    """Columns at which a mask is true, in each row once."""
    rows = [c[m].tolist() for c, m in zip(columns, mask, strict=True)]
    assert all(len(set(row)) == len(row) for row in rows)
    return [set(row) for row in rows]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_equals_a_naive_loop(kind, seed):
    tokens, images = prompt(kind, seed)
    naive, (rows, ends) = Naive(tokens), zip(*images, strict=True)
    row, end = torch.tensor(rows), torch.tensor(ends)
    query, text = tokens.query, tokens.question_text(rows, ends)
    assert chosen(query.columns[row], query.of(row, end)) == [naive.query(*i) for i in images]
    assert chosen(text.columns[row], text.mask(row, end)) == [naive.text(*i) for i in images]
    first = {r: min(end for row, end in images if row == r) for r in rows}
    after = [naive.text_after(r, first[r]) if r in first else set() for r in range(BATCH)]
    assert chosen(text.columns, text.real) == after
    bare = [i for i in images if not naive.text_after(*i) & naive.own(*i)]
    if text.last is not None:
        stand = [set().union(*(naive.text(*i) for i in bare if i[0] == r)) for r in range(BATCH)]
        assert chosen(text.columns, text.last) == stand
    read = torch.zeros_like(tokens.visual) if tokens.readout is None else tokens.readout
    assert chosen([torch.arange(LENGTH)] * BATCH, read) == [naive.readout(r) for r in range(BATCH)]


def test_left_align_keeps_the_order_of_columns():
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
    columns, real = left_align(mask)
    assert chosen(columns, real) == [{1, 3, 4}, {2}]
    assert columns.tolist() == [[1, 3, 4], [2, 2, 2]]
    assert left_align(mask & False)[0].shape == (2, 0)
    assert left_align(mask & False, least=1)[0].shape == (2, 1)
