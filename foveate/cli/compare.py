"""All visual tokens against a method: the same question, answers and costs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from foveate.core import Method
from foveate.measure.timing import Timing, interleave
from foveate.measure.units import human_bytes, human_flops
from foveate.report.report import Report
from foveate.report.tables import layer_ranges
from foveate.run import use

ALL = "all tokens"
WARMUP = 3


@dataclass(frozen=True)
class Comparison:
    """One question with all visual tokens and with a method.

    Args:
        answers: by name, `ALL` and the method's.
        ttft: times to first token by name; vision tower, selection and prefill included.
        report: what the method did.
    """

    answers: dict[str, str]
    ttft: dict[str, Timing]
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Answers and times as JSON values."""
        return {
            "answers": self.answers,
            "ttft": {name: timing.to_dict() for name, timing in self.ttft.items()},
        }


def time_first_token(
    model: Any,
    inputs: Any,
    methods: Sequence[Method],
    *,
    repeats: int,
    tick: Callable[[], object] | None = None,
    keep_total: int | None = None,
) -> dict[str, Timing]:
    """Times to first token with all tokens and with methods, runs taking turns."""
    name = " + ".join(method.slug for method in methods)
    return interleave(
        lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False),
        {ALL: nullcontext, name: lambda: use(model, methods, keep_total=keep_total)},
        repeats=repeats,
        warmup=WARMUP,
        device=model.device,
        tick=tick,
    )


def comparison_table(comparison: Comparison) -> Table:
    """Answers, then costs, then tokens of each decoder layer."""
    other = next(name for name in comparison.answers if name != ALL)
    table = _three_columns(other)
    table.add_row("answer", *(f"[bold]{_plain(a)}[/]" for a in comparison.answers.values()), "")
    table.add_section()
    add_costs(table, comparison.report, comparison.ttft)
    return table


def cost_table(report: Report, ttft: dict[str, Timing]) -> Table:
    """Costs and tokens of each decoder layer, without answers."""
    table = _three_columns(next(name for name in ttft if name != ALL))
    add_costs(table, report, ttft)
    return table


def add_costs(table: Table, report: Report, ttft: dict[str, Timing]) -> None:
    """Add rows for visual tokens in each layer, FLOPs, cache bytes and time to first token."""
    total = _visual(report, report["prompt_tokens"])
    for name, first in layer_ranges([layer["tokens"] for layer in report["layers"]]):
        now = sum(report["layers"][first]["visual_tokens"])
        label = f"visual tokens, layer{'s' if '-' in name else ''} {name}"
        table.add_row(label, str(total), str(now), _share(now, total))
    table.add_section()
    work, memory = report["flops"], report["kv_bytes"]
    vision = work["vision"] or 0
    rows = [("  language model", work["before"] - vision, work["after"] - vision)]
    if work["vision"] is not None:
        rows.insert(0, ("prefill with vision", work["before"], work["after"]))
    for label, before, after in rows:
        table.add_row(label, human_flops(before), human_flops(after, before), _share(after, before))
    table.add_row(
        f"KV cache, {report['dtype']}",
        human_bytes(memory["before"]),
        human_bytes(memory["after"], memory["before"]),
        _share(memory["after"], memory["before"]),
    )
    if report["state_bytes"]:
        held = human_bytes(report["state_bytes"])
        table.add_row("state of recurrent layers", held, held, "100.0%")
    medians = [timing.median_ms for timing in ttft.values()]
    cells = [f"{timing.median_ms:.1f} ms" for timing in ttft.values()]
    table.add_row("time to first token, median", *cells, _share(medians[1], medians[0]))
    spreads = ["{:.1f} to {:.1f} ms".format(*timing.spread_ms) for timing in ttft.values()]
    repeats = len(next(iter(ttft.values())).runs_ms)
    table.add_row(f"  p10 to p90 of {repeats}", *spreads, "")


def _three_columns(name: str) -> Table:
    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    for heading in (ALL, name, "ratio"):
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _visual(report: Report, prompt_tokens: list[int]) -> int:
    """Visual tokens of the batch before anything was removed."""
    return sum(image["tokens"] for image in report["images"]) if prompt_tokens else 0


def _share(now: float, before: float) -> str:
    return f"{now / before:.1%}" if before else ""


def _plain(text: str) -> str:
    """Text that Rich must not read as markup."""
    return text.replace("[", "\\[") or "(nothing)"
