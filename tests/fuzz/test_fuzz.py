"""Random cells agree with the oracle, or are refused by name; and the fuzzer finds faults."""

import json
import re

import pytest
import torch

from foveate.engine import inputs
from foveate.engine.slots import Slots
from foveate.methods import FastV, PyramidDrop
from tests.fuzz.__main__ import Run
from tests.fuzz.cell import cell_of
from tests.fuzz.judge import AGREED, BARE, CRASHED, DISAGREED, REFUSED, bare, judge
from tests.fuzz.models import FAMILIES
from tests.fuzz.page import PAGE, RESULT, page
from tests.fuzz.scene import Scene

SEED, CELLS, AT_ONCE = 0, 200, 10


@pytest.mark.parametrize("start", range(0, CELLS, AT_ONCE))
def test_cells_agree_with_the_oracle_or_are_refused(start):
    run = Run(SEED, start, AT_ONCE)
    run.play()
    assert not run.faults, run.table()
    for outcome in run.outcomes.values():
        if outcome.status == REFUSED:
            assert "\n" not in outcome.detail


def test_most_cells_are_judged():
    """Cells that are refused, or that transformers cannot run, say nothing about the engine."""
    counts = json.loads(RESULT.read_text(encoding="utf-8"))["counts"]
    assert counts[AGREED] > 0.8 * sum(counts.values())
    assert counts[BARE] < 0.05 * sum(counts.values())
    assert not counts[DISAGREED]
    assert not counts[CRASHED]


def test_a_seed_always_makes_the_same_cell():
    assert str(cell_of(3, 14)) == str(cell_of(3, 14)) != str(cell_of(3, 15))
    drawn = [cell_of(SEED, number) for number in range(400)]
    assert {cell.shape.family for cell in drawn} == set(FAMILIES)


@pytest.mark.parametrize("mode", ["forward", "generate", "beams", "turn", "train"])
def test_the_oracle_itself_is_the_bare_model(mode):
    cells = (cell_of(5, number) for number in range(9999))
    families = ("internvl", "llava", "mistral3", "deepseek_vl", "qwen3_vl")
    alike = (c for c in cells if c.mode == mode and c.shape.family in families)
    cell = next(c for c in alike if c.mode != "forward" or (c.positions and not any(c.unseen)))
    with torch.no_grad():
        assert bare(Scene.of(cell)) == ""


def worst(scores):
    return lambda self, tokens: -scores(self, tokens)


def forgetful(extend):
    return lambda self, layout, length, renumbered, *more: extend(self, layout, length, None, *more)


BROKEN = {
    "FastV keeps the worst": (FastV, "scores", worst),
    "PyramidDrop keeps the worst": (PyramidDrop, "scores", worst),
    "padding counts as text": (
        inputs,
        "real_positions",
        lambda real: lambda mask, total, read: None,
    ),
    "decoding forgets what moved up": (Slots, "extend", forgetful),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_engine_is_found(what, monkeypatch):
    where, name, broken = BROKEN[what]
    monkeypatch.setattr(where, name, broken(vars(where)[name]))
    for number in range(120):
        cell = cell_of(SEED, number)
        if "worst" in what and not any(m.slug == where.slug for m in cell.methods):
            continue
        if judge(cell).status in (DISAGREED, CRASHED):
            return
    pytest.fail("nothing was found")


def test_the_page_says_what_the_last_long_run_gave():
    text = PAGE.read_text(encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert text == page(text, result), "run make fuzz, or tests.fuzz.page.write"


def test_the_page_names_tests_that_exist():
    named = re.findall(r"`(tests/[\w/.]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 10
    for path in named:
        assert (PAGE.parents[1] / path).exists(), path
