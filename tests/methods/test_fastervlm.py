"""FasterVLM: class-token attention of one encoder layer."""

import pytest
import torch

from foveate.core import get_method
from foveate.core.budget import count
from foveate.errors import BudgetError, FoveateError
from foveate.methods.fastervlm import FasterVLM


def test_it_scores_in_the_feature_layer(facts):
    (step,) = FasterVLM().steps(facts())
    (need,) = step.needs
    assert (step.site, need.name, need.layers) == ("pre_llm", "cls_attention", (22,))


def test_scores_match_naive_loop(make_tokens):
    signal = torch.rand(2, 1, 4, 24)
    scores = FasterVLM().scores(make_tokens(images=2, cls_attention=signal))
    for image in range(2):
        for token in range(24):
            expected = sum(float(signal[image, 0, head, token]) for head in range(4)) / 4
            assert scores[image, token].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kept", [1, 6, 24])
def test_keeps_exactly_the_highest(kept, make_tokens, check_index):
    signal = torch.rand(3, 1, 4, 24)
    index = FasterVLM().reduce(make_tokens(images=3, cls_attention=signal), kept).index
    check_index(index, kept, 24)
    for image in range(3):
        ranked = signal[image, 0].mean(0).argsort(descending=True).tolist()
        assert index[image].tolist() == sorted(ranked[:kept])


def test_batch_equals_single(make_tokens):
    signal = torch.rand(3, 1, 4, 24)
    together = FasterVLM().reduce(make_tokens(images=3, cls_attention=signal), 5).index
    for image in range(3):
        alone = FasterVLM().reduce(make_tokens(cls_attention=signal[image : image + 1]), 5).index
        assert torch.equal(together[image : image + 1], alone)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_constant_attention_still_keeps_the_count(grid, make_tokens, check_index):
    total = grid[0] * grid[1]
    tokens = make_tokens(grid, cls_attention=torch.full((1, 1, 4, total), 0.1))
    for kept in range(1, total + 1):
        check_index(FasterVLM().reduce(tokens, kept).index, kept, total)


@pytest.mark.parametrize(("share", "expected"), [(0.25, 144), (0.1, 58), (0.05, 29)])
def test_shares_give_the_published_counts(share, expected):
    method = FasterVLM(keep=share)
    kept = count(method.keep, 576, step=0, row=0, rounding=type(method).rounding)
    assert kept == expected


def test_defaults_and_registration():
    method = get_method("fastervlm")()
    assert isinstance(method, FasterVLM)
    assert (method.keep, method.published_positions) == (0.25, "renumbered")


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        FasterVLM(keep=0)
    with pytest.raises(FoveateError, match="positions"):
        FasterVLM(positions="none")
