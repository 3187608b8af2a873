"""Speed of methods: cells of prompt length x batch size, in each of which all methods take turns.

A run is one prompt and some decoding steps, as plain forward calls of the model:

    images -> vision tower, projector | selection, prefill, head | decoding steps
                    vision                   prefill                 decode
    |------------------- TTFT -------------------|

What a session reads inside the tower (attention of the class token, merging) counts as vision. All
contenders run in every round, in alternating order, and speed-ups are taken round by round.
"""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.core import Method
from foveate.engine.cache_argument import CACHE
from foveate.errors import FoveateError
from foveate.families import find_family
from foveate.measure.memory import cache_bytes, peak_memory
from foveate.measure.timing import Spread, one_round
from foveate.run import use

ALL = "all tokens"
FEWEST = 3
"""Rounds that a cell gets even where the time is up."""
PHASES = ("vision", "prefill", "decode")


class Stopwatch:
    """Times of the phases of one run.

    Args:
        device: on CUDA, events on the stream are timed, which does not stop it; elsewhere a clock.
        cpu_time: count CPU seconds of the process instead of wall-clock time, which one thread on
            a shared machine is better judged by.
    """

    def __init__(self, device: torch.device, *, cpu_time: bool) -> None:
        self._device = device
        self._clock = time.process_time if cpu_time else time.perf_counter
        self._marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        """Note the end of a phase; `start` is where the first begins."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = self._clock()

    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of each phase; one that did not happen took none."""
        marks = dict(self._marks)
        self._marks.clear()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        times, before = {}, marks["start"]
        for name in PHASES:
            now = marks.get(name, before)
            times[name] = (
                before.elapsed_time(now)
                if self._device.type == "cuda" and now is not before
                else (0.0 if now is before else (now - before) * 1e3)
            )
            before = now
        return times


