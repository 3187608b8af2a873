"""`foveate batch`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Device, Dtype, Keep, KeepTotal, MaxPixels, RayAddress, Settings
from foveate.errors import InputError

HELP = """Answer tables of questions about images, and write the answers as Parquet.

INPUT is a .jsonl or .parquet file, or a folder of such files. A row has a question and an image or
a list of images: paths (relative to INPUT's folder), data URLs, bytes, mappings with [bold]bytes[/]
or [bold]path[/], or addresses of hosts named by --allow-host. OUTPUT is a folder with a Parquet
file for each input file; a single long file is split into shards of --shard-rows. Columns are
copied, and [bold]answer[/], [bold]error[/], [bold]visual_tokens_before[/],
[bold]visual_tokens_after[/] and [bold]new_tokens[/] are added. A row that cannot be answered gives
the reason in [bold]error[/], and the other rows are still answered.

Run the same command again to continue an interrupted run; finished shards are skipped. Decoding is
greedy.

[bold]Examples[/]

  foveate batch questions.jsonl answers --model tiny --method pyramiddrop

  foveate batch questions.jsonl answers --model tiny --method pyramiddrop --dry-run

  foveate batch table.parquet answers --model llava-hf/llava-1.5-7b-hf --method fastv --keep 0.25
  --question-column prompt --device cuda --batch 32

  foveate batch shards/ answers --model llava-hf/llava-1.5-7b-hf --method divprune --keep 0.25
  --device cuda --workers 8 --gpus-per-worker 1 --ray-address auto
"""


def batch(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="File or folder of questions.")],
    output: Annotated[Path, typer.Argument(help="Folder of answers.")],
    model: Annotated[str, typer.Option(help="Hub id, local folder, `tiny` or `small`.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="As in `foveate run`; by default all tokens are kept."),
    ] = None,
    keep: Keep = None,
    keep_total: KeepTotal = None,
    setting: Settings = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of images; by default `images` or `image`.")
    ] = None,
    question_column: Annotated[str, typer.Option(help="Column of questions.")] = "question",
    drop: Annotated[
        list[str] | None,
        typer.Option(help="A column that is not copied; may be repeated."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Prefix for the names of the new columns.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    size: Annotated[int, typer.Option("--batch", min=1, help="Rows answered together.")] = 8,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Split input files into shards of this many rows; by default a single file is "
            "split every 1000 rows, and files of a folder are not split.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Worker processes under Ray, each with a model; by default none."),
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0, help="GPUs per worker; a fraction shares one.")
    ] = 0,
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="CPUs per worker.")] = 1,
    ray_address: RayAddress = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A host from which images may be fetched; may be repeated."),
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Rerun shards that contain errors.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the input, print the work to do, and stop.")
    ] = False,
    max_pixels: MaxPixels = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Answer many questions, see `HELP`."""
    if not method and (keep or setting):
        raise InputError("--keep and --set need a --method")
    if workers is None and (gpus_per_worker or ray_address):
        raise InputError("--gpus-per-worker and --ray-address need --workers")
    from foveate.batch.cluster import Cluster
    from foveate.batch.job import Job
    from foveate.cli.batch import run
    from foveate.cli.inputs import limit_of
    from foveate.core.from_text import make_saved
    from foveate.core.saving import Saved

    saved = make_saved(method, keep or (), setting or ()) if method else Saved(())
    job = Job(
        source.absolute(), output.absolute(),
        str(Path(model).absolute()) if Path(model).is_dir() else model, saved.methods,
        images=image_column, question=question_column, drop=tuple(drop or ()), prefix=prefix,
        max_new_tokens=max_new_tokens, batch=size, shard_rows=shard_rows, max_pixels=max_pixels,
        hosts=frozenset(allow_host or ()), device=device, dtype=dtype, retry_errors=retry_errors,
        keep_total=limit_of(saved, keep_total),
    )  # fmt: skip
    cluster = None
    if workers is not None:
        cluster = Cluster(workers, gpus_per_worker, cpus_per_worker, ray_address)
    run(job, cluster, dry=dry_run)
