"""Rows of the results file put together: what the report and the tables show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.bench.levels import ALL
from foveate.bench.stats import Paired, wilson

Row = dict[str, Any]
Config = tuple[str, float | None]
MARGIN = 0.1
"""A task is not informative where the unpruned model is not this much better than the majority."""


@dataclass(frozen=True)
class TaskFacts:
    """What the unpruned model does on a task.

    Args:
        name: of the task.
        n: questions.
        accuracy: of the unpruned model.
        majority: share that the commonest answer gets right.
        telling: whether the model is clearly better than that.
    """

    name: str
    n: int
    accuracy: float
    majority: float
    telling: bool


@dataclass(frozen=True)
class Line:
    """A method at a budget over the informative tasks.

    Args:
        config: method and budget.
        n: questions; 0 where it never ran.
        accuracy: share of right answers.
        interval: its 95 % interval.
        paired: against the unpruned model on the same questions.
        agreement: share of answers that the unpruned model gives too.
        kl: divergence of first words, in nats.
        recall: evidence recall.
        hit: share of pieces of evidence of which a token survives.
        tokens: share of visual tokens, over all decoder layers.
        flops: share of the unpruned model's FLOPs.
        kv_bytes: share of the unpruned model's cache.
        ttft: share of the unpruned model's time to first token, or `None`.
    """

    config: Config
    n: int
    accuracy: float
    interval: tuple[float, float]
    paired: Paired
    agreement: float | None
    kl: float | None
    recall: float | None
    hit: float | None
    tokens: float | None
    flops: float | None
    kv_bytes: float | None
    ttft: float | None = None


class Summary:
    """All cells of a run.

    Args:
        rows: finished cells, one model's.
        stages: method -> where it acts.
    """

    def __init__(self, rows: Sequence[Row], stages: dict[str, str]) -> None:
        self.rows, self.stages = list(rows), stages
        self.by_cell = {(r["method"], r["keep"], r["task"]): r for r in rows}
        self.done = [r for r in rows if r["status"] == "done"]
        self.tasks = [_facts(r) for r in self.done if r["method"] == ALL]

    @property
    def configs(self) -> list[Config]:
        """Methods and budgets of which some cell is done, the unpruned model first."""
        found = dict.fromkeys((r["method"], r["keep"]) for r in self.done)
        return list(found)

    @property
    def keeps(self) -> list[float]:
        """Budgets, largest first."""
        return sorted({keep for _, keep in self.configs if keep is not None}, reverse=True)

    def line(self, config: Config, tasks: Iterable[str] | None = None) -> Line:
        """A method at a budget over some tasks; by default the informative ones."""
        _, mine = self._common((ALL, None), config, tasks)
        n = sum(row["n"] for row in mine)
        right = sum(row["right"] for row in mine)
        mean = {name: _weighted(mine, name) for name in ("agreement", "kl", "recall", "hit")}
        return Line(
            config=config,
            n=n,
            accuracy=right / max(n, 1),
            interval=wilson(right, n),
            paired=self.paired((ALL, None), config, tasks),
            **mean,
            tokens=_weighted(mine, "tokens_ratio"),
            flops=_share(mine, "flops"),
            kv_bytes=_share(mine, "kv_bytes"),
            ttft=self._ttft(config),
        )

    def paired(self, first: Config, second: Config, tasks: Iterable[str] | None = None) -> Paired:
        """Two methods on the questions that both were asked; by default of informative tasks."""
        left, right = (
            [a["right"] for row in rows for a in row["answers"]]
            for rows in self._common(first, second, tasks)
        )
        return Paired.of(left, right)

    def survival(self, config: Config) -> tuple[int, int, list[float]] | None:
        """(height, width, mean lifetime of each cell) over the tasks of the commonest grid."""
        maps: dict[tuple[int, int], list[Row]] = {}
        for row in self.done:
            if (row["method"], row["keep"]) == config and row["survival"]["images"]:
                size = row["survival"]["height"], row["survival"]["width"]
                maps.setdefault(size, []).append(row["survival"])
        if not maps:
            return None
        size = max(maps, key=lambda s: sum(m["images"] for m in maps[s]))
        total = sum(m["images"] for m in maps[size])
        mean = [
            sum(m["lifetimes"][cell] * m["images"] for m in maps[size]) / total
            for cell in range(size[0] * size[1])
        ]
        return *size, mean

    def front(self, lines: Sequence[Line]) -> list[Line]:
        """Those that no other beats in both FLOPs and accuracy, cheapest first."""
        best, front = -1.0, []
        for line in sorted(lines, key=lambda x: (x.flops or 1.0, -x.accuracy)):
            if line.accuracy > best:
                best = line.accuracy
                front.append(line)
        return front

    def troubles(self) -> list[tuple[str, str, str, list[str]]]:
        """(method, status, reason, cells) of cells that were refused or failed."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            if row["status"] != "done":
                keep = "" if row["keep"] is None else f" at {row['keep']:g}"
                where = f"{row['task']}{keep}"
                found.setdefault((row["method"], row["status"], row["error"]), []).append(where)
        return [(*name, cells) for name, cells in found.items()]

    def _common(
        self, first: Config, second: Config, tasks: Iterable[str] | None
    ) -> tuple[list[Row], list[Row]]:
        """The cells of two methods on the tasks that both have done; questions are in one order."""
        if tasks is None:
            telling = [task.name for task in self.tasks if task.telling]
            tasks = telling or [task.name for task in self.tasks]
        left, right = [], []
        for task in tasks:
            a, b = self.by_cell.get((*first, task)), self.by_cell.get((*second, task))
            if a and b and a["status"] == b["status"] == "done":
                left.append(a)
                right.append(b)
        return left, right

    def _ttft(self, config: Config) -> float | None:
        for row in self.done:
            if (row["method"], row["keep"]) == config and row.get("ttft_ms"):
                return float(row["ttft_ms"] / row["ttft_all_ms"])
        return None


def _facts(row: Row) -> TaskFacts:
    telling = row["accuracy"] > row["majority"] + MARGIN
    return TaskFacts(row["task"], row["n"], row["accuracy"], row["majority"], telling)


def _weighted(rows: Sequence[Row], name: str) -> float | None:
    known = [(row[name], row["n"]) for row in rows if row[name] is not None]
    total = sum(n for _, n in known)
    return sum(value * n for value, n in known) / total if total else None


def _share(rows: Sequence[Row], name: str) -> float | None:
    before = sum(row[f"{name}_before"] * row["n"] for row in rows)
    after = sum(row[f"{name}_after"] * row["n"] for row in rows)
    return after / before if before else None
