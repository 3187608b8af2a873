"""VisPruner: important tokens, and the rest without its repetitions."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.vispruner import VisPruner
from tests.methods.chance import features, seen


@pytest.mark.parametrize("kept", [1, 2, 9, 30, 62, 63])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.3, 1.0])
def test_it_keeps_what_a_plain_loop_keeps(kept, ratio, make_tokens, check_index, transcribed):
    x, attention = features(3, 63), seen(3, 63)
    tokens = make_tokens((7, 9), images=3, x=x, cls_attention=attention)
    index = VisPruner(important_ratio=ratio).reduce(tokens, kept).index
    check_index(index, kept, 63)
    for image in range(3):
        tensors = {"x": x[image], "cls_attention": attention[image]}
        wanted = transcribed("vispruner").transcription(tensors, kept, ratio)
        assert index[image].tolist() == wanted.tolist()


def test_one_token_at_least_is_diverse(make_tokens):
    """Where two are kept; with all of a budget for important ones too."""
    x = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [1, 0.1], [0, 1], [1, 0]]])
    attention = torch.tensor([0.4, 0.3, 0.15, 0.05, 0.01, 0.09]).view(1, 1, 1, 6)
    tokens = make_tokens((1, 6), x=x, cls_attention=attention)
    method = VisPruner(important_ratio=1.0)
    assert method.reduce(tokens, 2).index[0, 0] == 0
    assert method.reduce(tokens, 2).index[0, 1] > 1  # 1 is second by attention
    assert method.reduce(tokens, 1).index.tolist() == [[0]]


def test_halves_are_cut_in_raster_order(make_tokens):
    """Of the pairs of equal tokens, the one at an even place of the rest goes."""
    x = torch.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3]][None]
    attention = torch.full((1, 1, 1, 8), 1 / 8)
    tokens = make_tokens((2, 4), x=x, cls_attention=attention)
    assert VisPruner(important_ratio=0.0).reduce(tokens, 4).index.tolist() == [[1, 3, 5, 7]]


def test_batch_equals_single(make_tokens):
    x, attention = features(4, 24), seen(4, 24)
    together = VisPruner().reduce(make_tokens(images=4, x=x, cls_attention=attention), 9).index
    for image in range(4):
        one = slice(image, image + 1)
        alone = make_tokens(x=x[one], cls_attention=attention[one])
        assert torch.equal(VisPruner().reduce(alone, 9).index, together[one])


def test_everything_needs_no_features(make_tokens):
    index = VisPruner().reduce(make_tokens(cls_attention=seen(1, 24)), 24).index
    assert index.tolist() == [list(range(24))]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_tokens(value, make_tokens, check_index):
    tokens = make_tokens(
        images=2, x=torch.full((2, 24, 8), value), cls_attention=torch.full((2, 1, 3, 24), 1 / 24)
    )
    for kept in (1, 5, 24):
        check_index(VisPruner().reduce(tokens, kept).index, kept, 24)


def test_newlines_go_first(make_tokens, check_index):
    attention = seen(2, 24)
    attention[..., 5::6] = -torch.inf
    tokens = make_tokens(images=2, x=features(2, 24), cls_attention=attention)
    index = VisPruner().reduce(tokens, 12).index
    check_index(index, 12, 24)
    assert not {5, 11, 17, 23} & set(index.flatten().tolist())


def test_defaults_and_registration(facts):
    method = get_method("vispruner")()
    assert isinstance(method, VisPruner)
    assert (method.keep, method.important_ratio) == (0.25, 0.5)
    (step,) = method.steps(facts(class_token=False))
    assert [(need.name, need.layers) for need in step.needs] == [("received_attention", (22,))]


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        VisPruner(keep=1.5)
    with pytest.raises(FoveateError, match="important_ratio"):
        VisPruner(important_ratio=1.5)
