"""Example images of a report, and times to first token: what needs the model once more."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from foveate.bench.judge import is_right
from foveate.bench.levels import ALL, method_at
from foveate.bench.prompt import prompts
from foveate.bench.report import inline_image
from foveate.bench.runner import Runner
from foveate.bench.summary import Summary
from foveate.errors import FoveateError
from foveate.measure.timing import interleave
from foveate.run import use

TIMED = 5


@torch.inference_mode()
def draw(runner: Runner, summary: Summary, keep: float, tasks: int = 3) -> list[dict[str, Any]]:
    """What some methods kept of the first image of some tasks, and what was answered.

    Args:
        runner: on a loaded model.
        summary: says which tasks are informative, and which methods are best.
        keep: budget.
        tasks: how many tasks.
    """
    names = [task.name for task in summary.tasks if task.telling] or [
        task.name for task in summary.tasks
    ]
    at_keep = [c for c in summary.configs if c[1] == keep and c[0] not in ("random", "fastv", ALL)]
    best = sorted(at_keep, key=lambda c: -summary.line(c).accuracy)[:1]
    methods = ["random", *(["fastv"] if ("fastv", keep) in summary.configs else [])]
    methods += [name for name, _ in best]
    shots = []
    for task in names[:tasks]:
        for name in methods:
            try:
                shots.append(_shot(runner, task, name, keep))
            except FoveateError:
                continue  # refused: the table of cells says why
    return shots


def _shot(runner: Runner, task: str, name: str, keep: float) -> dict[str, Any]:
    sample = runner.samples(task)[0]
    prompt = prompts(sample, runner.prompter.videos)[0]
    inputs = runner.prompter.first([prompt]).to(runner.model.device)
    with use(runner.model, method_at(name, keep, runner.family)) as run:
        out = runner.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = runner.prompter.decode(out[:, inputs["input_ids"].shape[1] :])[0]
    turn = prompt.asked
    strip = run.show([shown.pixels for shown in prompt.images])[0]
    return {
        "method": f"{name} {keep:g}", "question": turn.question, "said": said,
        "answer": turn.answer, "right": is_right(said, turn.answer, turn.choices),
        "image": inline_image(strip),
    }  # fmt: skip


@torch.inference_mode()
def time_first_tokens(
    runner: Runner, task: str, configs: list[tuple[str, float | None]], repeats: int = TIMED
) -> dict[tuple[str, float | None], tuple[float, float]]:
    """Median milliseconds to the first token with a method and with all tokens, runs taking turns;
    one question, vision tower and selection included.
    """
    prompt = prompts(runner.samples(task)[0], runner.prompter.videos)[0]
    inputs = runner.prompter.first([prompt]).to(runner.model.device)
    model, found = runner.model, {}
    for name in dict.fromkeys(name for name, _ in configs):
        mine = [config for config in configs if config[0] == name and name != ALL]
        settings: dict[str, Any] = {ALL: nullcontext}
        for config in mine:
            method = method_at(*config, runner.family)
            settings[str(config)] = lambda method=method: use(model, method)
        if not mine:
            continue
        times = interleave(
            lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False),
            settings, repeats=repeats, warmup=1, device=model.device,
        )  # fmt: skip
        for config in mine:
            found[config] = times[str(config)].median_ms, times[ALL].median_ms
    return found
