"""Measured times: contenders take turns, so that a slow moment of the machine hits them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


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
    names = list(settings)
    for round_ in range(warmup + repeats):
        # Alternate who goes first, so that none always follows the other's cache and heap.
        for name in names if round_ % 2 == 0 else reversed(names):
            with settings[name]():
                elapsed = _clock(fn, torch.device(device))
            if round_ >= warmup:
                runs[name].append(elapsed)
            if tick is not None:
                tick()
    return {name: Timing(tuple(times)) for name, times in runs.items()}


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
