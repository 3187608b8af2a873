"""HoloV: a budget for each run of tokens, and the most attended within it."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.holov import HoloV, quotas
from tests.methods.chance import seen


@pytest.mark.parametrize(("kept", "runs"), [(1, 16), (9, 16), (24, 4), (40, 16), (62, 5), (63, 99)])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_it_keeps_what_a_plain_loop_keeps(
    kept, runs, spread, make_tokens, check_index, transcribed
):
    """Where attention is so uneven that a run's quota is above its tokens, too."""
    attention = seen(3, 63, spread=spread).double()
    index = HoloV(num_patches=runs).reduce(
        make_tokens((7, 9), images=3, cls_attention=attention), kept
    )
    check_index(index.index, kept, 63)
    for image in range(3):
        x = torch.randn(63, 8).double()
        tensors = {"x": x, "cls_attention": attention[image]}
        wanted = transcribed("holov").transcription(tensors, kept, runs)
        assert index.index[image].tolist() == wanted.tolist()


def test_quotas_are_shares_rounded_down_and_the_heaviest_get_the_rest():
    size = torch.tensor([9, 9, 9])
    weight = torch.tensor([[5.0, 3, 2], [1, 1, 1], [0, 0, 0]])
    assert quotas(weight, size, 7).tolist() == [[4, 2, 1], [3, 2, 2], [3, 2, 2]]


def test_what_a_run_has_no_room_for_goes_to_others():
    """The release fills up with zero vectors here."""
    size = torch.tensor([3, 3, 3])
    assert quotas(torch.tensor([[8.0, 1, 1]]), size, 6).tolist() == [[3, 2, 1]]
    assert quotas(torch.tensor([[8.0, 1, 0]]), size, 7).tolist() == [[3, 3, 1]]


def test_rounding_moves_no_quota():
    """A share of a whole number that rounding puts just below it is that number."""
    size = torch.full((4,), 9)
    exact = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    for noise in (-1e-8, 0.0, 1e-8):
        moved = exact + noise * torch.tensor([[1.0, -1, -1, 1]])
        assert quotas(moved, size, 10).tolist() == [[1, 2, 3, 4]]


def test_every_part_of_the_image_is_seen(make_tokens):
    """Attention gathered in one run leaves others their share; the order is that of the image."""
    attention = torch.full((1, 1, 1, 32), 0.02)
    attention[..., :2] = 0.15
    index = HoloV(num_patches=8).reduce(make_tokens((4, 8), cls_attention=attention), 16).index[0]
    assert {0, 1} <= set(index.tolist())
    assert (index.bincount(minlength=32).view(8, 4).sum(1) > 0).all()
    assert (index.diff() > 0).all()


def test_batch_equals_single(make_tokens):
    attention = seen(4, 24)
    together = HoloV().reduce(make_tokens(images=4, cls_attention=attention), 9).index
    for image in range(4):
        one = slice(image, image + 1)
        alone = HoloV().reduce(make_tokens(cls_attention=attention[one]), 9).index
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("value", [0.0, 0.01])
def test_equal_attention(value, make_tokens, check_index):
    tokens = make_tokens(images=2, received_attention=torch.full((2, 1, 24), value))
    for kept in (1, 5, 24):
        check_index(HoloV().reduce(tokens, kept).index, kept, 24)


def test_newlines_come_last_in_their_run(make_tokens, check_index):
    attention = seen(2, 24)
    attention[..., 5::6] = -torch.inf
    tokens = make_tokens(images=2, cls_attention=attention)
    index = HoloV(num_patches=4).reduce(tokens, 12).index
    check_index(index, 12, 24)
    assert not {5, 11, 17, 23} & set(index.flatten().tolist())
    check_index(HoloV().reduce(tokens, 24).index, 24, 24)


def test_defaults_and_registration(facts):
    method = get_method("holov")()
    assert isinstance(method, HoloV)
    assert (method.keep, method.num_patches) == (64, 16)
    (step,) = method.steps(facts())
    assert [(need.name, need.layers) for need in step.needs] == [("cls_attention", (22,))]


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        HoloV(keep=0)
    with pytest.raises(FoveateError, match="num_patches"):
        HoloV(num_patches=0)
