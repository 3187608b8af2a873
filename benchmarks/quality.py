"""Compact results of `foveate bench`, and docs/results.md and docs/results-real.md of them.

foveate bench --model tiny --methods all --keep 0.5,0.25,0.125 --samples 48 --no-timing --out OUT \
    --tasks attribute,existence,counting,position,relation,digits,small-object,large-image,\
multi-turn
python benchmarks/quality.py OUT/results.parquet   # writes results/quality.json and the page
python benchmarks/quality.py    # the pages only, with results of headline.py and the real_*.py

python -m recipes.easy_vqa --data DATA --out MODEL --steps 160
foveate bench --model MODEL --methods all --keep 0.25 --tasks easy-vqa --data DATA --out OUT \
    --samples 256 --hint ""
python benchmarks/quality.py --easy-vqa OUT/results.parquet

foveate bench --model small --methods METHODS --keep 0.25 --out OUT --samples 160 \
    --tasks words,multi-image,in-context,video-event,video-order
python benchmarks/quality.py --small OUT/results.parquet
foveate bench --model small-video --methods METHODS --keep 0.25 --out OUT --samples 160 \
    --tasks video-event,video-order
python benchmarks/quality.py --small-video OUT/results.parquet
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _findings
import _headline_table as headline
import _real_tower_page as tower
import _real_vlm_page as vlm
from _real_table import section

from foveate.bench.levels import ALL
from foveate.bench.store import Store
from foveate.bench.summary import Line
from foveate.bench.svg import halves, percent
from foveate.cli.bench import summarise

RESULT = Path(__file__).parent / "results" / "quality.json"
EASY, SMALL, FILMS, PLACES = (
    RESULT.with_name(f"{n}.json") for n in ("easy_vqa", "small", "small_video", "positions")
)
OTHERS = {"--easy-vqa": EASY, "--small": SMALL, "--small-video": FILMS}
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
REAL_PAGE = PAGE.with_name("results-real.md")
INTRO = """## How to read the tables

Made by `benchmarks/quality.py` from `benchmarks/results/`. Each method answers the same
questions as the model with all its tokens. `keep` is the share that survives a method's cut. If a
method cuts several times, its published schedule is rescaled so that the mean over the layers after
the first cut is `keep`. FEATHER, ToDRE, LVLM-CSP, CATP and VFlowOpt interpret `keep` as published.
Therefore compare at equal FLOPs too.

- *accuracy*: share of correct answers on informative tasks (those where the unpruned model is at
  least ten points above the most common answer), with its 95 % interval (Wilson).
- *change*: compared with all tokens on the same questions, with its 95 % interval.
- *KL*: divergence of the first word's distribution from the unpruned model's, in nats.
- *recall*: share of the evidence's area whose tokens survive, averaged over the decoder layers
  after the first cut. A merged token counts only at its own position, so merging methods and
  `downsample` score low here although the merged tokens are not lost.
- *upper, lower*: share of tokens that survive in the upper and lower half of the image.

The tiny model was trained to align visual tokens with words and its class token with objects. This
favours methods that read those. Its first layers hardly attend to the image, which penalises
methods that rank there. These results do not show which method is best on a large model.
"""

LESSONS = """## What they show

Read the figures with their intervals. Those of all methods come from {n} questions, so differences
of less than five points are noise there.

- With half of the tokens, most methods lose three to seven points. They differ at a quarter and
  below, where both content-agnostic baselines, `random` and `downsample`, are far behind.
- Evidence recall is not accuracy. At a quarter, methods that rank by the class token keep more than
  90 % of the evidence, yet answer no better than `divprune`, which keeps less than half of it but
  some of everything. `tome` and `pyramiddrop` have merged or read the tokens they drop.
- At an eighth, `vflowopt`, `scope`, `idpruner`, `fopru` and `hiprune` lose about ten points at 37 %
  to 38 % of the FLOPs. What is ahead of them leaves far more tokens to the first layers.
- `fastv` ranks in layers where this model does not attend to images yet. At a quarter it keeps
  almost four times as much of the lower half of an image as of the upper half, the bias that
  FEATHER describes. `feather` costs as many FLOPs and loses a third as much.
- `dart` and `lvlm-csp` fail here. They rank in layers that do not attend to the image yet, so their
  choice carries little information.
