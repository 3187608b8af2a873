"""The fuzzer's part of `docs/reliability.md`, from the result of its last long run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "last-run.json"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- fuzz: begin -->\n", "<!-- fuzz: end -->"
SAY = {
    "agreed": "agreed with the oracle to 1e-4",
    "refused": "refused with a message from foveate",
    "bare": "the bare model already differs from itself at full length, or raises an error",
    "disagreed": "disagreed with the oracle",
    "crashed": "raised any other error",
}


def table(result: dict[str, Any]) -> str:
    """The section in Markdown."""
    lines = [
        f"`make fuzz CELLS={result['cells']} SEED={result['seed']}` with torch {result['torch']} "
        f"and transformers {result['transformers']}: removing tokens changed the bare model's "
        f"answer in {result['removed']} cells, and the largest distance from the oracle in a cell "
        f"that agreed is {result['farthest']:.0e}.",
        "",
        "| cells | outcome |",
        "| ---: | --- |",
        *(f"| {n} | {SAY[status]} |" for status, n in result["counts"].items()),
        "",
        "| refusals | message (N stands for numbers) |",
        "| ---: | --- |",
        *(f"| {n} | {what.replace('|', ' ')} |" for what, n in result["refused"].items()),
    ]
    return "\n".join(lines) + "\n"


def page(text: str, result: dict[str, Any]) -> str:
    """The page with the section renewed."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(result) + END + rest.split(END)[1]


def write(result: dict[str, Any]) -> None:
    """Keep the result, and renew the page."""
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
