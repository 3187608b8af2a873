"""The second half of `foveate demo`: what a method saves at real size, counted and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape

from foveate.cli.flops import Answer, Question, count
from foveate.cli.listing import plain_table
from foveate.core import Method
from foveate.errors import FoveateError
from foveate.measure.checkpoints import checkpoints
from foveate.measure.conventions import get_convention
from foveate.run import use

MODELS = ("llava-hf/llava-1.5-7b-hf", "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3.5-27B")
SIZE, TOKENS, TEXT = "llama-768x16", 576, 64
SECONDS, ROUNDS = 10.0, 5
"""Longest time of the measurement, and most rounds of it."""


@dataclass(frozen=True)
class Measured:
    """Times of a prefill.

    Args:
        seconds: medians, with all tokens and with the methods.
        rounds: how often each was timed.
        flops: of the language model, with all tokens and with the methods.
    """

    seconds: tuple[float, float]
    rounds: int
    flops: tuple[int, int]


def count_sizes(methods: Sequence[Method]) -> dict[str, Answer | FoveateError]:
    """Costs on well-known models, from their bundled configs; or why there are none."""
    found: dict[str, Answer | FoveateError] = {}
    for model in MODELS:
        question = Question(
            model, tuple(methods), get_convention("foveate"), images=1, size=(672, 672),
            text_tokens=TEXT, decode=False,
        )  # fmt: skip
        try:
            found[model] = count(question)
        except FoveateError as error:
            found[model] = error
    return found


def measure_prefill(methods: Sequence[Method], tick: Callable[[], object]) -> Measured:
    """Time the prefill of a random model, runs taking turns, for about `SECONDS`.

    Args:
        methods: in stream order.
        tick: called after every run.

    Raises:
        FoveateError: a method does not work on it.
    """
    import torch

    from foveate.bench.workload import random_model, random_prompt

    model = random_model(SIZE, "cpu", torch.float32)
    inputs = random_prompt(model, TOKENS, 1, TEXT)
    with torch.inference_mode():
        with use(model, methods) as run:  # the warm-up
            prefill(model, inputs)
        tick()
        flops = run.report()["flops"]
        vision = flops["vision"] or 0
        times = _rounds(model, inputs, methods, tick)
    return Measured(
        (median(times[0]), median(times[1])),
        len(times[0]),
        (flops["before"] - vision, flops["after"] - vision),
    )


def prefill(model: Any, inputs: Any) -> None:
    """One forward over a prompt."""
    model(**inputs, use_cache=True, logits_to_keep=1)


def _rounds(
    model: Any, inputs: Any, methods: Sequence[Method], tick: Callable[[], object]
) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while len(times[0]) < ROUNDS:
        sessions: list[AbstractContextManager[Any]] = [nullcontext(), use(model, methods)]
        for kept, session in zip(times, sessions, strict=True):
            start = time.perf_counter()
            with session:
                prefill(model, inputs)
            kept.append(time.perf_counter() - start)
            tick()
        if time.perf_counter() - began + times[0][-1] + times[1][-1] > SECONDS:
            break
    return times


def show_sizes(counted: dict[str, Answer | FoveateError], console: Console) -> None:
    """Print the counted costs, with what they mean."""
    console.print("\n[bold cyan]At real size[/], counted from configs: one image, 64 text tokens")
    table = plain_table("model", "visual tokens", "TFLOPs", "KV cache, MiB", "speed-up")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for name, answer in counted.items():
        called = escape(checkpoints()[name].name)
        if isinstance(answer, FoveateError):
            table.add_row(called, "-", "does not work", "-", "-")
            continue
        old, new = answer.before.total, answer.after.total
        held = answer.kv_bytes
        table.add_row(
            called,
            str(sum(image.total for image in answer.record.images)),
            f"{old / 1e12:.1f} to {new / 1e12:.1f}",
            f"{held[0] / 2**20:.0f} to {held[1] / 2**20:.0f}",
            f"{old / new:.2f}x",
        )
    console.print(table)
    for line in (
        "TFLOPs: the arithmetic of the prompt, including vision tower and selection.",
        "KV cache: memory that a request holds until its last token, in 16 bit.",
        "speed-up: of the time to first token, as FLOPs predict it where compute is the limit.",
    ):
        console.print(f"[dim]{line}[/]")


def show_measured(measured: Measured, console: Console) -> None:
    """Print the measured prefill beside what its FLOPs predict."""
    plain, fast = measured.seconds
    old, new = measured.flops
    console.print(
        f"\n[bold cyan]Measured here[/]: a random Llama 768 x 16, {TOKENS} visual tokens, "
        f"median of {measured.rounds}"
    )
    console.print(
        f"prefill [bold]{plain:.2f} s[/] with all tokens, [bold]{fast:.2f} s[/] with fewer: "
        f"[bold]{plain / fast:.2f}x[/]; FLOPs predict {old / new:.2f}x"
    )
    console.print("[dim]prefill: what a request waits for before its first token.[/]")
