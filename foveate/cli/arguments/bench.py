"""`foveate bench`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Device, Dtype, MaxPixels

HINT = "Answer with one word or number."

HELP = """Measure accuracy and savings of methods, on tasks whose evidence is known to the pixel.

Results go to OUT/results.parquet, with one row for each cell (a method at a budget on a task), and
to OUT/report.html, which needs no network. Run the same command again to continue an interrupted
run; finished cells are not repeated. Baselines (random, uniform, downsample) are always included.

[bold]Examples[/]

  foveate bench --model tiny --methods all --keep 0.5,0.25,0.125 --tasks all

  foveate bench --model tiny --methods fastv,divprune --keep 0.25 --tasks counting,words --samples
  200

  foveate bench --model llava-hf/llava-1.5-7b-hf --methods fastv --keep 0.25 --tasks coco --data DIR
  --device cuda --minutes 30

  foveate bench --config campaign.yaml --out runs/campaign

  foveate bench --speed --model random:llama-768x16 --methods pyramiddrop,fastv --keep 0.25
"""


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take defaults of options from a YAML file.

    Raises:
        InputError: it cannot be read, or has a key that is no option.
    """
    if path is not None:
        from foveate.cli.campaign_file import read_options

        known = {option.name for option in ctx.command.params} - {"config", "quality", None}
        ctx.default_map = read_options(path, known)
    return path


def bench(
    quality: Annotated[
        bool,
        typer.Option(
            "--quality/--speed",
            help="Measure accuracy or speed; see `foveate bench --speed --help`.",
        ),
    ] = True,
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, `tiny`, `small` or `small-video`.")
    ] = "tiny",
    methods: Annotated[str, typer.Option(help="`all`, or names: `fastv,divprune`.")] = "all",
    keep: Annotated[
        str,
        typer.Option(
            help="Shares of tokens that survive. If a method drops tokens repeatedly, this is "
            "the mean over the layers after its first drop."
        ),
    ] = "0.5,0.25,0.125",
    tasks: Annotated[str, typer.Option(help="`all`, or names.")] = "all",
    samples: Annotated[int, typer.Option(min=1, help="Samples per task.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first sample.")] = 0,
    split: Annotated[str, typer.Option(help="train, test or hidden.")] = "test",
    difficulty: Annotated[
        float, typer.Option(min=0, max=1, help="From 0, the easiest, to 1.")
    ] = 0.5,
    clutter: Annotated[
        float, typer.Option(min=0, max=1, help="Amount of other objects; 0 shows none.")
    ] = 0.5,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the data sets of coco and nlvr.")
    ] = None,
    max_pixels: MaxPixels = None,
    out: Annotated[Path, typer.Option(help="Folder for the results and the report.")] = Path(
        "bench-out"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Samples run together.")] = 16,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    minutes: Annotated[
        float | None, typer.Option(help="Start no cell after this time; run again to continue.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes; by default two for small models on a CPU, otherwise one."
        ),
    ] = None,
    hint: Annotated[
        str | None,
        typer.Option(
            help=f"Text added to each question; by default {HINT!r}, and nothing for tiny."
        ),
    ] = None,
    timing: Annotated[bool, typer.Option(help="Also time the first token.")] = True,
    table: Annotated[
        Path | None, typer.Option(help="Also save the table here: FILE.md, .csv or .json.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=read_config,
            help="YAML file of options, by name: `methods: [fastv, divprune]`. Options on the "
            "command line take precedence.",
        ),
    ] = None,
) -> None:
    """Measure methods on tasks with known evidence."""
    from foveate.bench.settings import Settings, chosen_methods
    from foveate.cli import bench as work
    from foveate.measure.checkpoints import EMBEDDED

    settings = Settings(
        model=model, methods=chosen_methods(methods), keeps=work.read_keeps(keep),
        tasks=work.read_tasks(tasks), samples=samples, seed=seed, split=work.read_split(split),
        difficulty=difficulty, clutter=clutter, data=None if data is None else str(data),
        batch=batch, device=device, dtype=dtype,
        hint=("" if model in EMBEDDED else HINT) if hint is None else hint, max_pixels=max_pixels,
    )  # fmt: skip
    work.check_minutes(minutes)
    work.check_data(settings, named=tasks != "all")
    work.measure(settings, out, workers=workers, minutes=minutes, timing=timing, table=table)
