"""`foveate bench --speed`: how fast methods make a model, by prompt length and batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.bench.speed import ALL, Bench, contenders
from foveate.bench.sweep import Prompts, Sweep, losses, run_sweep
from foveate.bench.workload import (
    TEXT,
    fit_images,
    random_model,
    random_prompt,
    repeat_rows,
)
from foveate.cli.console import progress, stdout
from foveate.cli.inputs import encode
from foveate.cli.interrupts import AGAIN, NOTHING, keeping
from foveate.cli.options import RANDOM
from foveate.core import Method
from foveate.core.from_text import make_method
from foveate.errors import InputError
from foveate.families import find_family
from foveate.io.quoting import quoted, shown
from foveate.io.writing import check_file
from foveate.loading import check_device, load_model, read_dtype
from foveate.measure.machine import warm_heap

QUESTION = "Describe everything that you see in the picture."


@dataclass(frozen=True)
class SpeedJob:
    """What the command line asks for.

    Args:
        model: hub id, folder, `tiny`, or `random:` and a size of `foveate.bench.workload`.
        methods: names, separated by commas.
        keep: what each of them keeps; `None` for each method's default.
        settings: `method.field=value`, beyond that.
        tokens: visual tokens of a prompt, separated by commas.
        batch: batch sizes, separated by commas.
        repeats: timed rounds of each cell.
        new_tokens: decoding steps.
        text: text tokens of a prompt; only of random models.
        minutes: time limit, or `None`.
        threads: math threads, or `None` for torch's choice.
        device: where the model runs.
        dtype: of its weights, or `auto`.
        json_path: file of the results, from which an interrupted run continues, or `None`.
    """

    model: str
    methods: str = "pyramiddrop,fastv"
    keep: str | None = None
    settings: tuple[str, ...] = ()
    tokens: str = "576"
    batch: str = "1,2,4,8"
    repeats: int = 20
    new_tokens: int = 16
    text: int = TEXT
    minutes: float | None = None
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    json_path: Path | None = None


def bench_speed(job: SpeedJob) -> dict[str, Any]:
    """Start anew with a warm heap if need be, measure, and print the tables.

    Returns:
        The result, as it is in the JSON file.

    Raises:
        FoveateError: something in the job cannot be served.
    """
    methods = read_methods(job.methods, job.keep, job.settings)
    check_file(job.json_path)
    sweep = Sweep(
        model=job.model,
        tokens=_numbers("--tokens", job.tokens),
        batches=_numbers("--batch", job.batch),
        repeats=job.repeats,
        warmup=3 if check_device(job.device).type == "cuda" else 1,
        minutes=job.minutes,
        labels={"text": job.text} if job.model.startswith(RANDOM) else None,
    )
    if job.device == "cpu":
        warm_heap(job.threads)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
    with progress(time_left=True) as steps:
        steps.say(f"loading {job.model}")
        model, prompts = _load(job)
        cpu_time = job.device == "cpu" and torch.get_num_threads() == 1
        bench = Bench(model, job.new_tokens, cpu_time=cpu_time)
        entrants = contenders(model, methods)
        work = sum(t * b for t, b in sweep.cells) * sweep.runs(len(entrants))
        steps.say("measuring", work)

        def say(what: str, amount: float) -> None:
            steps.name(what)
            steps.tick(amount)

        with keeping(lambda: _kept(job.json_path)):
            result = run_sweep(sweep, bench, entrants, prompts, job.json_path, say)
    show(result, stdout())
    return result


def _kept(path: Path | None) -> str:
    """What an interrupted sweep leaves."""
    if path is None:
        return f"{NOTHING}; with --json FILE, a run continues where it was interrupted"
    if not path.exists():
        return f"no cell was finished; {AGAIN}"
    return f"finished cells are saved in {shown(path, 120)}; {AGAIN}"


def read_methods(names: str, keep: str | None, settings: Sequence[str] = ()) -> list[Method]:
    """Methods from command-line text.

    Args:
        names: separated by commas.
        keep: for all of them, see `make_method`.
        settings: `method.field=value`.

    Raises:
        FoveateError: a name, field or value is not known.
    """
    slugs = [name.strip() for name in names.split(",") if name.strip()]
    if len(set(slugs)) < len(slugs) or not slugs:
        raise InputError(
            f"--methods takes different names separated by commas, got {quoted(names)}"
        )
    fields: dict[str, list[str]] = {slug: [] for slug in slugs}
    for setting in settings:
        slug, _, field = setting.partition(".")
        if slug not in fields or "=" not in field:
            raise InputError(
                f"--set takes method.field=value with one of {shown(', '.join(slugs), 90)}, got "
                f"{quoted(setting)}"
            )
        fields[slug].append(field)
    return [make_method(slug, keep, fields[slug]) for slug in slugs]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option} takes numbers separated by commas, got {quoted(text)}"
        ) from None


def _load(job: SpeedJob) -> tuple[Any, Prompts]:
    """The model, and what makes prompts for it."""
    if not job.model.startswith(RANDOM):
        model, processor = load_model(job.model, job.device, job.dtype)
        return model, processed_prompts(model, processor)
    device = check_device(job.device)
    dtype = read_dtype(job.dtype)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = random_model(job.model.removeprefix(RANDOM), device, dtype)
    return model, lambda tokens, batch: random_prompt(model, tokens, batch, job.text)


def processed_prompts(model: Any, processor: Any) -> Prompts:
    """Prompts of a model that was loaded: noise images through its processor, equal rows."""
    placeholder = find_family(model).placeholder_ids["image"]

    def made(side: int, number: int) -> Any:
        image = Image.effect_noise((side, side), 80).convert("RGB")
        return encode(processor, [image] * number, QUESTION, model)

    def count(side: int, number: int) -> int:
        return int((made(side, number)["input_ids"] == placeholder).sum())

    def prompts(tokens: int, batch: int) -> Mapping[str, Any]:
        return repeat_rows(dict(made(*fit_images(count, tokens))), batch)

    return prompts


# -- tables


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a table for each cell, then what was slower than with all tokens."""
    machine, settings = result["machine"], result["settings"]
    console.print(
        f"[bold]{escape(settings['model'])}[/] on {escape(machine.get('gpu', machine['cpu']))}, "
        f"{settings['dtype']}, {settings['attention']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {settings['time']}; heap {settings['heap']}",
        soft_wrap=True,
    )
    for cell in result["cells"]:
        _show_cell(cell, settings["new_tokens"], console)
    console.print(f"[dim]memory: {escape(settings['memory'])}[/]", soft_wrap=True)
    console.print(f"[dim]{escape(settings['rule'])}[/]", soft_wrap=True)
    lost = losses(result)
    for line in lost:
        console.print(f"[bold red]slower:[/] [red]{escape(line)}[/]", soft_wrap=True)
    if not lost:
        console.print("[green]no method was slower than all tokens in any cell[/]")


