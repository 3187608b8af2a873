"""The section of docs/results-real.md on a VLM of real parts, from the committed result."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _real_tower_page import table

from foveate.bench.stats import Paired, wilson

RESULT = Path(__file__).resolve().parent / "results" / "real_vlm.json"
EARLY = RESULT.with_stem("early_vlm")  # of the same model, when it had been trained less
ALL, BLANK, BASELINE, EASY = "none", "none, of a grey image", "random", "easy-vqa"
RESAMPLES, LEAST = 2000, 0.1
APART = ("counting", "existence")  # their answers name nothing that is seen
PLACES, UNMOVED = "position", ", original positions"
Rows = dict[str, str]
"""Method at a budget -> a 1 for each right answer and a 0 for each wrong one."""

ABOUT = """## A VLM of real parts

A pretrained CLIP ViT-B/16 and SmolLM2-135M-Instruct, with a projector between them: a LLaVA of
221 M parameters, 196 visual tokens an image. `python scripts/real_parts.py vlm` fetches and
assembles it. `recipes.real_vlm` trained the projector and low-rank changes of the language model
on drawn scenes and on easy-VQA's train part: {steps} steps of two images with up to 24 questions
each, in {minutes} CPU minutes, after the projector alone had learnt to say what each patch of a
scene shows. What changed is in `recipes/real_vlm.safetensors`; the tower is frozen, and
not redistributed (see above). `benchmarks/real_vlm.py` asks held-out questions of
FoveaBench about scenes of 96 pixels with two to six objects (difficulty and clutter 0), the same of
the tiny model, and easy-VQA's test part. *grey* is the same model's accuracy when a grey image is
shown: what the questions alone give away. Methods with one cut after the projector choose from one
encoding; those that cut elsewhere ran by themselves. Brackets hold 95 % intervals (Wilson), and so
do differences to `random` on the same questions. `tome` cannot reach an eighth of the tiny model's
tokens. {where}
"""


LESSONS = """**It sees.** With all tokens, the model of real parts is 33 to 97 points above a grey
image on every drawn task. It answers 92 % of the questions, and the tiny model 89 %; it is better
at digits, and perhaps worse at positions.

**Methods rank much as they did after less training.** So the order is one of methods on these
parts, and hardly one of how long they were trained.

**Part of the order carries over.** At a quarter, `random`, `downsample`, `fastv`, `lvlm-csp` and
`llava-prumerge` are among the last eight on both models. At an eighth, `random`, `downsample`,
`fastv` and `lvlm-csp` are, and `holitom-inner`, `prunesid` and `scope` are among the first ten. The
correlations are low, and they depend on which tasks count, so do not quote one of them alone.

**What the tiny model does not tell.** At a quarter, twenty-four methods lie within five points on
it. Here they lie far apart. `vflowopt`, `dart` and `pyramiddrop` are 21 to 26 points above
`random`, and `fastervlm`, `vtc-cls`, `cls-drop`, `hiprune` and `fopru`, which go by attention in
the encoder, 18 to 19. `divprune` and `tome`, the best of the tiny model, are at `random` and 6
points above it; `fastv`, `feather` and `todre` are below it. `dart` ranks in an early layer, which
on the tiny model does not look at images. `vtc-cls` and `fastervlm` also keep the largest area of
objects in the photographs above. At an eighth, `dart`, `cdpruner` and `cls-drop` come after
`holitom-inner`, 16 to 25 points above `random`; `fastv`, `feather` and `todre`, which the tiny
model puts above `random`, are again below it.

**A quarter is too little here.** Only `holitom-inner` loses nothing that these questions can show.
The others lose 15 points or more of what all tokens give, where the best of the tiny model lose 3:
patches of a tower that was not made for drawn scenes say less about their neighbours.

**Costs differ.** Methods that cut between layers run some of them on all tokens; `holitom-inner`,
which loses the least, keeps 69 % of the tokens of the tiny model in the mean over layers.

