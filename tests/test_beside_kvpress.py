"""Both sides of the benchmark beside kvpress are asked to keep as much."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEXT, IMAGE, AFTER = 2, 8, 3


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def given():
    """A prompt of two words, an image of eight tokens and three words."""
    visual = torch.zeros(1, TEXT + IMAGE + AFTER, dtype=torch.bool)
    visual[:, TEXT : TEXT + IMAGE] = True
    return importlib.import_module("_kvpress_prompts").Prompt({}, torch.zeros(1, 13, 4), visual)


def test_presses_keep_all_that_foveate_keeps(given):
    """All text and a quarter of the image; before the question, as much of what stands there."""
    press = given.press("Knorm")
    assert (press["entries"], press["of"]) == (TEXT + IMAGE // 4 + AFTER, 13)
    blind = given.blind("Knorm")
    assert (blind["entries"], blind["of"]) == (TEXT + IMAGE // 4, TEXT + IMAGE)
    assert given.blind(None) == {"of": TEXT + IMAGE}


def test_snapkv_looks_from_the_question(given):
    """And from the image's last tokens where there is none."""
    assert given.press("SnapKV")["options"] == {"window_size": AFTER}
    assert given.blind("SnapKV")["options"]["window_size"] != AFTER
    assert given.press("Random")["options"] == given.blind("Random")["options"] == {"seed": 0}


def test_overlap_is_a_mean_over_heads_of_what_we_keep(given):
    script = importlib.import_module("beside_kvpress")
    ours = ~given.visual[0]
    ours[[2, 3]] = True
    theirs = torch.zeros(1, 2, 13, dtype=torch.bool)
    theirs[0, 0, [2, 3, 4, 5]] = True  # both of ours, and half of the image
    theirs[0, 1, [0, 1, 6, 7]] = True  # none of ours, and a quarter of the image
    found = script.overlap(ours, theirs, given.visual[0])
    assert found == {"both": 0.5, "chance": pytest.approx((4 + 2) / 2 / IMAGE)}


def test_speed_ups_are_over_all_tokens_on_the_same_side():
    script = importlib.import_module("beside_kvpress")
    times = {
        name: [{"prefill": seconds, "decode": 1.0}] * 3
        for name, seconds in {
            "foveate: all tokens": 2.0, "foveate: a": 1.0, "kvpress: all tokens": 6.0,
            "kvpress: b": 4.0,
        }.items()
    }  # fmt: skip
    assert script._spreads("foveate: a", times, 5)["prefill_speed_up"]["median"] == 2.0
    found = script._spreads("kvpress: b", times, 5)
    assert found["prefill_speed_up"]["median"] == 1.5
    assert found["decode_ms"]["median"] == pytest.approx(200)


def test_the_largest_difference_of_a_batch_is_shown():
    script = importlib.import_module("_kvpress_ragged")
    rows = [{"difference": 1.0, "same_token": 1.0}, {"difference": 3.0, "same_token": 0.5}]
    assert script._summary(rows) == {"difference": 3.0, "same_token": 0.75}
