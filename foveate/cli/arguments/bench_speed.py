"""`foveate bench --speed`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import RANDOM, Device, Dtype

SIZES = ("llava-7b", "llava-next-7b", "qwen3-vl-4b", "llama-768x16")
"""Models with random weights, see `foveate.bench.workload`."""

HELP = f"""Measure how much methods speed up a model: TTFT with the vision tower, prefill, decoding,
peak memory and KV cache, by prompt length and batch size. Methods slower than all tokens are shown
in red.

MODEL is a hub id, a folder, [bold]tiny[/], or one of these sizes with random weights:
{", ".join(RANDOM + name for name in SIZES)}.

[bold]Example[/]

  foveate bench --speed --model random:llama-768x16 --methods pyramiddrop,fastv --keep 0.25 --set
  pyramiddrop.keep=0.5,0.25,0.125 --tokens 576,2880 --batch 1,2,4 --json speed.json
"""


def speed(
    model: Annotated[str, typer.Option(help="See above.")] = RANDOM + "llama-256x8",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-m",
            help="Names that `foveate list` shows, separated by commas or repeated; by default "
            "pyramiddrop,fastv.",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Budget of all methods, as in `foveate run`. If a method drops tokens several "
            "times, one number sets the mean over the layers after its first drop."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="`method.field=value`; may be repeated.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Visual tokens per prompt: `576,2880`.")] = "576",
    batch: Annotated[str, typer.Option(help="Batch sizes: `1,2,4,8`.")] = "1,2,4,8",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds per cell.")] = 20,
    new_tokens: Annotated[int, typer.Option(min=0, help="Decoding steps.")] = 16,
    minutes: Annotated[
        float | None, typer.Option(help="Time limit in minutes; fewer rounds are run to meet it.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Torch threads; with 1, CPU seconds are measured.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Save results here after every cell; an interrupted run resumes from it."
        ),
    ] = None,
) -> None:
    """Measure how fast methods make a model, see `HELP`."""
    from foveate.cli.bench_speed import SpeedJob, bench_speed

    bench_speed(
        SpeedJob(
            model=model,
            methods=",".join(methods) if methods else SpeedJob.methods,
            keep=keep,
            settings=tuple(setting or ()),
            tokens=tokens,
            batch=batch,
            repeats=repeats,
            new_tokens=new_tokens,
            minutes=minutes,
            threads=threads,
            device=device,
            dtype=dtype,
            json_path=json_path,
        )
    )