**Places and digits are lost first.** With a quarter of the tokens, `fastervlm` still names 92 % of
small objects and 34 % of positions. Part of that is renumbering: with original positions `vtc-cls`
and `hiprune` are right in half of the cases, 17 ± 13 and 19 ± 14 points more. The tiny model does
not show it.

**easy-VQA tells little.** One large shape survives most choices, and a grey image is already right
on three of five questions.

Where it is weak: the projector was taught to name what drawn scenes show, and the tower was not
made for them. With 64 questions of a task, neighbours in a table do not differ.
"""


def merged(tasks: Mapping[str, Rows], names: Sequence[str]) -> Rows:
    """Some tasks one after the other; what was asked of all of them."""
    rows = [tasks[name] for name in names]
    common = [method for method in rows[0] if all(method in row for row in rows)]
    return {method: "".join(row[method] for row in rows) for method in common}


def telling(answers: Mapping[str, Any]) -> list[str]:
    """Drawn tasks that the model of real parts can do: ten points above a grey image or more."""
    real = answers["real"]
    return [
        name for name in answers["tiny"]
        if accuracy(real[name][ALL]) >= accuracy(real[name][BLANK]) + LEAST
    ]  # fmt: skip


def accuracy(row: str) -> float:
    """Share of right answers."""
    return row.count("1") / max(len(row), 1)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, ties sharing their mean."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) - 1) / 2 for v in values]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; 0 where one of the two has no order."""
    x, y = ranks(a), ranks(b)
    middle = (len(x) - 1) / 2
    over = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    under = sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y)
    return over / under**0.5 if under else 0.0


def correlation(one: Rows, other: Rows, names: Sequence[str]) -> tuple[float, float, float]:
    """Rank correlation of two models' accuracies, and its 95 % interval over questions.

    Both were asked the same questions, which are resampled together.
    """
    asked, rng = len(one[names[0]]), random.Random(0)

    def at(picked: Sequence[int]) -> float:
        means = [[sum(rows[n][q] == "1" for q in picked) for n in names] for rows in (one, other)]
        return spearman(*means)

    drawn = sorted(at(rng.choices(range(asked), k=asked)) for _ in range(RESAMPLES))
    low, high = (drawn[round(share * (RESAMPLES - 1))] for share in (0.025, 0.975))
    return at(range(asked)), low, high


def cell(row: str) -> str:
    """Accuracy in per cent, and its interval."""
    low, high = wilson(row.count("1"), len(row))
    return f"{100 * accuracy(row):.1f} ({100 * low:.0f} to {100 * high:.0f})"


def over(row: str, control: str) -> str:
    """Difference to a control on the same questions, in points, and half of its interval."""
    pair = Paired.of([c == "1" for c in control], [c == "1" for c in row])
    return f"{100 * pair.difference:+.1f} ± {100 * pair.half_width:.1f}"


def tasks_table(answers: Mapping[str, Any]) -> str:
    """What each model can do at all."""
    rows = []
    for name, real in answers["real"].items():
        tiny = answers["tiny"].get(name)
        rows.append([
            name, str(len(real[ALL])), cell(real[ALL]), cell(real[BLANK]),
            *((cell(tiny[ALL]), cell(tiny[BLANK])) if tiny else ("", "")),
            "yes" if name in telling(answers) else "" if not tiny else "no",
        ])  # fmt: skip
    head = ["task", "questions", "real parts", "real parts, grey", "tiny", "tiny, grey",
            "counts below"]  # fmt: skip
    return table(head, rows)


