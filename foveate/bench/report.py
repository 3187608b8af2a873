"""One HTML file that shows a run: no other file and no network is needed to read it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.bench import duels_page
from foveate.bench.levels import ALL, BASELINES
from foveate.bench.summary import MARGIN, Line, Summary
from foveate.bench.svg import halves, heat_map, pareto, percent
from foveate.io.html import Section, document, glossary, table
from foveate.io.writing import write_text

STAGES = {"baseline": "baseline", "vision": "in the encoder", "pre_llm": "before the LLM",
          "llm": "between LLM layers"}  # fmt: skip
TERMS = {
    "accuracy": "Share of questions that are answered correctly, with its 95 % interval (Wilson).",
    "against all tokens": "Difference in accuracy on the same questions, in points, with its 95 % "
    "interval: a plus means that the method did better than the model with all its tokens.",
    "agreement": "Share of questions to which the model gives the same answer as with all tokens, "
    "correct or not.",
    "KL": "Kullback-Leibler divergence of the distribution of the answer's first token from that "
    "with all tokens, in nats: 0 means that nothing changed.",
    "recall": "Evidence recall: of the area that one must see to answer, the share whose tokens "
    "survive, averaged over the decoder layers after the first cut.",
    "hit": "Share of pieces of evidence of which at least one token survives.",
    "tokens": "Visual tokens that a decoder layer sees, on average over all layers, of all.",
    "FLOPs": "Arithmetic of the prompt, vision tower and selection included, of all tokens'.",
    "KV cache": "Bytes of the key-value cache after the prompt, of all tokens'.",
    "TTFT": "Time to first token, measured, of that with all tokens.",
    "n": "Questions.",
    **duels_page.TERMS,
}
"""Terms of the report, as a tooltip and the last section explain them."""
NUMBERS = (
    "Over the informative tasks. In brackets 95 % intervals. Hover over or focus a heading for "
    "what it means; all terms are explained at the end."
)
TASKS = (
    "Accuracy in %. Greyed tasks are not informative: with all its tokens the model is not "
    f"{100 * MARGIN:.0f} points above the most common answer. Red: at least 10 points below all "
    "tokens."
)
MAPS = (
    "How long tokens live at each cell of the grid, averaged over images and over the decoder "
    "layers after a method's first cut: pale is dropped, full colour is twice the mean or more. "
    "Bars are rows; the dashed line is the method's mean."
)
PICK = """
const pick=document.getElementById('pick'),plot=document.querySelector('.plot');
pick.addEventListener('change',()=>{plot.classList.toggle('pick',!!pick.value);
plot.querySelectorAll('.series').forEach(s=>s.classList.toggle('on',s.dataset.name===pick.value))});
"""
"""Shows one method alone in the drawing."""
Shot = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a report says about the run itself.

    Args:
        model: its name.
        command: that made it.
        planned: cells that were asked for.
    """

    model: str
    command: str
    planned: int


