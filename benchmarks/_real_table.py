"""The table of real models, in the form of the papers, and what was published beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BUDGETS = (192, 128, 64)
ALL, AVERAGE = "all tokens", "average"
METHODS = (
    "visionzip", "hiprune", "flowcut", "divprune", "cdpruner", "dart", "fastv", "random",
    "downsample",
)  # fmt: skip
LLAVA = "LLaVA-1.5-7B"


@dataclass(frozen=True)
class Task:
    """A benchmark of lmms-eval.

    Args:
        title: in tables.
        metric: what lmms-eval calls the score.
        total: documents that the score is a share of whatever was asked; 0 where it is a mean.
    """

    title: str
    metric: str
    total: int = 0


TASKS = {
    "pope": Task("POPE", "pope_accuracy"),
    "gqa": Task("GQA", "exact_match"),
    "textvqa_val": Task("TextVQA", "exact_match"),
    "docvqa_val": Task("DocVQA", "anls"),
    "ocrbench": Task("OCRBench", "ocrbench_accuracy", 1000),
}


@dataclass(frozen=True)
class Published:
    """What is published of a method at a budget: scores in percent, by task title."""

    method: str
    budget: int | None
    scores: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None
    source: str = ""


HIPRUNE = "a summary of arXiv:2508.00553"
VISIONZIP = "a summary of arXiv:2412.04467; average of 11 benchmarks"
FLOWCUT = "a summary of arXiv:2505.19536"
PUBLISHED: dict[str, tuple[Published, ...]] = {
    LLAVA: (
        Published(ALL, None, {"GQA": 61.9, "POPE": 85.9}, 100.0, HIPRUNE),
        Published("visionzip", 192, average=98.5, source=VISIONZIP),
        Published("hiprune", 192, {"GQA": 61.4, "POPE": 85.6}, 99.3, HIPRUNE),
        Published("visionzip", 128, average=97.6, source=VISIONZIP),
        Published("visionzip", 64, {"GQA": 55.1, "POPE": 77.0}, 94.0, VISIONZIP),
        Published("flowcut", 64, {"GQA": 55.6, "POPE": 80.2}, 96.0, FLOWCUT),
    ),
}
"""Of summaries, not of the papers' own tables, which could not be read. Nothing is at hand of
Qwen2.5-VL at these budgets."""
UNREAD = "Qwen2.5-VL"


def key(method: str, budget: int | None) -> str:
    """Name of a cell in the result file."""
    return method if budget is None else f"{method} at {budget}"


def family(model: str) -> str:
    """Whose published figures belong beside a model: by its hub id or folder name."""
    return LLAVA if "llava-1.5-7b" in model.lower() else model


def average(scores: Mapping[str, float], full: Mapping[str, float]) -> float | None:
    """Mean over tasks of the score as a percentage of the one with all tokens."""
    shares = [100 * scores[task] / full[task] for task in scores if full.get(task)]
    return sum(shares) / len(shares) if shares and len(shares) == len(full) else None


def section(results: list[Mapping[str, Any]]) -> str:
    """The section of docs/results-real.md.

    Args:
        results: files that `benchmarks/real.py` has kept; empty where nobody has run it.
    """
    parts = [
        "## Real models",
        "`make real MODEL=llava-hf/llava-1.5-7b-hf DATA=pope,gqa,textvqa_val,docvqa_val,ocrbench` "
        "measures your own model with lmms-eval, and its speed with `foveate bench --speed`, "
        f"at {', '.join(map(str, BUDGETS))} tokens per image. It needs a model hub or local "
        "folders; see [lmms-eval.md](lmms-eval.md#one-table-for-a-real-model).",
        "A budget is the number of tokens that a method's cut leaves. FastV and DART cut within "
        "the language model, whose first layers see all tokens; papers often give them fewer "
        "tokens, so that the mean over layers is the budget. *Average* is the mean over benchmarks "
        "of the score as a percentage of the score with all tokens. Published figures come from "
        "other subsets, harnesses and per-layer budgets, so they are shown next to the measured "
        "ones and do not replace them.",
    ]
    measured = {family(result["model"]): result for result in results}
    unread = () if any(UNREAD.lower() in name.lower() for name in measured) else (UNREAD,)
    for name in dict.fromkeys((LLAVA, *unread, *measured)):
        parts += [f"### {name}", *_of(name, measured.get(name))]
    return "\n\n".join(parts) + "\n"


def _of(name: str, result: Mapping[str, Any] | None) -> list[str]:
    tasks = list(TASKS) if result is None else list(result["tasks"])
    titles = [TASKS[task].title if task in TASKS else task for task in tasks]
    published = PUBLISHED.get(name, ())
    head = ["tokens", "", *titles, AVERAGE, "prefill", "published"]
    said = "**Nobody has run it yet.**"
    if result is not None:
        m, limit = result["machine"], result["limit"]
        asked = f"the first {limit} documents of each" if limit else "all documents"
        said = (
            f"`{result['model']}`, {asked}; {m.get('gpu', m['cpu'])}, torch {m['torch']}, "
            f"transformers {m['transformers']}."
        )
    lines = [head, ["---:", "---", *["---:"] * (len(titles) + 2), "---"]]
    for method, budget in _rows(result, published):
        lines.append([
            str(budget or "all"), method if budget is None else f"`{method}`",
            *_measured(result, tasks, method, budget), _beside(published, method, budget),
        ])  # fmt: skip
    notes = [] if published else [f"We have no published figures for {name} at these budgets."]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return [said, *notes, table]


def _rows(
    result: Mapping[str, Any] | None, published: tuple[Published, ...]
) -> list[tuple[str, int | None]]:
    """All tokens, then what was published or measured: budgets fall, methods as in `METHODS`."""
    cells = [] if result is None else [name.split(" at ") for name in result["cells"]]
    found = {(name, int(of[0])) for name, *of in cells if of}
    found |= {(one.method, one.budget) for one in published if one.budget}
    order = {method: number for number, method in enumerate(METHODS)}
    return [(ALL, None), *sorted(found, key=lambda row: (-row[1], order.get(row[0], 99), row[0]))]


def _measured(
    result: Mapping[str, Any] | None, tasks: list[str], method: str, budget: int | None
) -> list[str]:
    """Scores, their average, and the speed-up of the prefill; empty where there is none."""
    empty = [""] * (len(tasks) + 2)
    cell = None if result is None else result["cells"].get(key(method, budget))
    if result is None or cell is None:
        return empty
    if "error" in cell:
        return [cell["error"].replace("|", "/"), *empty[1:]]
    full = result["cells"].get(ALL, {}).get("scores", {})
    mean = average(cell["scores"], full)
    speed = result.get("speed", {}).get(str(budget), {}).get(method)
    return [
        *(f"{cell['scores'][task]:.1f}" for task in tasks),
        "" if mean is None else f"{mean:.1f} %",
        "" if speed is None else f"{speed['median']:.2f}x",
    ]


def _beside(published: tuple[Published, ...], method: str, budget: int | None) -> str:
    for one in published:
        if (one.method, one.budget) == (method, budget):
            scores = [f"{task} {score:.1f}" for task, score in one.scores.items()]
            mean = [] if one.average is None else [f"average {one.average:.1f} %"]
            return f"{', '.join([*scores, *mean])} ({one.source})"
    return ""