@dataclass(frozen=True, eq=False)
class Bench:
    """A model and how it is timed.

    Args:
        model: a supported vision-language model.
        new_tokens: decoding steps after each prompt.
        cpu_time: see `Stopwatch`.
    """

    model: Any
    new_tokens: int
    cpu_time: bool
    watch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        watch = Stopwatch(self.model.device, cpu_time=self.cpu_time)
        object.__setattr__(self, "watch", watch)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note when image features are made, before a session sees them."""
        family, name = find_family(self.model), "get_image_features"
        maker = family.base
        if (placer := family.placer("image")) is not None:
            maker, name = placer, "forward"
        original, before = getattr(maker, name), vars(maker).get(name)

        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.watch.mark("vision")
            return output

        setattr(maker, name, noted)
        try:
            yield
        finally:
            delattr(maker, name)
            if before is not None:
                setattr(maker, name, before)

    def prompt(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """One prefill: the cache, and the next token of each row, (B, 1)."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config.get_text_config())
        self.watch.mark("start")
        output = self.model(**inputs, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        token = output.logits[:, -1:].argmax(-1)
        self.watch.mark("prefill")
        return cache, token

    def run(self, inputs: Mapping[str, Any]) -> dict[str, float]:
        """One prompt and its answer; milliseconds of each phase, and of `ttft` and `total`."""
        cache, token = self.prompt(inputs)
        for _ in range(self.new_tokens):
            output = self.model(input_ids=token, use_cache=True, **{CACHE: cache})
            token = output.logits[:, -1:].argmax(-1)
        self.watch.mark("decode")
        times = self.watch.phases_ms()
        times["ttft"] = times["vision"] + times["prefill"]
        return {**times, "total": times["ttft"] + times["decode"]}


@dataclass(frozen=True, eq=False)
class Contender:
    """What a run happens within.

    Args:
        setting: makes the context; nothing for all tokens.
        method: the method, or `None`.
    """

    setting: Callable[[], AbstractContextManager[Any]]
    method: Method | None = None


def contenders(model: Any, methods: Sequence[Method]) -> dict[str, Contender]:
    """All tokens first, then each method by its name.

    Raises:
        FoveateError: a method does not work on the model.
    """
    found = {ALL: Contender(nullcontext)}
    for method in methods:
        use(model, method)  # raises where it cannot work
        found[method.slug] = Contender(functools.partial(use, model, method), method)
    return found


@dataclass(frozen=True)
class Rounds:
    """How often a cell is run.

    Args:
        repeats: timed rounds.
        warmup: untimed rounds before them, on top of one run in which costs are noted.
        seconds: time after which no further round begins, if `FEWEST` are done; `None` for no
            limit.
    """

    repeats: int
    warmup: int = 1
    seconds: float | None = None

    def numbers(self) -> Iterator[int]:
        """Numbers of the rounds, until the time is up; the clock starts now."""
        began = time.monotonic()
        return itertools.takewhile(
            lambda number: not self._late(began, number), range(self.warmup + self.repeats)
        )

    def _late(self, began: float, number: int) -> bool:
        enough = number >= self.warmup + FEWEST
        return enough and self.seconds is not None and time.monotonic() - began > self.seconds


def measure_cell(
    bench: Bench,
    inputs: Mapping[str, Any],
    entrants: Mapping[str, Contender],
    rounds: Rounds,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """All contenders on one batch of prompts.

    Args:
        bench: the model.
        inputs: of the batch.
        entrants: from `contenders`.
        rounds: how often they run; its time limit includes the run in which costs are noted.
        tick: called after every run.

    Returns:
        JSON values: `repeats`, and `rows` by contender.

    Raises:
        FoveateError: the cache holds another number of bytes than the report says.
    """
    facts = {}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in entrants}
    numbers = rounds.numbers()
    with torch.inference_mode(), bench.watching():
        for name, entrant in entrants.items():
            facts[name] = _costs(bench, inputs, entrant)
            tick()
        runners = _runners(bench, inputs, entrants)
        with _short_collections():
            for number in numbers:
                for name, times in one_round(runners, number):
                    runs[name].append(times)
                    tick()
    timed = {name: of[rounds.warmup :] for name, of in runs.items()}
    batch = inputs["input_ids"].shape[0]
    rows = {name: _row(bench, timed, name, facts, batch) for name in entrants}
    return {"repeats": len(timed[ALL]), "rows": rows}


@contextmanager
def _short_collections() -> Iterator[None]:
    """Spare the garbage collector what lives now; it is run before every timed run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _runners(
    bench: Bench, inputs: Mapping[str, Any], entrants: Mapping[str, Contender]
) -> dict[str, Callable[[], dict[str, float]]]:
    def runner(entrant: Contender) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            with entrant.setting():
                gc.collect()
                return bench.run(inputs)

        return run

    return {name: runner(entrant) for name, entrant in entrants.items()}


def _costs(bench: Bench, inputs: Mapping[str, Any], entrant: Contender) -> dict[str, Any]:
    """What one prompt costs, by count: peak memory, cache bytes, the session's report."""
    held = {}

    def prompt() -> None:
        held["cache"], _ = bench.prompt(inputs)

    with entrant.setting() as session:
        peak = peak_memory(prompt, bench.model.device)
    bench.watch.phases_ms()
    cache, _ = cache_bytes(held["cache"])
    costs = {"peak_bytes": peak, "kv_bytes": cache}
    if session is not None:
        report = session.report()
        if report["kv_bytes"]["after"] != cache:
            raise FoveateError(
                f"{report['methods'][0]['method']}: the cache holds {cache} bytes, but the report "
                f"says {report['kv_bytes']['after']}; this is a defect of foveate, please report it"
            )
        costs["report"] = report
    return costs


SPEED_UPS = {"ttft": "ttft", "prefill": "prefill", "decode": "decode", "throughput": "total"}
"""What is compared, and which time it is the inverse of."""


def _row(
    bench: Bench,
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    name: str,
    facts: Mapping[str, Mapping[str, Any]],
    batch: int,
) -> dict[str, Any]:
    """What one contender's runs say."""
    row = _times(runs[name], batch, bench.new_tokens)
    row |= {key: facts[name][key] for key in ("peak_bytes", "kv_bytes")}
    if name == ALL:
        return row
    speed = {
        key: Spread.of_ratios(_phase(runs[ALL], phase), _phase(runs[name], phase))
        for key, phase in SPEED_UPS.items()
        if bench.new_tokens or phase != "decode"
    }
    report = facts[name]["report"]
    predicted = _predicted(report["flops"])
    return row | {
        "method": report["methods"][0],
        "visual_tokens": _mean_visual(report),
        "speed_up": {key: value.to_dict() for key, value in speed.items()},
        "predicted": predicted,
        "prefill_of_predicted": speed["prefill"].median / predicted["prefill"],
        "slower": [key for key, value in speed.items() if value.q75 < 1.0],
        "perhaps_slower": [k for k, v in speed.items() if v.median < 1.0 <= v.q75],
        "notes": report["notes"],
    }


def _phase(runs: Sequence[Mapping[str, float]], phase: str) -> list[float]:
    return [run[phase] for run in runs]


def _times(runs: Sequence[Mapping[str, float]], batch: int, steps: int) -> dict[str, Any]:
    """Spreads of a contender's phases in milliseconds, and of its tokens per second."""
    times: dict[str, Any] = {
        f"{phase}_ms": Spread.of(_phase(runs, phase)).to_dict()
        for phase in ("ttft", "vision", "prefill")
    }
    rates = {"decode_tokens_per_s": ("decode", steps), "tokens_per_s": ("total", steps + 1)}
    for key, (phase, tokens) in rates.items():
        if tokens:
            per_s = [batch * tokens / ms * 1e3 for ms in _phase(runs, phase)]
            times[key] = Spread.of(per_s).to_dict()
    return times


def _predicted(work: Mapping[str, Any]) -> dict[str, float]:
    """Speed-ups if time were FLOPs: of the prefill, and of the TTFT where the tower is counted."""
    vision, after = work["vision"] or 0, work["vision_after"] or 0
    found = {"prefill": (work["before"] - vision) / (work["after"] - after)}
    if work["vision"] is not None:
        found["ttft"] = work["before"] / work["after"]
    return found


def _mean_visual(report: Mapping[str, Any]) -> float:
    """Visual tokens of a row, averaged over rows and decoder layers."""
    seen = [n for layer in report["layers"] for n in layer["visual_tokens"]]
    return sum(seen) / len(seen)
