"""What docs/results.md says first: each question, what was found, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import _headline_table as headline
import _real_tower_page as tower
import _real_vlm_page as vlm

from foveate.bench.levels import ALL

KEEP = 0.25
NAMED = 4
"""Methods named of each table."""
Result = Mapping[str, Any]

HEAD = """What was found, at a quarter of the tokens; figures of answers are per cent right.

| question | found | measured on |
| --- | --- | --- |
"""
REST = """
No public checkpoint has been measured yet. `make real` does it in
[one command](results-real.md#real-models).
"""


def findings(places: Result) -> str:
    """The table, and what nobody has measured.

    Args:
        places: the result of `positions.py`.
    """
    rows = [_tiny(headline.load()), _real(vlm.load()), _tower(tower.load()), _places(places)]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows) + REST


def _tiny(result: Result) -> tuple[str, str, str]:
    lines = {x["method"]: x for x in result["lines"] if x["keep"] in (None, KEEP)}
    return (
        "Which methods answer best?",
        _best({name: x["accuracy"] for name, x in lines.items()}),
        f"[`tiny`](#who-really-beats-whom), {lines[ALL]['n']:,} drawn questions",
    )


def _real(result: Result) -> tuple[str, str, str]:
    answers, ending = result["answers"], f" @ {KEEP:g}"
    counted = vlm.telling(answers)
    real, tiny = (vlm.merged(answers[who], counted) for who in ("real", "tiny"))
    cells = [cell for cell in real if cell.endswith(ending) and cell in tiny]
    value, low, high = vlm.correlation(real, tiny, cells)
    right = {c.removesuffix(ending): vlm.accuracy(real[c]) for c in (ALL, *cells)}
    return (
        "Does their order hold on pretrained parts?",
        f"In part: the rank correlation is {value:.2f} ({low:.2f} to {high:.2f}). {_best(right)}",
        "[CLIP ViT-B/16 and SmolLM2-135M](results-real.md#a-vlm-of-real-parts), "
        f"{len(real[ALL])} drawn questions",
    )


def _tower(result: Result) -> tuple[str, str, str]:
    rows = {r["method"]: r["own"] for r in result["survival"] if r["keep"] == KEEP}
    most = max(rows, key=lambda name: rows[name]["area"]["mean"])
    fewest = min(rows, key=lambda name: rows[name]["lost"]["mean"])

    def told(name: str) -> str:
        area, lost = (100 * rows[name][key]["mean"] for key in ("area", "lost"))
        return f"`{name}` keeps {area:.0f} % of the objects' area, and loses {lost:.0f} % of them"

    return (
        "What survives in a photograph?",
        "; ".join(told(name) for name in dict.fromkeys((most, fewest, "uniform"))),
        "[CLIP ViT-B/16](results-real.md#a-real-tower-what-survives), "
        f"{result['sizes']['photographs']} photographs of COCO",
    )


def _places(result: Result) -> tuple[str, str, str]:
    row = next(row for row in result["rows"] if row["method"] == "divprune")
    asked = result["asked"] * len(result["all"])
    new, old, whole = (
        100 * sum(right.values()) / asked
        for right in (row["renumbered"], row["original"], result["all"])
    )
    return (
        "Does it matter how survivors are numbered?",
        f"Yes, where images or frames are compared: `divprune` {new:.0f} numbered anew, {old:.0f} "
        f"with original positions, of {whole:.0f} with all tokens",
        f"[`small`](#words-several-images-examples-and-videos), {asked} drawn questions",
    )


def _best(right: Mapping[str, float]) -> str:
    ahead = sorted(right.keys() - {ALL}, key=lambda name: -right[name])[:NAMED]
    named = ", ".join(f"`{name}` {100 * right[name]:.0f}" for name in ahead)
    return (
        f"{named}, of {100 * right[ALL]:.0f} with all tokens; `random` {100 * right['random']:.0f}"
    )
