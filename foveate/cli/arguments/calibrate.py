"""`foveate calibrate`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Device, Dtype, MaxPixels, Model

HELP = """Find settings of the method [bold]vflowopt[/] for a model, on your own prompts.

PROMPTS is a file with one JSON prompt per line: [bold]{"image": "cat.jpg", "question": "What is
this?"}[/], or `images` with a list. Image paths are relative to the file. Answers are not needed:
the search minimises the change in the last prompt token's final state. A few dozen prompts similar
to your real ones are enough.

Every trial is saved in a file next to the result, NAME.trials. You can interrupt the command; run
it again to continue. With more --trials it searches further.

[bold]Examples[/]

  foveate calibrate llava-hf/llava-1.5-7b-hf prompts.jsonl --average 0.25 --out strategy.json
  --device cuda

  foveate run llava-hf/llava-1.5-7b-hf cat.jpg "What is this?" --method strategy.json
"""


def calibrate(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="File of prompts, one JSON object per line.")],
    average: Annotated[
        float, typer.Option(help="Share of visual tokens that a layer sees on average, below 1.")
    ] = 0.25,
    trials: Annotated[int, typer.Option(min=1, help="Total number of trials.")] = 300,
    startup: Annotated[int, typer.Option(min=1, help="Initial trials, drawn at random.")] = 27,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 42,
    out: Annotated[Path, typer.Option(help="Where to save the method, as JSON.")] = Path(
        "vflowopt.json"
    ),
    max_pixels: MaxPixels = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Find VFlowOpt's settings."""
    from foveate.cli.calibrate import Calibration, calibrate

    job = Calibration(
        model, prompts, out, average, trials, startup, seed, max_pixels, device, dtype
    )
    calibrate(job)
