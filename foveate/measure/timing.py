"""Measured times: contenders take turns, so that a slow moment of the machine hits them all."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing.

    Args:
        runs_ms: wall-clock milliseconds of every repeat, in order.
    """

    runs_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.runs_ms)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """10th and 90th percentile (nearest rank)."""
        ordered = sorted(self.runs_ms)
        last = len(ordered) - 1
        return ordered[round(0.1 * last)], ordered[round(0.9 * last)]

    def to_dict(self) -> dict[str, float | int]:
        """Median, percentiles and the number of repeats as JSON values."""
        low, high = self.spread_ms
        return {
            "median_ms": self.median_ms,
            "p10_ms": low,
            "p90_ms": high,
            "repeats": len(self.runs_ms),
        }

    def __str__(self) -> str:
        low, high = self.spread_ms
        return f"{self.median_ms:.1f} ms ({low:.1f} to {high:.1f})"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements.

    Args:
        median: the middle.
        q25: a quarter of the measurements is lower.
        q75: a quarter is higher.
    """

    median: float
    q25: float
    q75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        median = statistics.median(values)
        if len(values) < 2:
            return cls(median, median, median)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """The spread of the round-by-round ratios of two contenders."""
        return cls.of([a / b for a, b in zip(numerators, denominators, strict=True)])

    def to_dict(self) -> dict[str, float]:
        """The three numbers as JSON values."""
        return {"median": self.median, "q25": self.q25, "q75": self.q75}


def one_round(contenders: Mapping[str, Callable[[], T]], number: int) -> Iterator[tuple[str, T]]:
    """Run each contender once, and hand out what it returns.

    Args:
        contenders: by name, what is run.
        number: of the round. Every other round goes backwards, so that no contender always runs
            after the same other one, whose traces in processor caches and memory it would find.
    """
    names = list(contenders)
    for name in names if number % 2 == 0 else reversed(names):
        yield name, contenders[name]()


def interleave(
    fn: Callable[[], object],
    settings: Mapping[str, Callable[[], AbstractContextManager[object]]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    tick: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time one function under several settings, which take turns.

    For the time to first token, let `fn` generate one token: vision tower, selection, prefill and
    the head are then all inside.

    Args:
        fn: what is timed.
        settings: for each name, a function that returns a context manager to run `fn` in. Entering
            and leaving it is not timed. Use `contextlib.nullcontext` for none.
        repeats: timed rounds, at least 1.
        warmup: untimed rounds before them.
        device: device on which `fn` works; a CUDA device is synchronised around every run.
        tick: called after every run, for a progress bar.

    Returns:
        One `Timing` for each setting.
    """
    runs: dict[str, list[float]] = {name: [] for name in settings}
    contenders = {
        name: functools.partial(_clock_within, setting, fn, torch.device(device))
        for name, setting in settings.items()
    }
    for number in range(warmup + repeats):
        for name, elapsed in one_round(contenders, number):
            runs[name].append(elapsed)
            if tick is not None:
                tick()
    return {name: Timing(tuple(times[warmup:])) for name, times in runs.items()}


def _clock_within(
    setting: Callable[[], AbstractContextManager[object]],
    fn: Callable[[], object],
    device: torch.device,
) -> float:
    with setting():
        return _clock(fn, device)


def _clock(fn: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that one call takes."""
    _wait(device)
    start = time.perf_counter()
    fn()
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
