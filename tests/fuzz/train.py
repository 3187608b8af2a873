"""Playing a cell in training: the loss of the batch is that of the short sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.oracle import Row
from tests.fuzz.scene import Claim, Scene, nearest


def train(scene: Scene) -> list[Claim]:
    """The loss of a batch with labels on some text, and that it can be differentiated."""
    cell, batch, model = scene.cell, scene.batch, scene.model
    generator = torch.Generator().manual_seed(cell.number)
    labels, rows = torch.full_like(batch["input_ids"], -100), []
    for row, ids in enumerate(scene.prompt.rows):
        mine = _labels(scene, row, generator)
        labels[row, scene.prompt.batch(cell.side)["attention_mask"][row].bool()] = mine
        rows.append(mine)
        assert len(mine) == len(ids)
    model.train()
    try:
        with torch.enable_grad():
            loss = model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
    total = sum(int((mine[1:] != -100).sum()) for mine in rows)
    told, sums, claims = scene.said(), [], []
    for row, mine in enumerate(rows):
        asks = (mine[:-1] == -100) & (mine[1:] != -100)
        after = [
            tuple(c for c in asks.nonzero()[:, 0].tolist() if c >= int(span[-1]))
            for span in scene.prompt.spans[row]
        ]
        check = _loss(mine, sums, None if row + 1 < len(rows) else (loss.item(), total))
        claims.append(Claim(row, scene.prompt, [], told[row], after, check, training=True))
    return claims


def _labels(scene: Scene, row: int, generator: torch.Generator) -> Tensor:
    """Labels of a row: spans of text, none of which an image or nothing at all precedes."""
    ids = torch.tensor(scene.prompt.rows[row])
    labels = torch.where(torch.rand(len(ids), generator=generator) < 0.4, ids, -100)
    if len(ids) > 2:  # spans longer than one
        labels[-2:] = ids[-2:] if torch.rand((), generator=generator) < 0.7 else -100
    for span in scene.prompt.spans[row]:
        labels[span] = -100
        # In training the loss is that of the shorter sequence, and what precedes an answer may go.
        labels[span[-1] + 1 : span[-1] + 2] = -100
    labels[0] = -100
    return labels


def _loss(labels: Tensor, sums: list[Any], whole: Any) -> Callable[[Row], float]:
    """Add up the loss of a row; the last row compares the mean."""

    def check(row: Row) -> float:
        at = (labels != -100).nonzero()[:, 0]
        if not len(at):  # of a row without text, nothing may be left
            sums.append(0.0)
            return abs(sum(sums) / whole[1] - whole[0]) if whole and whole[1] else 0.0
        before = nearest(row.alive[-1])
        logits = row.logits[before[at - 1]].log_softmax(-1)
        sums.append(-logits.gather(1, labels[at, None]).sum().item())
        if whole is None or not whole[1]:  # the mean of nothing is no number
            return 0.0
        return abs(sum(sums) / whole[1] - whole[0])

    return check
