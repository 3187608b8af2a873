"""The demo shows what counts: costs at real size, and a prefill that is measured."""

import pytest
from rich.console import Console

from foveate.cli.demo_sizes import MODELS, count_sizes, measure_prefill, show_measured, show_sizes
from foveate.cli.flops import Answer
from foveate.errors import FoveateError
from foveate.methods import DToP, PyramidDrop


@pytest.mark.parametrize("width", [80, 120])
def test_costs_are_those_of_flops_and_fit_the_terminal(width):
    counted = count_sizes([PyramidDrop()])
    assert list(counted) == list(MODELS)
    console = Console(record=True, width=width)
    show_sizes(counted, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for answer in counted.values():
        assert isinstance(answer, Answer)
        assert f"{answer.before.total / answer.after.total:.2f}x" in text
        assert f"{answer.kv_bytes[0] / 2**20:.0f} to {answer.kv_bytes[1] / 2**20:.0f}" in text


def test_a_method_that_does_not_work_there_says_so():
    counted = count_sizes([DToP()])
    assert all(isinstance(answer, FoveateError) for answer in counted.values())
    console = Console(record=True, width=80)
    show_sizes(counted, console)
    assert console.export_text().count("does not work") == len(MODELS)


def test_the_prefill_is_timed_with_all_tokens_and_with_fewer(monkeypatch):
    monkeypatch.setattr("foveate.cli.demo_sizes.SIZE", "llama-256x8")
    monkeypatch.setattr("foveate.cli.demo_sizes.ROUNDS", 2)
    ticks = []
    measured = measure_prefill([PyramidDrop()], lambda: ticks.append(1))
    assert (measured.rounds, len(ticks)) == (2, 5)
    assert 1.5 < measured.flops[0] / measured.flops[1] < 2.5
    console = Console(record=True, width=80)
    show_measured(measured, console)
    assert f"FLOPs predict {measured.flops[0] / measured.flops[1]:.2f}x" in console.export_text()