def _show_cell(cell: Mapping[str, Any], steps: int, console: Console) -> None:
    title = f"\n[bold]{cell.get('visual_tokens', cell['tokens']):,} visual tokens, "
    title += f"batch {cell['batch']}[/]"
    if "error" in cell:
        console.print(f"{title}: [red]{escape(cell['error'])}[/]")
        return
    console.print(f"{title}, {cell.get('cut') or str(cell['repeats']) + ' repeats'}")
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold cyan"
    )
    table.add_column("")
    answer = f"with {steps + 1}\ntokens"
    headings = ("TTFT", "prefill", "of\nFLOPs", "decode", answer, "peak\nMiB", "KV\nMiB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in cell["rows"].items():
        table.add_row(*_cells(name, row), style=_style(row))
    console.print(table)


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """All tokens in milliseconds and tokens per second; methods in speed-ups with quartiles."""
    sizes = [f"{row[key] / 2**20:,.1f}" for key in ("peak_bytes", "kv_bytes")]
    if name == ALL:
        rates = (row.get("decode_tokens_per_s"), row["tokens_per_s"])
        times = (row["ttft_ms"], row["prefill_ms"])
        ttft, prefill = (f"{value['median']:.1f} ms" for value in times)
        decode, total = (f"{rate['median']:.0f}/s" if rate else "" for rate in rates)
        return [name, ttft, prefill, "", decode, total, *sizes]
    speed = {key: _times(value) for key, value in row["speed_up"].items()}
    share = f"{row['prefill_of_predicted']:.2f}"
    decode = speed.get("decode", "")
    return [name, speed["ttft"], speed["prefill"], share, decode, speed["throughput"], *sizes]


def _times(spread: Mapping[str, float]) -> str:
    """A speed-up, and its quartiles below."""
    return f"{spread['median']:.2f}x\n{spread['q25']:.2f}-{spread['q75']:.2f}"


def _style(row: Mapping[str, Any]) -> str:
    if row.get("slower"):
        return "red"
    return "yellow" if row.get("perhaps_slower") else ""
