"""HiPrune: anchors of a middle layer, their neighbours, and registers of the last one."""

import dataclasses

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError, InputError, LayerError
from foveate.methods.hiprune import HiPrune


def attention(images, total, seed=0):
    """(G, 2, V) scores whose sum over the patches is below 1, as with a class token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, 2, total, generator=generator).softmax(-1) * 0.9


def by_hand(objects, deep, count, alpha, grid):
    """Anchors, spatial neighbours, then the best of the rest: one image, plain loops."""
    height, width = grid
    anchors = sorted(range(len(objects)), key=lambda i: -objects[i])[: round(count * alpha / 5)]
    buffers = set()
    for anchor in anchors:
        row, column = divmod(anchor, width)
        for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            if 0 <= row + down < height and 0 <= column + right < width:
                buffers.add((row + down) * width + column + right)
    kept = list(anchors)
    for pool in (buffers - set(anchors), set(range(len(deep))) - buffers - set(anchors)):
        kept += sorted(pool, key=lambda i: -deep[i])[: count - len(kept)]
    return sorted(kept)


@pytest.mark.parametrize(("count", "alpha"), [(1, 0.1), (7, 0.5), (12, 1.0), (23, 0.3), (3, 1.0)])
def test_it_keeps_what_a_plain_loop_keeps(count, alpha, make_tokens, check_index):
    signal = attention(3, 24)
    index = HiPrune(alpha=alpha).reduce(make_tokens(images=3, received_attention=signal), count)
    check_index(index.index, count, 24)
    for image in range(3):
        objects, deep = signal[image].tolist()
        assert index.index[image].tolist() == by_hand(objects, deep, count, alpha, (4, 6))


def test_published_split_of_a_budget(make_tokens):
    """192 tokens at alpha 0.1 are 4 anchors, 16 buffers and 172 registers where none meet."""
    signal = torch.zeros(1, 2, 576)
    anchors = [100, 200, 300, 400]
    signal[0, 0, anchors] = 0.1
    signal[0, 1] = torch.linspace(0, 1e-3, 576)
    kept = HiPrune().reduce(make_tokens((24, 24), received_attention=signal), 192).index[0]
    near = {a + d for a in anchors for d in (0, 1, -1, 24, -24)}
    registers = [i for i in reversed(range(576)) if i not in near][:172]
    assert kept.tolist() == sorted([*near, *registers])


def test_neighbours_do_not_wrap_around_rows_but_did_in_the_release(make_tokens):
    signal = torch.full((1, 2, 24), 1e-3)
    signal[0, 0, 6] = 0.5  # first of the second row; its left neighbour in memory ends the first
    tokens = make_tokens(received_attention=signal)
    signal[0, 1, 20] = 0.4
    sound = HiPrune(alpha=1.0).reduce(tokens, 5).index[0].tolist()
    released = HiPrune(alpha=1.0, as_released="llava").reduce(tokens, 5).index[0].tolist()
    assert sound == [0, 6, 7, 12, 20]
    assert released == [0, 5, 6, 7, 12]


def test_released_neighbours_are_clamped_to_the_image(make_tokens):
    signal = torch.full((1, 2, 24), 1e-3)
    signal[0, 0, 23] = 0.5
    tokens = make_tokens(received_attention=signal)
    released = HiPrune(alpha=1.0, as_released="llava").reduce(tokens, 3).index[0].tolist()
    assert released == [17, 22, 23]


def test_release_on_qwen_keeps_fewer_tokens_than_asked_for(make_tokens):
    """A buffer with much attention is chosen twice there; by default it is not."""
    signal = torch.full((1, 2, 24), 1e-3)
    signal[0, 0, 9] = 0.5
    signal[0, 1, 8] = 0.5  # beside the anchor: more than 1 above all others, as a sum
    tokens = make_tokens(received_attention=signal)
    released = HiPrune(alpha=0.5, as_released="qwen").reduce(tokens, 8).index[0].tolist()
    assert {3, 8, 9, 10, 15} < set(released)
    assert len(released) == 7
    assert HiPrune(alpha=0.5).reduce(tokens, 8).index.shape == (1, 8)


def test_release_on_qwen_serves_no_batch_of_unequal_counts(make_tokens):
    signal = torch.full((2, 2, 24), 1e-3)
    signal[:, 0, 9] = 0.5
    signal[0, 1, 8] = 0.5
    signal[1, 1, 23] = 0.5
    tokens = make_tokens(images=2, received_attention=signal)
    with pytest.raises(InputError, match="one by one"):
        HiPrune(alpha=0.5, as_released="qwen").reduce(tokens, 8)


def test_neighbours_stay_in_their_frame(make_tokens):
    """The last row of a frame is not above the first row of the next one."""
    signal = torch.full((1, 2, 12), 1e-3)
    signal[0, 0, 6] = 0.5  # first of the second frame of 2 x 3
    signal[0, 1, 1] = 0.4
    tokens = dataclasses.replace(
        make_tokens((2, 3), index=torch.arange(12)[None], received_attention=signal), frames=2
    )
    assert HiPrune(alpha=1.0).reduce(tokens, 4).index[0].tolist() == [1, 6, 7, 9]


def test_a_token_after_all_frames_is_no_neighbour(make_tokens):
    signal = torch.full((1, 2, 13), 1e-3)
    signal[0, 0, 11] = 0.5
    signal[0, 1, 1] = 0.4
    tokens = dataclasses.replace(
        make_tokens((2, 3), index=torch.arange(13)[None], received_attention=signal), frames=2
    )
    assert HiPrune(alpha=1.0).reduce(tokens, 4).index[0].tolist() == [1, 8, 10, 11]


def test_removed_neighbours_are_passed_over(make_tokens):
    """Behind another method, a neighbour is one in the grid, not the next that is left."""
    left = torch.tensor([[0, 2, 7, 8, 14, 20]])
    signal = torch.full((1, 2, 6), 1e-3)
    signal[0, 0, 3] = 0.5  # token 8, between 7 and 14; 2 is above it
    signal[0, 1, 0] = 0.4
    tokens = make_tokens(index=left, received_attention=signal)
    assert HiPrune(alpha=1.0).reduce(tokens, 5).index[0].tolist() == [0, 1, 2, 3, 4]


def test_newlines_are_the_last_to_stay(make_tokens):
    signal = attention(1, 24)
    signal[:, :, 5::6] = -torch.inf
    kept = HiPrune(alpha=1.0).reduce(make_tokens(received_attention=signal), 12).index[0]
    assert not {5, 11, 17, 23} & set(kept.tolist())


def test_batch_equals_single(make_tokens):
    signal = attention(3, 24)
    for method in (HiPrune(alpha=0.6), HiPrune(alpha=0.6, as_released="llava")):
        together = method.reduce(make_tokens(images=3, received_attention=signal), 9).index
        for image in range(3):
            alone = method.reduce(make_tokens(received_attention=signal[image : image + 1]), 9)
            assert torch.equal(together[image : image + 1], alone.index)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_attention_still_keeps_the_count(grid, value, make_tokens, check_index):
    total = grid[0] * grid[1]
    tokens = make_tokens(grid, received_attention=torch.full((1, 2, total), value))
    for method in (HiPrune(alpha=1.0), HiPrune(as_released="llava")):
        for count in range(1, total + 1):
            check_index(method.reduce(tokens, count).index, count, total)


def test_object_layer_follows_the_encoder(facts):
    """Layer 9 of 24 and 16 of 32 as published, counted from 1."""

    def layers(method, **model):
        (step,) = method.steps(facts(**model))
        (need,) = step.needs
        assert (step.site, need.name) == ("pre_llm", "received_attention")
        return need.layers

    assert layers(HiPrune()) == (8, 22)
    qwen = {"vision_layers": 32, "feature_layer": 31, "class_token": False}
    assert layers(HiPrune(), **qwen) == (15, 31)
    assert layers(HiPrune(layer=3), **qwen) == (3, 31)
    tiny = {"vision_layers": 1, "feature_layer": 0, "class_token": False}
    assert layers(HiPrune(), **tiny) == (0, 0)
    with pytest.raises(LayerError, match="24 layers"):
        HiPrune(layer=24).steps(facts())


def test_defaults_and_registration():
    method = get_method("hiprune")()
    assert isinstance(method, HiPrune)
    assert (method.keep, method.alpha, method.published_positions) == (192, 0.1, "renumbered")


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        HiPrune(keep=0)
    with pytest.raises(FoveateError, match="alpha"):
        HiPrune(alpha=1.5)
    with pytest.raises(FoveateError, match="as_released"):
        HiPrune(as_released=True)
