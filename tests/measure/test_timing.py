"""Contenders take turns and the summary is the right one."""

from contextlib import contextmanager, nullcontext

import pytest

from foveate.measure.timing import Timing, interleave


def test_median_and_spread():
    timing = Timing(tuple(float(n) for n in (5, 1, 4, 2, 3, 100, 6, 7, 8, 9, 10)))
    assert timing.median_ms == 6
    assert timing.spread_ms == (2, 10)
    assert str(timing) == "6.0 ms (2.0 to 10.0)"
    assert timing.to_dict() == {"median_ms": 6, "p10_ms": 2, "p90_ms": 10, "repeats": 11}


def test_runs_alternate_inside_their_settings():
    log, ticks = [], []

    @contextmanager
    def setting(name):
        log.append(name)
        yield
        log.append("end")

    result = interleave(
        lambda: log.append("run"),
        {"a": lambda: setting("a"), "b": lambda: setting("b")},
        repeats=2,
        warmup=1,
        tick=lambda: ticks.append(1),
    )
    assert log == [x for name in "abbaab" for x in (name, "run", "end")]
    assert {name: len(t.runs_ms) for name, t in result.items()} == {"a": 2, "b": 2}
    assert len(ticks) == 6


def test_a_failing_run_leaves_its_setting():
    left = []

    @contextmanager
    def setting():
        try:
            yield
        finally:
            left.append(True)

    with pytest.raises(ZeroDivisionError):
        interleave(lambda: 1 / 0, {"a": setting, "b": nullcontext}, repeats=1)
    assert left == [True]
