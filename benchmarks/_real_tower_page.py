"""The section of docs/results-real.md on a real tower, and its figure, from the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import fill as wrapped
from typing import Any

from _labelled import Point, scatter
from _tower_probe_page import embedded
from _tower_tables import KEEPS, name, points, share, sure, table

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "real_tower.json"
FIGURE = ROOT / "docs" / "real-tower.svg"
SHOWN = 0.25
BASELINES = ("uniform", "random", "downsample")
COLOURS = {"a baseline": "#555555", "inside the tower": "#009e73",
           "merges": "#0072b2", "only drops": "#d55e00"}  # fmt: skip
DROP = "cls-drop"

ABOUT = """## A real tower: what survives

Each method chooses among the 196 patches of a pretrained CLIP ViT-B/16 on {photographs} COCO
photographs (CC BY, CC BY-SA, or no known restrictions), whose panoptic masks say which pixels show
which of {objects} objects; {small} are small, below 32 x 32 pixels of the 224 x 224 that the tower
sees. `python scripts/real_parts.py`
fetches the tower and `benchmarks/real_tower.py` measures. The weights come from an int8 file with
one scale for each output channel. Their licence is an open question, so they are measured locally
and not redistributed. {where}

- *area*: share of the objects' area in cells at which a survivor stands, averaged over photographs.
  *small*: the same of small objects.
- *lost*: share of all objects of which no cell survives. *small lost*: the same of small objects.
- *sources*: area and lost objects if a merged token also counts with every cell that went into it.
- Brackets hold 95 % intervals from resampling photographs. `random` is the mean of {seeds} seeds
  for each photograph.

Methods after the encoder see the features of the last layer but one as they are, without a
projector. Only their first step is measured; what `todre` and `vflowopt` do in the language model
is not. `cls-drop, layer k` drops once, within layer k. `zero-tprune` and `token-transforming`
make three equal cuts at their published layers, and `tome` merges equal shares of the tokens where
equal numbers would be over half of a layer. `pixelprune` has no budget: one threshold for all
photographs is set so that they keep it on average. `llava-prumerge` keeps at most the budget, and
so does `downsample`: 90, 49, 20 and 12 tokens.

Every registered method is measured. The exceptions, and what each of them does:

