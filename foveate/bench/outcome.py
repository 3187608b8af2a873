"""What came of a cell: answers, what they cost, and which tokens were left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.bench.judge import majority, normalise
from foveate.bench.recall import Seen


@dataclass
class Answer:
    """One question and what was said.

    Args:
        seed: of the sample.
        turn: which turn of the sample.
        question: what was asked.
        answer: what is right.
        said: what the model said.
        right: whether that is right.
        recall: share of the evidence's area left, averaged over decoder layers after the first
            cut; `None` where there is no evidence.
        hit: share of the pieces of evidence of which a token survives.
        agrees: whether the unpruned model says the same.
        kl: divergence of the first word from the unpruned model's, in nats.
        recall_by_site: recall after each site.
    """

    seed: int
    turn: int
    question: str
    answer: str
    said: str
    right: bool
    recall: float | None = None
    hit: float | None = None
    agrees: bool = True
    kl: float = 0.0
    recall_by_site: dict[str, float] = field(default_factory=dict)


@dataclass
class Totals:
    """Sums over the first prompts of a cell: FLOPs, cache bytes, tokens of decoder layers."""

    rows: int = 0
    visual_tokens: int = 0
    flops_before: int = 0
    flops_after: int = 0
    kv_bytes_before: int = 0
    kv_bytes_after: int = 0
    remaining: float = 0.0

    def add(self, report: Any) -> None:
        """Add the report of a batch."""
        self.rows += report["rows"]
        total = sum(image["tokens"] for image in report["images"])
        self.visual_tokens += total
        self.flops_before += report["flops"]["before"]
        self.flops_after += report["flops"]["after"]
        self.kv_bytes_before += report["kv_bytes"]["before"]
        self.kv_bytes_after += report["kv_bytes"]["after"]
        layers = [sum(layer["visual_tokens"]) for layer in report["layers"]]
        self.remaining += sum(layers) / max(len(layers), 1)


class Survival:
    """How long tokens live at each cell of the grid, summed over images of the commonest grid."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: dict[tuple[int, int], int] = defaultdict(int)

    def add(self, look: Seen) -> None:
        """Add an image, if its tokens form one grid."""
        if (grid := look.grid) is None:
            return
        lived = look.lifetime()
        self._sums[grid] = self._sums.get(grid, torch.zeros_like(lived)) + lived
        self._counts[grid] += 1

    def to_dict(self) -> dict[str, Any]:
        """Rows, columns, images and the mean lifetime of each cell, row by row."""
        if not self._counts:
            return {"height": 0, "width": 0, "images": 0, "lifetimes": []}
        grid = max(self._counts, key=lambda g: self._counts[g])
        mean = self._sums[grid] / self._counts[grid]
        return {
            "height": grid[0],
            "width": grid[1],
            "images": self._counts[grid],
            "lifetimes": [round(x, 4) for x in mean.tolist()],
        }


@dataclass
class Outcome:
    """What came of a cell.

    Args:
        status: `done`, `refused` (the method cannot run there) or `failed`.
        error: why it was refused or failed.
        answers: question by question.
        totals: costs.
        survival: which tokens lived how long.
        notes: what reports said.
        method: hyper-parameters.
        seconds: that it took.
    """

    status: str = "done"
    error: str = ""
    answers: list[Answer] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    survival: Survival = field(default_factory=Survival)
    notes: list[str] = field(default_factory=list)
    method: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def compare(self, unpruned: Sequence[Answer], divergence: Sequence[float]) -> None:
        """Note of each answer whether the unpruned model agrees, and how first words differ."""
        for mine, other, nats in zip(self.answers, unpruned, divergence, strict=True):
            mine.agrees = normalise(mine.said) == normalise(other.said)
            mine.kl = nats

    def to_dict(self) -> dict[str, Any]:
        """The columns of the results file that a cell's run fills in."""
        answers, totals = self.answers, self.totals
        n = len(answers)
        return {
            "status": self.status,
            "error": self.error,
            "n": n,
            "right": sum(a.right for a in answers),
            "accuracy": _mean([float(a.right) for a in answers]),
            "majority": majority([a.answer for a in answers]) if n else None,
            "agreement": _mean([float(a.agrees) for a in answers]),
            "kl": _mean([a.kl for a in answers]),
            "recall": _mean([a.recall for a in answers]),
            "hit": _mean([a.hit for a in answers]),
            "recall_by_site": _by_site(answers),
            "visual_tokens": totals.visual_tokens / max(totals.rows, 1),
            "tokens_ratio": totals.remaining / max(totals.visual_tokens, 1),
            "flops_before": totals.flops_before / max(totals.rows, 1),
            "flops_after": totals.flops_after / max(totals.rows, 1),
            "kv_bytes_before": totals.kv_bytes_before / max(totals.rows, 1),
            "kv_bytes_after": totals.kv_bytes_after / max(totals.rows, 1),
            "survival": self.survival.to_dict(),
            "notes": self.notes,
            "seconds": self.seconds,
            "answers": [_row(a) for a in answers],
        }


def _row(answer: Answer) -> dict[str, Any]:
    row = asdict(answer)
    del row["recall_by_site"]
    return row


def _by_site(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Mean recall after each site, in the order of the stream."""
    shares: dict[str, list[float]] = {}
    for answer in answers:
        for site, share in answer.recall_by_site.items():
            shares.setdefault(site, []).append(share)
    return [{"site": site, "recall": _mean(found)} for site, found in shares.items()]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