def write(path: Path, summary: Summary, facts: Facts, shots: Sequence[Shot] = ()) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        summary: of the finished cells.
        facts: about the run.
        shots: example images, see `foveate.bench.examples`.
    """
    unpruned = summary.line((ALL, None))
    lines = [summary.line(config) for config in summary.configs if config[0] != ALL]
    lines = [line for line in lines if line.n]
    budgets = [*summary.keeps, None]
    sections = (
        Section("plot", "Accuracy and cost", "Accuracy against cost",
                _plot(summary, lines, unpruned)),
        Section("all", "All numbers", "All numbers",
                f'<p class="faint">{NUMBERS}</p>{_numbers(summary, lines, unpruned)}'),
        Section("duels", "Who beats whom", "Who really beats whom",
                duels_page.body(summary)),
        Section("tasks", "Tasks", "Task by task",
                f'<p class="faint">{TASKS}</p>{"".join(_by_task(summary, k) for k in budgets)}'),
        Section("maps", "Where tokens go", "Where tokens are dropped",
                f"<p>{MAPS}</p>{_scale()}{''.join(_maps(summary, k) for k in budgets)}"),
        Section("shots", "Examples", "Example images", _shots(shots)),
        Section("refused", "Not run", "What did not run, and what was slow", _troubles(summary)),
        Section("made", "How it was made", "How it was made",
                f"<pre>{escape(facts.command)}</pre>{_made(summary)}"),
        Section("terms", "Terms", "Terms", glossary(TERMS)),
    )  # fmt: skip
    headline = _headline(summary, facts, unpruned)
    text = document(f"FoveaBench: {facts.model}", headline, sections, PICK if lines else "")
    write_text(path, text)


def _headline(summary: Summary, facts: Facts, unpruned: Line) -> str:
    rest = facts.planned - len(summary.rows)
    left = f"; {rest} of {facts.planned} cells have not been run yet" if rest > 0 else ""
    return (
        f"{_counted(len(summary.rows), 'cell')}, {_counted(len(summary.tasks), 'task')}; with all "
        f"its visual tokens the model answers {percent(unpruned.accuracy)} % of "
        f"{_counted(unpruned.n, 'question')} correctly{left}."
    )


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _scale() -> str:
    """What the colours of the maps stand for."""
    return (
        '<p class="scale"><span>dropped immediately</span><i></i>'
        "<span>twice the mean of the method, or more</span></p>"
    )


def _key(kind: str, words: str) -> str:
    return f'<span><i style="background:var(--{kind})"></i>{words}</span>'


def _plot(summary: Summary, lines: Sequence[Line], unpruned: Line) -> str:
    """The drawing, what its colours mean, and what picks a method."""
    key = "".join(_key(kind, words) for kind, words in STAGES.items())
    names = "".join(f"<option>{escape(n)}</option>" for n in sorted({x.config[0] for x in lines}))
    front = summary.front([line for line in lines if line.flops is not None])
    drawn = pareto(lines, front, unpruned, summary.stages) if lines else ""
    return (
        f'<p>{_plot_note(summary)}</p><p class="key">{key}</p><p><label>Show <select id="pick">'
        f'<option value="">all methods</option>{names}</select></label></p>'
        f'<div class="wide">{drawn}</div>'
    )


def _plot_note(summary: Summary) -> str:
    silent = [task.name for task in summary.tasks if not task.telling]
    out = ""
    if silent and len(silent) == len(summary.tasks):
        out = (
            " No task is informative: with all its tokens, the model is not clearly better than "
            "the most common answer. All tasks are shown, but say little about the methods."
        )
    elif silent:
        out = f" Left out, because the unpruned model cannot do them: {', '.join(silent)}."
    return (
        "Each dot is a method at a budget; lines join the budgets of a method. The bold line is "
        "the front: over the tasks that are shown, nothing on the plot is both cheaper and more "
        f"accurate.{escape(out)}"
    )


def _numbers(summary: Summary, lines: Sequence[Line], unpruned: Line) -> str:
    head = ["method", "accuracy, %", "against all tokens", "agreement, %", "KL, nats", "recall, %",
            "hit, %", "tokens, %", "FLOPs, %", "KV cache, %", "TTFT, %", "n"]  # fmt: skip
    parts = []
    for keep in [*summary.keeps, None]:
        mine = sorted((x for x in lines if x.config[1] == keep), key=lambda x: -x.accuracy)
        if mine:
            title = "Budgets that methods choose themselves" if keep is None else f"keep = {keep:g}"
            rows = [_number_row(line) for line in [unpruned, *mine]]
            parts.append(f"<h3>{title}</h3>{table(head, rows, TERMS)}")
    return "".join(parts)


def _number_row(line: Line) -> str:
    low, high = line.interval
    pair = line.paired
    change = f"{100 * pair.difference:+.1f} ± {100 * pair.half_width:.1f}"
    tip = f"{pair.lost} lost, {pair.won} won, p = {pair.p:.2g}"
    nats = "-" if line.kl is None else f"{line.kl:.3f}"
    values = [
        f"{percent(line.accuracy)} ({percent(low)} to {percent(high)})",
        "" if line.config[0] == ALL else f'<span title="{tip}">{change}</span>',
        percent(line.agreement), nats, percent(line.recall), percent(line.hit),
        percent(line.tokens), percent(line.flops), percent(line.kv_bytes), percent(line.ttft),
        str(line.n),
    ]  # fmt: skip
    kind = ' class="base"' if line.config[0] in (ALL, *BASELINES) else ""
    name = "all tokens" if line.config[0] == ALL else escape(line.config[0])
    return f"<tr{kind}><td>{name}</td>{''.join(f'<td>{v}</td>' for v in values)}</tr>"


def _by_task(summary: Summary, keep: float | None) -> str:
    configs = [c for c in summary.configs if c[1] == keep and c[0] != ALL]
    if not configs:
        return ""
    configs.sort(key=lambda c: -summary.line(c).accuracy)
    head = ["method", *(t.name for t in summary.tasks)]
    mute = ["" if t.telling else ' class="mute"' for t in summary.tasks]
    rows = []
    facts = {
        "all tokens": [percent(t.accuracy) for t in summary.tasks],
        "commonest answer": [percent(t.majority) for t in summary.tasks],
        "questions": [str(t.n) for t in summary.tasks],
    }
    for name, values in facts.items():
        cells = "".join(f"<td{m}>{v}</td>" for m, v in zip(mute, values, strict=True))
        rows.append(f'<tr class="base"><td>{name}</td>{cells}</tr>')
    for config in configs:
        cells = "".join(_task_cell(summary, config, t) for t in summary.tasks)
        rows.append(f"<tr><td>{escape(config[0])}</td>{cells}</tr>")
    title = "Budgets that methods choose themselves" if keep is None else f"keep = {keep:g}"
    return f"<h3>{title}</h3>{table(head, rows, TERMS)}"


def _task_cell(summary: Summary, config: tuple[str, float | None], task: Any) -> str:
    row = summary.by_cell.get((*config, task.name))
    if row is None or row["status"] != "done":
        why = "not run" if row is None else row["error"]
        return f'<td class="mute" title="{escape(why)}">-</td>'
    line = summary.line(config, [task.name])
    kind = "mute" if not task.telling else "bad" if line.accuracy <= task.accuracy - 0.1 else ""
    tip = f"95 %: {percent(line.interval[0])} to {percent(line.interval[1])}"
    return f'<td class="{kind}" title="{tip}">{percent(line.accuracy)}</td>'


def _maps(summary: Summary, keep: float | None) -> str:
    figures = []
    for config in sorted(c for c in summary.configs if c[1] == keep and c[0] != ALL):
        found = summary.survival(config)
        if found is None:
            continue
        upper, lower = halves(*found)
        caption = f"upper half {percent(upper)} %, lower {percent(lower)} %"
        figures.append(
            f"<figure>{heat_map(*found)}<figcaption><b>{escape(config[0])}</b><br>{caption}"
            "</figcaption></figure>"
        )
    if not figures:
        return ""
    title = "Budgets that methods choose themselves" if keep is None else f"keep = {keep:g}"
    opened = " open" if keep == min(summary.keeps, default=None) else ""
    return (
        f"<details{opened}><summary><b>{title}</b></summary>"
        f'<div class="maps">{"".join(figures)}</div></details>'
    )


def _shots(shots: Sequence[Shot]) -> str:
    figures = []
    for shot in shots:
        mark = "correct" if shot["right"] else f"wrong; correct: {shot['answer']}"
        alt = f"Tokens that {shot['method']} kept for: {shot['question']}"
        figures.append(
            f'<figure><img src="{shot["image"]}" alt="{escape(alt)}"><figcaption>'
            f"<b>{escape(shot['method'])}</b>: “{escape(shot['question'])}”: "
            f"<b>{escape(shot['said'])}</b> ({escape(mark)})</figcaption></figure>"
        )
    return f'<div class="shots">{"".join(figures)}</div>' if figures else "<p>None were drawn.</p>"


def inline_image(image: Image.Image, width: int = 900) -> str:
    """An image as a data URI."""
    small = image.convert("RGB")
    if small.width > width:
        small = small.resize((width, round(small.height * width / small.width)))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _troubles(summary: Summary) -> str:
    rows = [
        f"<tr><td>{escape(method)}</td><td>{status}</td><td>{len(cells)}</td>"
        f'<td class="wrap">{escape(reason)}</td></tr>'
        for method, status, reason, cells in summary.troubles()
    ]
    found = (
        table(["method", "", "cells", "reason"], rows, TERMS) if rows else "<p>Everything ran.</p>"
    )
    slow = sorted(summary.done, key=lambda row: -row["seconds"])[:8]
    rows = [
        f"<tr><td>{escape(_config_name(row))}</td>"
        f"<td>{escape(row['task'])}</td><td>{row['seconds']:.1f}</td></tr>"
        for row in slow
    ]
    return f"{found}<h3>Slowest cells</h3>{table(['method', 'task', 'seconds'], rows, TERMS)}"


def _config_name(row: dict[str, Any]) -> str:
    keep = row["keep"]
    return row["method"] if keep is None else f"{row['method']} {keep:g}"


def _made(summary: Summary) -> str:
    if not summary.rows:
        return ""
    row = summary.rows[-1]
    versions = ", ".join(f"{name} {number}" for name, number in json.loads(row["versions"]).items())
    seconds = sum(r["seconds"] for r in summary.rows)
    notes = sorted({note for r in summary.done for note in r["notes"]})
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f"<p>{escape(versions)}. {escape(row['machine'])}. Weights {escape(row['fingerprint'])}. "
        f"{seconds / 60:.1f} minutes of cells, the last finished {escape(row['finished'])}. "
        f"{row['samples']} samples of each task from seed {row['seed']}, "
        f"split {escape(row['split'])}.</p><ul>{listed}</ul>"
    )


__all__ = ["Facts", "inline_image", "write"]
