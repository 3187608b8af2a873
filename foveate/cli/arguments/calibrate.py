"""`foveate calibrate`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Device, Dtype, MaxPixels, Model

HELP = """Search the numbers of the method [bold]vflowopt[/] for a model, on prompts of your own.

PROMPTS is a file with one JSON prompt a line: [bold]{"image": "cat.jpg", "question": "What is
this?"}[/], or `images` with a list. Paths of images are relative to the file. Answers are not
needed: the search minimises how much the last prompt token's final state changes. A few dozen
prompts like those that you will ask are enough.

Every trial is saved in a file beside the result, NAME.trials. You can interrupt the command: called
again, it continues from there. With more --trials it searches further.

[bold]Examples[/]

  foveate calibrate llava-hf/llava-1.5-7b-hf prompts.jsonl --average 0.25 --out strategy.json
  --device cuda

  foveate run llava-hf/llava-1.5-7b-hf cat.jpg "What is this?" --method strategy.json
"""


def calibrate(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="File of prompts, one JSON object a line.")],
    average: Annotated[
        float, typer.Option(help="Share of visual tokens that a layer sees on average, below 1.")
    ] = 0.25,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all.")] = 300,
    startup: Annotated[int, typer.Option(min=1, help="Trials that are drawn at random.")] = 27,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 42,
    out: Annotated[Path, typer.Option(help="Where to save the method, as JSON.")] = Path(
        "vflowopt.json"
    ),
    max_pixels: MaxPixels = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Search VFlowOpt's numbers."""
    from foveate.cli.calibrate import Calibration, calibrate

    job = Calibration(
        model, prompts, out, average, trials, startup, seed, max_pixels, device, dtype
    )
    calibrate(job)