{left_out}
"""


def at(result: Mapping[str, Any], keep: float) -> list[dict[str, Any]]:
    """The rows of a budget, those with most area first."""
    rows = [row for row in result["survival"] if row["keep"] == keep]
    return sorted(rows, key=lambda row: -row["own"]["area"]["mean"])


def survival(result: Mapping[str, Any]) -> str:
    """Everything at one budget; `cls-drop` has a table of its own."""
    head = ["method", "tokens", "area", "small", "lost", "small lost", "sources: area",
            "sources: lost"]  # fmt: skip
    rows = []
    for row in at(result, SHOWN):
        if row["method"].startswith(DROP):
            continue
        own, sources = row["own"], row["sources"]
        rows.append([
            name(row["method"]), f"{row['tokens']:.0f}",
            *(share(own[key]) for key in ("area", "small", "lost", "small lost")),
            *(f"{100 * sources[k]['mean']:.1f}" if merges(row) else "" for k in ("area", "lost")),
        ])  # fmt: skip
    return table(head, rows)


def merges(row: Mapping[str, Any]) -> bool:
    """Whether survivors have sources at other cells."""
    return bool(row["own"]["area"]["mean"] != row["sources"]["area"]["mean"])


def layers(result: Mapping[str, Any]) -> str:
    """`cls-drop` within each layer at one budget, and the area at the others."""
    rows = {(r["method"], r["keep"]): r["own"] for r in result["survival"]}
    cells = []
    for layer in range(12):
        of = f"{DROP}, layer {layer}"
        shown = rows[of, SHOWN]
        other = [rows[of, keep] for keep in KEEPS if keep != SHOWN]
        cells.append([
            str(layer), *(share(shown[key]) for key in ("area", "small", "lost")),
            *(f"{100 * r['area']['mean']:.0f} / {100 * r['lost']['mean']:.1f}" for r in other),
        ])  # fmt: skip
    others = [f"area / lost, {keep:g}" for keep in KEEPS if keep != SHOWN]
    return table(["layer", "area", "small", "lost", *others], cells)


def pairs(result: Mapping[str, Any]) -> str:
    """Differences to the baselines on the same photographs, at one budget."""
    wanted = [(key, base) for key in ("area", "lost") for base in BASELINES]
    cells = [
        [name(row["method"]), *(points(row[f"over {base}"][key]) for key, base in wanted)]
        for row in at(result, SHOWN)
        if not row["method"].startswith(DROP) and row["method"] not in BASELINES
    ]
    return table(["method", *(f"{key}, over `{base}`" for key, base in wanted)], cells)


def budgets(result: Mapping[str, Any]) -> str:
    """Area and lost objects of each method at each budget."""
    rows = {(row["method"], row["keep"]): row for row in result["survival"]}

    def cell(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return ""
        area, lost = (100 * row["own"][key]["mean"] for key in ("area", "lost"))
        return f"{area:.0f} / {lost:.1f}{'*' if sure(row['over uniform']['lost']) else ''}"

    cells = [
        [name(row["method"]), *(cell(rows.get((row["method"], keep))) for keep in KEEPS)]
        for row in at(result, SHOWN)
        if not row["method"].startswith(DROP)
    ]
    return table(["method", *(f"keep {keep:g}" for keep in KEEPS)], cells)


def reasons(result: Mapping[str, Any]) -> str:
    """What is not measured, and why."""
    lines = [
        f"- {', '.join(name(slug) for slug in slugs)}: {why}"
        for why, slugs in result["left out"].items()
    ]
    return "\n".join(
        wrapped(line, 100, subsequent_indent="  ", break_on_hyphens=False) for line in lines
    )


def kind(row: Mapping[str, Any]) -> str:
    """What a point of the figure is."""
    if row["method"] in BASELINES:
        return "a baseline"
    if row["inside"]:
        return "inside the tower"
    return "merges" if merges(row) else "only drops"


def figure(result: Mapping[str, Any]) -> str:
    """Objects of which something survives over their area that survives, as an SVG."""
    rows = at(result, SHOWN)
    points = [
        Point(row["method"].replace(", layer", ""), 100 * row["own"]["area"]["mean"],
              100 * (1 - row["own"]["lost"]["mean"]), COLOURS[kind(row)])
        for row in rows
    ]  # fmt: skip
    across = int(min(p.x for p in points)) - 1, int(max(p.x for p in points)) + 4
    upward = int(min(p.y for p in points)) - 3, 101
    lost = next(row["own"]["lost"] for row in rows if row["method"] == "vtc-cls")
    interval = 100 * (1 - lost["high"]), 100 * (1 - lost["low"])
    caption = (
        f"area of objects kept, in per cent, at keep = {SHOWN}; upwards: objects of which "
        "something is kept, in per cent"
    )
    legend = [(colour, kind) for kind, colour in COLOURS.items()]
    return scatter(points, across, upward, 100, interval, legend, caption)


def section(result: Mapping[str, Any]) -> str:
    """The section."""
    m = result["machine"]
    where = f"{m['cpu']}, torch {m['torch']}, transformers {m['transformers']}."
    parts = [
        ABOUT.format(where=where, left_out=reasons(result), **result["sizes"]),
        f"At keep = {SHOWN}:\n", survival(result),
        "![Objects of which something survives over their area that survives](real-tower.svg)\n",
        f"Differences to the baselines on the same photographs, in points, at keep = {SHOWN}:\n",
        pairs(result),
        f"`{DROP}` by the layer in which it drops, at keep = {SHOWN}, and area / lost at the other "
        "budgets:\n", layers(result),
        "Area / lost objects, in per cent, at each budget; a star where the share of lost objects "
        "differs\nfrom that of `uniform` by more than chance (its paired interval leaves out 0):"
        "\n", budgets(result), lessons(result), *embedded(result),
    ]  # fmt: skip
    return "\n".join(parts)


def lessons(result: Mapping[str, Any]) -> str:
    """What it teaches, with figures from the result."""
    rows = {(row["method"], row["keep"]): row for row in result["survival"]}

    def mean(method: str, key: str, keep: float = SHOWN) -> str:
        return f"{100 * rows[method, keep]['own'][key]['mean']:.0f} %"

    def more(method: str, key: str, keep: float = SHOWN) -> str:
        of = rows[method, keep]["over uniform"][key]
        mean, low, high = (100 * of[k] for k in ("mean", "low", "high"))
        return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"

    return LESSONS.format(mean=_Asked(mean), more=_Asked(more))


class _Asked:
    """Lets a template ask for a figure: `{more[fastervlm lost 0.25]}`; `_` is a layer's number."""

    def __init__(self, ask: Callable[[str, str, float], str]) -> None:
        self.ask = ask

    def __getitem__(self, words: str) -> str:
        method, key, keep = words.split()
        return self.ask(method.replace("_", ", layer "), key, float(keep))


