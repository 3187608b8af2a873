"""The figures of docs/tune.md on policies, from benchmarks/results/adaptive.json.

python benchmarks/adaptive_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "adaptive.json"
PAGE = Path(__file__).parents[1] / "docs" / "tune.md"
BEGIN, END = "<!-- adaptive: begin -->\n", "<!-- adaptive: end -->"
HEAD = ("at most", "who answers", "right", "over the fixed recipe", "FLOPs")


def page(old: str, result: dict[str, Any]) -> str:
    """The page with its figures made anew."""
    before, rest = old.split(BEGIN)
    return before + BEGIN + figures(result) + END + rest.split(END)[1]


def figures(result: dict[str, Any]) -> str:
    """A table, and what it comes to."""
    rows = [HEAD, ("---:", "---", *["---:"] * 3)]
    for share in result["shares"]:
        rows += _rows(share)
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    listed = ", ".join(f"`{r['recipe']}` {r['flops']:.3f}" for r in result["recipes"][:-1])
    about = (
        f"{result['questions']} questions in {result['folds']} folds. Recipes on the front of all "
        f"of them, with their FLOPs: {listed}; and all tokens. Asking took "
        f"{result['cpu_seconds'] / 60:.1f} CPU-minutes, one thread; the machine was shared with "
        f"other work. {result['machine']['cpu']}."
    )
    said = "\n".join(map(_verdict, result["shares"]))
    return f"{about}\n\n{table}\n{said}\n\n"


def _rows(share: dict[str, Any]) -> list[tuple[str, ...]]:
    names = " or ".join(f"`{name}`" for name in dict.fromkeys(share["fixed"]))
    who = {
        "fixed": f"fixed: {names}",
        "policy": "policy",
        "no_words": "policy that sees no words",
    }
    rows = []
    for name, what in who.items():
        gain = share["gains"].get(f"{name} over fixed")
        right = f"{100 * share['right'][name]:.1f} %"
        flops = f"{share['flops'][name]:.4f}"
        rows.append((f"{share['share']:g}", what, right, _points(gain) if gain else "", flops))
    return rows


def _verdict(share: dict[str, Any]) -> str:
    """Whether a policy gains, by its interval."""
    gain = share["gains"]["policy over fixed"]
    wins = "the policy wins" if gain[1] > 0 else "no gain that is more than chance:"
    return (
        f"- At {share['share']:g}: {wins} {_points(gain)} points over the best fixed recipe; "
        f"{_points(share['gains']['policy over mixed'])} over two recipes that are given to "
        "questions by chance, at the FLOPs that the policy took."
    )


def _points(gain: list[float]) -> str:
    mean, low, high = gain
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    PAGE.write_text(
        page(PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text())), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
