"""`foveate tune`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Device, Dtype, MaxPixels, Model

HELP = """Find the methods, budgets, layers and schedules that suit a model and your questions.

DATA is a file with one JSON question per line: [bold]{"image": "cat.jpg", "question": "What is
this?", "answer": "cat"}[/], or `images` with a list. Image paths are relative to the file. Without
answers, recipes are judged by agreement with the unpruned model. A part of the questions is held
out, and asked once the recipe is chosen.

A target bounds a metric: [bold]accuracy>=-1[/] (points relative to all tokens),
[bold]agreement>=98[/] (per cent), [bold]kl<=0.1[/], and costs as shares of the unpruned model's:
[bold]flops<=0.25x[/], [bold]kv<=0.5x[/], [bold]ttft<=0.5x[/], [bold]latency<=0.7x[/]. With
--minimize, costs are minimised within the targets; otherwise the quality of answers is maximised.

The --out folder gets the recipe, foveate.json, which --method accepts, report.json, and a record of
everything that was asked. You can interrupt the command; run it again to continue.

[bold]Examples[/]

  foveate tune tiny questions.jsonl --target "flops<=0.25x"

  foveate tune llava-hf/llava-1.5-7b-hf questions.jsonl --target "accuracy>=-1" --minimize ttft
  --device cuda

  foveate run llava-hf/llava-1.5-7b-hf cat.jpg "What is this?" --method tuned/foveate.json
"""


def tune(
    model: Model,
    data: Annotated[Path, typer.Argument(help="File of questions, one JSON object per line.")],
    target: Annotated[
        list[str] | None, typer.Option(help="A bound such as accuracy>=-1; may be repeated.")
    ] = None,
    minimize: Annotated[
        list[str] | None, typer.Option(help="flops, kv, ttft or latency; may be repeated.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="What to optimise: accuracy, agreement, or state, as VFlowOpt does."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names separated by commas; by default all that work.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Recipes to try.")] = 96,
    timeout: Annotated[
        float | None, typer.Option(min=0.01, help="Minutes after which the search stops.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("tuned"),
    held_out: Annotated[
        float, typer.Option(help="Share of the questions held out for the end.")
    ] = 0.4,
    first: Annotated[int, typer.Option(min=1, help="Questions asked of every recipe.")] = 16,
    adaptive: Annotated[
        float | None,
        typer.Option(
            help="Also fit policy.json, a policy that chooses a recipe for each question, at this "
            "mean share of FLOPs."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 8,
    hint: Annotated[str, typer.Option(help="Text added to every question.")] = "",
    repeats: Annotated[
        int, typer.Option(min=3, help="Timed rounds per recipe, if times matter.")
    ] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Math threads on a CPU.")] = None,
    max_pixels: MaxPixels = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Find a recipe."""
    from foveate.cli.tune import search
    from foveate.tune.job import Options
    from foveate.tune.study import Plan

    options = Options(
        targets=tuple(target or ()),
        minimize=tuple(minimize or ()),
        objective=objective,
        methods=None
        if methods is None
        else tuple(filter(None, methods.replace(" ", "").split(","))),
        held_out=held_out,
        batch=batch,
        max_new_tokens=max_new_tokens,
        hint=hint,
        repeats=repeats,
        max_pixels=max_pixels,
        plan=Plan(trials, first=first, seed=seed),
        minutes=timeout,
        adaptive=adaptive,
    )
    search(model, data, out, options, (device, dtype), threads)
