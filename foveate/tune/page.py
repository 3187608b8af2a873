"""The report of a search as one HTML page, from what `report.json` says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from foveate.io.html import Section, document, glossary, table
from foveate.io.plot import Plot, Point, front_line, names

TERMS = {
    "recipe": "Methods and their fields, in the order in which tokens meet them. Published: all "
    "fields but the budget are those of the paper.",
    "search": "Quality on the questions that the search chose by, with its 95 % interval. The best "
    "of many recipes looks better there than it is.",
    "held out": "Quality on questions that the search never saw, with its 95 % interval.",
    "change": "Points won or lost against all visual tokens on the same questions, with the 95 % "
    "interval of the difference.",
    "FLOPs": "Arithmetic of the prompt, vision tower and selection included, of all tokens'.",
    "KV cache": "Bytes of the key-value cache after the prompt, of all tokens'.",
    "TTFT": "Time to first token, measured, of that with all tokens.",
    "latency": "Time to the end of the answer, measured, of that with all tokens.",
    "KL": "Kullback-Leibler divergence of the distribution of the answer's first token from that "
    "with all tokens, in nats.",
    "asked": "Questions of the search that were put to a recipe. One that is behind is stopped "
    "before the last.",
    "front": "Recipes that no other beats in both quality and cost.",
}
"""Terms of the report, as a tooltip and the last section explain them."""
SPELLED = {"flops": "FLOPs", "kv": "KV cache", "ttft": "TTFT"}
PUBLISHED = " <i>(published)</i>"
Candidate = Mapping[str, Any]


def render(report: Mapping[str, Any]) -> str:
    """The page.

    Args:
        report: what `report.json` holds.
    """
    by_trial = {candidate["trial"]: candidate for candidate in report["candidates"]}
    front = [by_trial[trial] for trial in report["front"]]
    named = [by_trial[n] for n in (report["chosen"], report["best_published"]) if n is not None]
    shown = list({c["trial"]: c for c in [*front, *named]}.values())
    plan = report["options"].get("plan") or {}
    options = {k: v for k, v in {**report["options"], **plan}.items() if k != "plan"}
    sections = (
        Section("front", "Quality and cost", "Quality against cost",
                f'{_said(report)}<div class="wide">{_drawing(report, front)}</div>'),
        Section("numbers", "The best", "The front, the chosen recipe and the best published one",
                _best(report, shown)),
        Section("all", "All recipes", "Everything that was asked", _asked(report)),
        Section("refused", "Never asked", "What was never asked, and why", _refused(report)),
        Section("made", "How it was made", "How it was made",
                f"<h3>Options</h3>{_list(options)}<h3>Machine</h3>{_list(report['machine'])}"
                f"<p>{report['cpu_seconds'] / 60:.1f} CPU-minutes.</p>"),
        Section("terms", "Terms", "Terms", glossary(TERMS)),
    )  # fmt: skip
    return document(f"foveate tune: {report['model']}", _headline(report), sections)


def _list(facts: Mapping[str, Any]) -> str:
    """Facts that were given, as a table."""
    rows = [
        _row(escape(name.replace("_", " ")), [], more=_reason(_told(value)))
        for name, value in facts.items()
        if value not in (None, "", (), [])
    ]
    return table(["what", "value"], rows, TERMS)


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _headline(report: Mapping[str, Any]) -> str:
    refused = sum(count for count, _ in report["refused"])
    questions = report["questions"]
    late = "" if report["finished"] else " The time was up before all trials were run."
    return (
        f"{len(report['candidates'])} recipes were asked and {refused} refused before; "
        f"{questions['search']} questions to search with, {questions['held_out']} held out.{late}"
    )


def _said(report: Mapping[str, Any]) -> str:
    """What was wanted, what was chosen, and what that wins."""
    wanted = [*report["targets"], *(f"least {cost}" for cost in report["minimize"])]
    wanted = wanted or [f"best {report['quality']}"]
    by_trial = {candidate["trial"]: candidate for candidate in report["candidates"]}
    chosen, gain = report["chosen"], report["gain_over_published"]
    if chosen is None:
        found = "No recipe meets the targets on the questions of the search."
    else:
        found = f"Chosen: <b>{escape(by_trial[chosen]['recipe'])}</b>."
    if gain is not None and chosen != report["best_published"]:
        found += (
            f" {gain[0]:+.1f} points ({gain[1]:+.1f} to {gain[2]:+.1f}) over the best published "
            "recipe, on held-out questions."
        )
    if (policy := report.get("adaptive")) is not None:
        middle, low, high = policy["gain_over_fixed"]
        found += (
            f" A policy that chooses for each question: {middle:+.1f} points ({low:+.1f} to "
            f"{high:+.1f}) over {escape(policy['fixed'])}, the best recipe for all, on held-out "
            f"questions; {_percent(policy['flops'])} % of the FLOPs against "
            f"{_percent(policy['fixed_flops'])} %."
        )
    return (
        f"<p>Wanted: {escape(', '.join(wanted))}. {found}</p>"
        '<p class="faint">Dots are recipes that were asked every question of the search, with '
        "95 % intervals; pale ones were stopped before. The line is the front. Point at a dot for "
        "its recipe.</p>"
    )


# -- the drawing


def _drawing(report: Mapping[str, Any], front: Sequence[Candidate]) -> str:
    """Quality against the cost that matters most, as inline SVG."""
    asked = [c for c in report["candidates"] if c["search"] is not None]
    if not asked:
        return "<p>No recipe was asked.</p>"
    cost, whole = _axis(report), report["unpruned"]["search"]
    ends = [end for c in asked for end in c["search"]["interval"]]
    low, high = _tens(min([*ends, whole]), max([*ends, whole]))
    right = max([1e-3, *(c["search"]["costs"][cost] for c in asked), *_bounds(report, cost)]) * 1.05

    plot = Plot(
        (0.0, right), (low, high), f"{_spelled(cost)} of all tokens, %", f"{report['quality']}, %",
        f"{report['quality']} against {_spelled(cost)}; the tables below have the numbers",
    )  # fmt: skip
    points = {
        c["trial"]: plot.at(c["search"]["costs"][cost], c["search"]["quality"]) for c in asked
    }
    questions, chosen = report["questions"]["search"], report["chosen"]
    return plot.draw(
        plot.level(whole, "all tokens"),
        *(plot.bound(bound) for bound in _bounds(report, cost)),
        front_line([points[c["trial"]] for c in front]),
        *(
            _dot(c, points[c["trial"]], plot, questions, c["trial"] == chosen)
            for c in sorted(asked, key=lambda c: c["search"]["asked"])
        ),
        _names(report, points, front),
    )


def _axis(report: Mapping[str, Any]) -> str:
    """The cost that is drawn: what is made least, else what a target bounds."""
    known = next(c["search"]["costs"] for c in report["candidates"] if c["search"] is not None)
    bounded = (re.split("[<>]", target)[0] for target in report["targets"])
    return next((c for c in [*report["minimize"], *bounded] if c in known), "flops")


def _bounds(report: Mapping[str, Any], cost: str) -> list[float]:
    """Targets of a cost, as shares."""
    split = (target.partition("<=") for target in report["targets"])
    return [float(value.rstrip("x")) for name, _, value in split if name == cost]


def _tens(low: float, high: float) -> tuple[float, float]:
    """The whole tenths around a range."""
    return int(max(low, 0.0) * 10) / 10, min(-int(-high * 10 - 1) / 10, 1.0)


def _dot(c: Candidate, point: Point, plot: Plot, whole: int, chosen: bool) -> str:
    """A recipe, with the interval of its quality where it was asked everything."""
    score, (x, y) = c["search"], point
    low, high = (plot.at(0, end)[1] for end in score["interval"])
    said = f"{c['recipe']}: {_range(score)} % on {score['asked']} questions"
    done = score["asked"] == whole
    bar = f'<path d="M{x} {low}V{high}"/>' if done else ""
    kind = "chosen" if chosen else "pre_llm" if done else "stopped"
    return (
        f'<g class="series {kind}">{bar}<circle cx="{x}" cy="{y}" r="{5 if chosen else 4}">'
        f"<title>{escape(said)}</title></circle></g>"
    )


def _names(
    report: Mapping[str, Any], points: Mapping[int, Point], front: Sequence[Candidate]
) -> str:
    """Labels of the chosen recipe, the best published one and the front, where there is room."""
    texts = {report["best_published"]: "best published", report["chosen"]: "chosen"}
    texts.pop(None, None)
    for c in front:
        texts.setdefault(c["trial"], " + ".join(m["method"] for m in c["methods"]))
    others = [point for trial, point in points.items() if trial not in texts]
    labelled = [points[trial] for trial in texts]
    return names([*labelled, *others], list(texts.values()), len(texts))


# -- the tables


def _best(report: Mapping[str, Any], shown: Sequence[Candidate]) -> str:
    costs = _costs(shown)
    head = ["recipe", "search, %", "change, points", "held out, %", "change, points",
            *(f"{_spelled(cost)}, %" for cost in costs)]  # fmt: skip
    whole = report["unpruned"]
    cells = [_percent(whole.get("search")), "", _percent(whole.get("held_out")), ""]
    rows = [_row("all tokens", [*cells, *("100.0" for _ in costs)], "base")]
    for c in shown:
        mark = PUBLISHED if c["published"] else ""
        name = f"{escape(c['recipe'])}{mark}"
        name = f"<b>{name}</b>" if c["trial"] == report["chosen"] else name
        cells = [part for score in (c["search"], c["held_out"]) for part in _scored(score)]
        rows.append(_row(name, [*cells, *(_percent(c["search"]["costs"][k]) for k in costs)]))
    return table(head, rows, TERMS)


def _asked(report: Mapping[str, Any]) -> str:
    candidates = [c for c in report["candidates"] if c["search"] is not None]
    costs = _costs(candidates)
    head = ["recipe", "asked", "search, %", "change, points", *(f"{_spelled(c)}, %" for c in costs),
            "KL, nats", "why it was left"]  # fmt: skip
    rows = []
    for c in sorted(candidates, key=lambda c: (-c["search"]["asked"], -c["search"]["quality"])):
        score = c["search"]
        numbers = [_percent(score["costs"][k]) for k in costs]
        cells = [str(score["asked"]), *_scored(score), *numbers, f"{score['kl']:.3f}"]
        mark = PUBLISHED if c["published"] else ""
        why = f'<td class="wrap">{escape(c["why_out"])}</td>'
        rows.append(_row(f"{escape(c['recipe'])}{mark}", cells, more=why))
    return table(head, rows, TERMS)


def _refused(report: Mapping[str, Any]) -> str:
    parts: list[str] = []
    if report["refused"]:
        rows = [_row(str(count), [], more=_reason(why)) for count, why in report["refused"]]
        parts.append(f"<h3>Proposals</h3>{table(['how many', 'why'], rows, TERMS)}")
    if report["left_out"]:
        rows = [_row(escape(m), [], more=_reason(why)) for m, why in report["left_out"].items()]
        parts.append(f"<h3>Methods</h3>{table(['method', 'why'], rows, TERMS)}")
    return "".join(parts) or "<p>Nothing was left out.</p>"


def _reason(why: str) -> str:
    return f'<td class="wrap">{escape(why)}</td>'


def _spelled(cost: str) -> str:
    return SPELLED.get(cost, cost)


def _costs(candidates: Iterable[Candidate]) -> list[str]:
    """What was measured of the cost of all recipes."""
    known = [c["search"]["costs"] for c in candidates]
    return [cost for cost in known[0] if all(cost in costs for costs in known)] if known else []


def _row(name: str, cells: Sequence[str], kind: str = "", more: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<tr{mark}><td>{name}</td>{''.join(f'<td>{c}</td>' for c in cells)}{more}</tr>"


def _scored(score: Mapping[str, Any] | None) -> tuple[str, str]:
    """A share with its interval, and the change in points with its half width."""
    if score is None:
        return "-", "-"
    low, high = score["change_interval"]
    return _range(score), f"{score['change']:+.1f} ± {(high - low) / 2:.1f}"


def _range(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{_percent(score['quality'])} ({_percent(low)} to {_percent(high)})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