- These are the tasks that `tiny` can do. It was trained on drawn scenes, one image at a time, with
  numbers and not with words. The deeper `small` does words, several images, examples and videos;
  see below. Methods that learn parameters are not here, as they would be untrained:
  [training.md](training.md#what-learned-methods-gain) has their figures.
"""


REAL_INTRO = """# Accuracy on real parts

The models that come with foveate are small and were trained on drawn scenes. Here are pretrained
parts: a vision tower by itself, a model of such a tower and a language model, and a table that
waits for public checkpoints. [Accuracy](results.md) is about the small models.

"""


REAL = """## Real questions: easy-VQA

The drawn questions above are our own. easy-VQA has 5,000 images of one coloured shape and 48,248
questions, written by its author; always giving the most common answer scores
{majority} %. After 160 steps on the training split (`python -m recipes.easy_vqa`), the tiny model
scores {unpruned} % on {n} questions of the test split, so this task is informative. Each image
shows one large object, and most questions are about all of it. Nearly any choice of tokens is
therefore good enough, and such data hides differences between methods. `catp` and `vflowopt` had
other schedules when this was measured. NLVR's training split was not available, so no model was
trained for it.

"""


def real(easy: dict[str, Any]) -> str:
    """The section on easy-VQA."""
    (task,) = easy["tasks"]
    shares = {"unpruned": task["accuracy"], "majority": task["majority"]}
    told = REAL.format(**{k: percent(v) for k, v in shares.items()}, n=task["n"])
    return told + _lines(sorted(easy["lines"], key=lambda x: (x["method"] != ALL, -x["accuracy"])))


SEQUENCES = """## Words, several images, examples, and videos

`small`, the deeper of the two models that come with foveate, was grown from `tiny` and also reads
words, compares the images of a conversation, takes a rule from examples, and follows short videos.
In each column are right answers in per cent; *all* counts every question once, with its 95 %
interval, and *change* is to all tokens on the same questions. {machine}.

```bash
{command}
```
"""

FILMED = """The same model as a LLaVA-NeXT-Video (`small-video`), which is given a video as one
stream of 768 tokens or more, so that methods which compare frames can work:

```bash
{command}
```
"""


POSITIONED = """What decides here is the position that a survivor is given. Methods keep the
original ones or number survivors anew, each as published. Methods with either, right answers of
{asked} questions a task (`benchmarks/positions.py`):
"""

PLACED = """With original positions, `divprune`, `vtc-cls` and `scope` lose little at a quarter of
the tokens where images or frames are compared; numbered anew, they lose about half of their answers
or more where a rule is to be found. Of the methods in the tables above, `dart`, `fastv` and
`fastvid` keep original positions. So compare others there with `positions="original"`, and try both
on your model, if it is given several images or a video.
Two things favour original positions here: the model was trained with most tokens hidden and the
others where they were, and its short sequences never reach positions that it has not seen.
"""


COMPARING = """In the table of `small-video`, `evs` and `holitom` do worst, and both do there what
is published. A video has three frames, and `evs` keeps the first one whole, whatever the budget.
At keep = {keep:g} this frame is all that it keeps, and nothing that happens is left. `holitom`
merges what stands still into the first frame, and keeps of later frames what changes. Numbered
anew, these tokens no longer tell where and when they were. Right answers of `small-video` to
{asked} questions a task, with more tokens for `evs`, and with positions of either kind:
"""


def sequences(small: dict[str, Any], filmed: dict[str, Any], places: dict[str, Any]) -> str:
    """The section on several images and videos."""
    parts = []
    for about, result in ((SEQUENCES, small), (FILMED, filmed)):
        parts += [about.format(**result), _by_task(result)]
    parts += [POSITIONED.format(**places), _by_position(places), PLACED]
    films = places["films"]
    parts += [COMPARING.format(keep=places["keep"], **films), _by_position(films)]
    return "\n".join(parts)


def _by_position(result: dict[str, Any]) -> str:
    """Right answers on each task, with positions of either kind."""
    tasks = list(result["all"])
    rows = [["all tokens", "", "", *(str(n) for n in result["all"].values()), ""]]
    for row in result["rows"]:
        for way in ("renumbered", "original"):
            change = f"{100 * row['change']:+.1f} ± {100 * row['half_width']:.1f}"
            right = [str(row[way][task]) for task in tasks]
            last = change if way == "original" else ""
            rows.append([f"`{row['method']}`", f"{row['keep']:g}", way, *right, last])
    head = ["method", "keep", "positions", *tasks, "change by original positions, points"]
    return table(head, rows)


def _by_task(result: dict[str, Any]) -> str:
    """Each method's accuracy on each task, best first."""
    tasks = [task["name"] for task in result["tasks"]]
    right = {
        (c["method"], c["keep"], c["task"]): c["right"] / c["n"] for c in result["cells"]
    }  # fmt: skip
    rows = []
    for x in sorted(result["lines"], key=lambda x: (x["method"] != ALL, -x["accuracy"])):
        low, high = x["interval"]
        name = "all tokens" if x["method"] == ALL else f"`{x['method']}`"
        rows.append([
            name, "" if x["keep"] is None else f"{x['keep']:g}",
            *(percent(right.get((x["method"], x["keep"], task))) for task in tasks),
            f"{percent(x['accuracy'])} ({percent(low)} to {percent(high)})",
            f"{100 * x['change']:+.1f} ± {100 * x['half_width']:.1f}", percent(x["flops"]),
        ])  # fmt: skip
    common = [percent(task["majority"]) for task in result["tasks"]]
    rows.append(["*most common answer*", "", *common, "", "", ""])
    return table(["method", "keep", *tasks, "all", "change", "FLOPs"], rows)


def compact(path: str) -> dict[str, Any]:
    """What the page needs of a results file: the cells of its latest settings."""
    rows = Store(path).rows
    latest = rows[-1]
    same = [r for r in rows if r["command"] == latest["command"]]
    summary = summarise(same)
    lines = []
    for config in summary.configs:
        found = summary.survival(config)
        lines.append({**_line(summary.line(config)), "halves": found and halves(*found)})
    tasks = [vars(task) for task in summary.tasks]
    cells = [{k: r[k] for k in ("method", "keep", "task", "n", "right")} for r in summary.done]
    troubles = [[m, status, why, len(where)] for m, status, why, where in summary.troubles()]
    facts = {k: latest[k] for k in ("command", "versions", "machine", "finished", "fingerprint")}
    return {**facts, "lines": lines, "tasks": tasks, "cells": cells, "troubles": troubles}


def _line(line: Line) -> dict[str, Any]:
    fields = {k: v for k, v in vars(line).items() if k not in ("config", "paired")}
    pair = line.paired
    return {
        "method": line.config[0], "keep": line.config[1], **fields,
        "change": pair.difference, "half_width": pair.half_width,
    }  # fmt: skip


def page() -> str:
    """The page on the models that come with foveate, as Markdown."""
    result, easy, small, films, places = (
        json.loads(path.read_text()) for path in (RESULT, EASY, SMALL, FILMS, PLACES)
    )
    parts = ["# Accuracy\n", _findings.findings(places), INTRO]
    parts.append(headline.section(headline.load()))
    parts.append(f"## All methods\n\n`{result['command']}`; {result['machine']}.\n")
    keeps = sorted({x["keep"] for x in result["lines"] if x["keep"]}, reverse=True)
    for keep in [*keeps, None]:
        mine = [x for x in result["lines"] if x["keep"] == keep or x["method"] == ALL]
        mine.sort(key=lambda x: (x["method"] != ALL, -x["accuracy"]))
        parts += [f"### {'Own budgets' if keep is None else f'keep = {keep:g}'}\n", _lines(mine)]
    head = ["task", "questions", "all tokens", "most common answer", "informative"]
    rows = [
        [t["name"], str(t["n"]), percent(t["accuracy"]), percent(t["majority"]),
         "yes" if t["telling"] else "no"]
        for t in result["tasks"]
    ]  # fmt: skip
    refused = [
        [name, status, why.partition(". Methods that work")[0].replace("|", "/"), str(cells)]
        for name, status, why, cells in result["troubles"]
    ]
    parts += [
        LESSONS.format(n=max(x["n"] for x in result["lines"])),
        real(easy),
        sequences(small, films, places),
        "## Tasks\n",
        table(head, rows),
        "## Refused or failed\n",
        table(["method", "status", "reason", "cells"], refused),
    ]
    return "\n".join(parts)


def real_page() -> str:
    """The page on pretrained parts, as Markdown."""
    checkpoints = [json.loads(path.read_text()) for path in measured()]
    return REAL_INTRO + "\n".join(
        [tower.section(tower.load()), vlm.section(vlm.load()), section(checkpoints)]
    )


def measured() -> list[Path]:
    """What `real.py` has kept."""
    return sorted(set(RESULT.parent.glob("real_*.json")) - {tower.RESULT, vlm.RESULT})


def _lines(lines: list[dict[str, Any]]) -> str:
    head = ["method", "accuracy", "change", "agreement", "KL", "recall", "tokens", "FLOPs", "upper",
            "lower"]  # fmt: skip
    rows = []
    for x in lines:
        low, high = x["interval"]
        upper, lower = x["halves"] or (None, None)
        rows.append([
            "all tokens" if x["method"] == ALL else f"`{x['method']}`",
            f"{percent(x['accuracy'])} ({percent(low)} to {percent(high)})",
            f"{100 * x['change']:+.1f} ± {100 * x['half_width']:.1f}",
            percent(x["agreement"]), "-" if x["kl"] is None else f"{x['kl']:.3f}",
            percent(x["recall"]), percent(x["tokens"]), percent(x["flops"]),
            percent(upper), percent(lower),
        ])  # fmt: skip
    return table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    given = sys.argv[1:]
    if given:
        target = OTHERS.get(given[0], RESULT)
        target.write_text(json.dumps(compact(given[-1]), indent=1) + "\n")
    tower.FIGURE.write_text(tower.figure(tower.load()))
    for path, text in ((PAGE, page()), (REAL_PAGE, real_page())):
        path.write_text(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
