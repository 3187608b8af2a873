"""The figures of docs/tune.md, from benchmarks/results/tune.json.

python benchmarks/tune_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "tune.json"
PAGE = Path(__file__).parents[1] / "docs" / "tune.md"
BEGIN, END = "<!-- tune: begin -->\n", "<!-- tune: end -->"
HEAD = ("FLOPs", "recipe", "right, search", "right, held out", "change, held out", "measured FLOPs")


def page(old: str, result: dict[str, Any]) -> str:
    """The page with its figures made anew."""
    before, rest = old.split(BEGIN)
    return before + BEGIN + figures(result) + END + rest.split(END)[1]


def figures(result: dict[str, Any]) -> str:
    """Tables and sentences of a result."""
    rows = [HEAD, ("---:", "---", *["---:"] * 4)]
    said = []
    for share in result["shares"]:
        rows += [_row(share, "tuned", share["chosen"]), _row(share, "best published",
                                                             share["best_published"])]  # fmt: skip
        said.append(_gain(share))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    counts = result["shares"][0]["questions"]
    asked = f"{counts['search']} questions to search with, {counts['held_out']} held out"
    about = f"{asked}, {result['trials']} trials, seed {result['seed']}; {result['note']}."
    cpu = result["machine"]["cpu"]
    return f"{about} {cpu}.\n\n{table}\n" + "\n".join(said) + "\n\n"


def _row(share: dict[str, Any], what: str, found: dict[str, Any] | None) -> tuple[str, ...]:
    if found is None:
        return (f"{share['flops']:g}", f"{what}: none", *[""] * 4)
    search, held = found["search"], found["held_out"]
    low, high = held["change_interval"]
    return (
        f"{share['flops']:g}",
        f"{what}: `{found['recipe']}`",
        _share(search),
        _share(held),
        f"{held['change']:+.1f} ({low:+.1f} to {high:+.1f})",
        f"{held['costs']['flops']:.4f}",
    )


def _share(score: dict[str, Any]) -> str:
    low, high = (100 * value for value in score["interval"])
    return f"{100 * score['quality']:.1f} % ({low:.1f} to {high:.1f})"


def _gain(share: dict[str, Any]) -> str:
    minutes = share["cpu_seconds"] / 60
    took = f"{minutes:.1f} CPU-minutes, held-out questions included"
    if share["gain_over_published"] is None:
        return f"- At {share['flops']:g}: nothing to compare with. {took}."
    gain, low, high = share["gain_over_published"]
    return (
        f"- At {share['flops']:g}: {gain:+.1f} points ({low:+.1f} to {high:+.1f}) over the best "
        f"published recipe, on held-out questions. {took}; {share['candidates']} recipes asked, "
        f"{share['refused']} refused before."
    )


def main() -> None:
    PAGE.write_text(
        page(PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text())), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