LESSONS = """### What it teaches

- **The class token looks at objects.** At a quarter, `fastervlm` keeps
  {mean[fastervlm area 0.25]} of the objects' area and a regular grid {mean[uniform area 0.25]}:
  {more[fastervlm area 0.25]}. Of small objects it keeps {mean[fastervlm small 0.25]} against
  {mean[uniform small 0.25]}.
- **It loses objects no more often than a grid, until few tokens are left.** At a quarter the
  difference is {more[fastervlm lost 0.25]}. At a sixteenth it is {more[fastervlm lost 0.0625]} for
  `fastervlm` and {more[vtc-cls lost 0.0625]} for `vtc-cls`. Area and lost objects are different
  questions: a method can spend its tokens on what is large and leave nothing for the rest.
- **Attention together with diversity loses the fewest.** At a quarter `vispruner` loses
  {mean[vispruner lost 0.25]} of the objects, {more[vispruner lost 0.25]} against the grid, and
  still keeps {mean[vispruner area 0.25]} of their area. `idpruner` ({mean[idpruner lost 0.25]}),
  `scope` and `divprune` ({mean[divprune lost 0.25]} each) follow, and `scope` keeps the most area
  of these four. At an eighth `divprune` loses the fewest of those after the encoder, and
  `vispruner` no longer stands out.
- **Merging in every layer spreads best when few tokens are left.** At an eighth and a sixteenth
  `tome` loses the fewest objects of all methods: against the grid, {more[tome lost 0.125]} and
  {more[tome lost 0.0625]}. At a sixteenth, `gtp-vit` keeps the most of small objects,
  {mean[gtp-vit small 0.0625]}, and `pixelprune`, which goes by pixels alone, loses
  {mean[pixelprune lost 0.0625]} of all.
- **The layer matters as much as the method.** `cls-drop` within layers 2 to 4 or 9 and 10 keeps
  about as much as `fastervlm`, which ranks by the same row of layer 10. Within layers 5 and 6 it
  loses far more objects; against the grid, {more[cls-drop_5 lost 0.25]} and
  {more[cls-drop_6 lost 0.25]}. At an eighth and below, layers 2 to 4 keep the most area of all
  rows. The default, layer 1, is not among the good ones. What an early drop costs the layers after
  it is another question, which the embeddings below answer.
- **Attention among patches is the weaker guide.** `hiprune`, `fopru` and `vflowopt` rank by what
  patches receive; they keep {mean[fopru area 0.25]} to {mean[vflowopt area 0.25]} of the area and
  lose {mean[fopru lost 0.25]} of the objects.
- **Sources say little.** Methods that merge let nearly every cell go into some survivor, so in that
  sense nothing is lost. Whether the merged token still tells of a small object is not measured.

Where it is weak: there are few photographs, so most intervals of *lost* overlap, and with so many
rows some differences are chance. This is one tower with 14 x 14 patches and rounded weights;
LLaVA-1.5 has 24 x 24. Cropping to a square cuts objects at the edges, and objects with fewer than
64 visible pixels are not counted. Each feature has seen the whole image, so a dropped cell may live
on in its neighbours. No question is answered here.
"""


def load() -> dict[str, Any]:
    """The committed result."""
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found
