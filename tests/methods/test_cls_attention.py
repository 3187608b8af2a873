"""What all methods do that rank by class-token attention, of one layer or several."""

import pytest
import torch

from foveate.methods import VTCCLS, ClsDrop, FasterVLM

METHODS = [(ClsDrop(), 1), (FasterVLM(), 1), (VTCCLS(), 3)]  # and how many layers they are given

each = pytest.mark.parametrize(("method", "layers"), METHODS, ids=lambda given: str(given)[:9])


@each
def test_scores_match_naive_loop(method, layers, make_tokens):
    signal = torch.rand(2, layers, 4, 24)
    scores = method.scores(make_tokens(images=2, cls_attention=signal))
    for image in range(2):
        for token in range(24):
            of_layers = (
                sum(float(signal[image, layer, head, token]) for head in range(4)) / 4
                for layer in range(layers)
            )
            assert scores[image, token].item() == pytest.approx(sum(of_layers), rel=1e-5)


@each
@pytest.mark.parametrize("kept", [1, 7, 24])
def test_exactly_the_highest_are_kept(method, layers, kept, make_tokens, check_index):
    signal = torch.rand(3, layers, 4, 24)
    index = method.reduce(make_tokens(images=3, cls_attention=signal), kept).index
    check_index(index, kept, 24)
    for image in range(3):
        ranked = sorted(range(24), key=lambda i: -float(signal[image].mean(1).sum(0)[i]))
        assert index[image].tolist() == sorted(ranked[:kept])


@each
def test_batch_equals_single(method, layers, make_tokens):
    signal = torch.rand(3, layers, 4, 24)
    together = method.reduce(make_tokens(images=3, cls_attention=signal), 5).index
    for image in range(3):
        alone = method.reduce(make_tokens(cls_attention=signal[image : image + 1]), 5).index
        assert torch.equal(together[image : image + 1], alone)


@each
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_constant_attention_still_keeps_the_count(method, layers, grid, make_tokens, check_index):
    total = grid[0] * grid[1]
    tokens = make_tokens(grid, cls_attention=torch.full((1, layers, 4, total), 0.1))
    for kept in range(1, total + 1):
        check_index(method.reduce(tokens, kept).index, kept, total)