def methods_table(answers: Mapping[str, Any], keep: float) -> str:
    """Methods at one budget."""
    real, tiny = (merged(answers[who], telling(answers)) for who in ("real", "tiny"))
    easy = answers["real"].get(EASY)
    names = [n for n in real if n.endswith(f" @ {keep:g}")]
    names.sort(key=lambda n: -accuracy(real[n]))
    control = f"{BASELINE} @ {keep:g}"
    rows = [
        [f"`{n.partition(' @ ')[0]}`", cell(real[n]), over(real[n], real[control]),
         cell(easy[n]) if easy else "",
         *((cell(tiny[n]), over(tiny[n], tiny[control])) if n in tiny else ("", ""))]
        for n in names
    ]  # fmt: skip
    head = ["method", "real parts", "over `random`", "easy-VQA, real parts", "tiny",
            "over `random`, tiny"]  # fmt: skip
    return table(head, rows)


def places_table(answers: Mapping[str, Any]) -> str:
    """The task about places, with and without renumbering."""
    rows = []
    for name in answers["real"].get(PLACES, {}):
        before, moved, after = name.partition(UNMOVED)
        if moved:
            pair = [answers[who][PLACES] for who in ("real", "tiny")]
            rows.append([
                f"`{before}`{after.replace(' @ ', ' at ')}",
                *(cell(row) for one in pair for row in (one[before + after], one[name])),
            ])  # fmt: skip
    head = ["method", "real parts, renumbered", "real parts, original positions",
            "tiny, renumbered", "tiny, original positions"]  # fmt: skip
    return table(head, rows)


def correlations(answers: Mapping[str, Any], keeps: Sequence[float]) -> str:
    """How alike the two models rank methods, on all tasks that count and on those that name."""
    counted = telling(answers)
    chosen = {"all of them": counted, "all but": [name for name in counted if name not in APART]}
    rows = []
    for said, names in chosen.items():
        real, tiny = (merged(answers[who], names) for who in ("real", "tiny"))
        cells = []
        for keep in keeps:
            methods = [n for n in real if n.endswith(f" @ {keep:g}") and n in tiny]
            value, low, high = correlation(real, tiny, methods)
            cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
        left_out = [name for name in counted if name not in names]
        rows.append([" ".join([said, " and ".join(left_out)]).strip(), *cells])
    about = (
        "Spearman's rank correlation of the two models over the methods, and its 95 % interval "
        "from resampling questions:\n\n"
    )
    return about + table(["tasks", *(f"keep = {keep:g}" for keep in keeps)], rows)


def over_training(result: Mapping[str, Any], early: Mapping[str, Any]) -> str:
    """How alike the model ranked methods when it had been trained less."""
    counted = telling(result["answers"])
    now, then = (merged(each["answers"]["real"], counted) for each in (result, early))
    cells = []
    for keep in result["keeps"]:
        methods = [n for n in now if n.endswith(f" @ {keep:g}") and n in then]
        value, low, high = correlation(now, then, methods)
        cells.append(f"{value:.2f} ({low:.2f} to {high:.2f}) at keep = {keep:g}")
    both = " and\n".join(cells)
    return (
        f"After {early['training']['steps']} steps of training the model of real parts answered "
        f"{cell(then[ALL])} with\nall tokens. The rank correlation of its methods then and now is "
        f"{both}.\n"
    )


def section(result: Mapping[str, Any]) -> str:
    """Markdown of the section."""
    answers = result["answers"]
    machine, told = result["machine"], result["training"]
    about = ABOUT.format(
        steps=told["steps"], minutes=round(told["cpu_s"] / 60),
        where=f"{machine['cpu']}, {machine['dtype']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}.",
    )  # fmt: skip
    parts = [about, tasks_table(answers)]
    real, tiny = (merged(answers[who], telling(answers)) for who in ("real", "tiny"))
    for keep in result["keeps"]:
        whole = f"(all tokens: real parts {cell(real[ALL])}, tiny {cell(tiny[ALL])})"
        parts += [f"At keep = {keep:g}, all counted tasks {whole}:\n", methods_table(answers, keep)]
    parts += ["Where an object is, at two ways to number the survivors:\n", places_table(answers)]
    parts.append(correlations(answers, result["keeps"]))
    parts.append(over_training(result, load(EARLY)))
    return "\n".join([*parts, LESSONS])


def load(path: Path = RESULT) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
