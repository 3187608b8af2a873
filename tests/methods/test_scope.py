"""SCOPE: greedy choice by coverage times saliency."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.scope import SCOPE
from tests.methods.chance import features, seen


@pytest.mark.parametrize("kept", [1, 2, 9, 23, 24])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.5])
def test_it_keeps_what_a_plain_loop_keeps(kept, alpha, make_tokens, check_index, transcribed):
    x, attention = features(3, 24), seen(3, 24)
    tokens = make_tokens(images=3, x=x, cls_attention=attention)
    index = SCOPE(alpha=alpha).reduce(tokens, kept).index
    check_index(index, kept, 24)
    for image in range(3):
        tensors = {"x": x[image], "cls_attention": attention[image]}
        wanted = transcribed("scope").transcription(tensors, kept, alpha)
        assert index[image].tolist() == wanted.tolist()


def test_each_pick_covers_what_others_do_not(make_tokens):
    """Three alike and salient tokens count once; the fourth is chosen for being different."""
    x = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]]])
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 1, 4)
    tokens = make_tokens((1, 4), x=x, cls_attention=attention)
    assert SCOPE().reduce(tokens, 2).index.tolist() == [[0, 3]]


def test_saliency_decides_between_equally_covering_tokens(make_tokens):
    x = torch.eye(4)[None]
    attention = torch.tensor([0.1, 0.4, 0.2, 0.3]).view(1, 1, 1, 4)
    tokens = make_tokens((2, 2), x=x, cls_attention=attention)
    assert SCOPE().reduce(tokens, 2).index.tolist() == [[1, 3]]
    assert SCOPE(alpha=0.0).reduce(tokens, 2).index.tolist() == [[0, 1]]


def test_a_head_counts_by_what_it_gives_to_patches(make_tokens):
    """As in the release, each head's attention is a share of what patches get of it."""
    attention = torch.tensor([[0.05, 0.01, 0.01], [0.2, 0.35, 0.35]]).view(1, 1, 2, 3)
    tokens = make_tokens((1, 3), x=torch.eye(3)[None], cls_attention=attention)
    assert SCOPE().reduce(tokens, 1).index.tolist() == [[0]]


def test_without_a_class_token_attention_received_counts(make_tokens, facts):
    tokens = make_tokens(
        (1, 3), x=torch.eye(3)[None], received_attention=torch.tensor([[[0.1, 0.2, 0.7]]])
    )
    assert SCOPE().reduce(tokens, 1).index.tolist() == [[2]]
    for class_token, name in ((True, "cls_attention"), (False, "received_attention")):
        (step,) = SCOPE().steps(facts(class_token=class_token))
        assert (step.site, [(n.name, n.layers) for n in step.needs]) == ("pre_llm", [(name, (22,))])


def test_smaller_budget_keeps_a_part_and_batches_change_nothing(make_tokens):
    x, attention = features(4, 24), seen(4, 24)
    tokens = make_tokens(images=4, x=x, cls_attention=attention)
    long, short = (SCOPE().reduce(tokens, kept).index for kept in (15, 6))
    for image in range(4):
        assert set(short[image].tolist()) < set(long[image].tolist())
        one = slice(image, image + 1)
        alone = make_tokens(x=x[one], cls_attention=attention[one])
        assert torch.equal(SCOPE().reduce(alone, 15).index, long[one])


def test_many_updates_do_not_add_up_rounding(make_tokens, transcribed):
    """Alike tokens begin with gains in the hundreds, and end with thousandths."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.05 * torch.randn(1, 400, 16, generator=generator)
    attention = seen(1, 400)
    index = SCOPE().reduce(make_tokens((20, 20), x=x, cls_attention=attention), 200).index
    tensors = {"x": x[0].double(), "cls_attention": attention[0].double()}
    wanted = transcribed("scope").transcription(tensors, 200).tolist()
    assert len(set(index[0].tolist()) & set(wanted)) >= 198


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_tokens_are_never_picked_twice(value, dtype, make_tokens, check_index):
    x = torch.full((2, 24, 8), value, dtype=dtype)
    attention = torch.full((2, 1, 3, 24), 1 / 24)
    for kept in (1, 5, 24):
        index = SCOPE().reduce(make_tokens(images=2, x=x, cls_attention=attention), kept).index
        check_index(index, kept, 24)
        assert index[0].tolist() == list(range(kept))


@pytest.mark.parametrize("images", [1, 2, 5])
def test_tokens_that_rounding_tells_apart_are_picked_by_index(images, make_tokens):
    """Of six kinds of tokens, once each is covered, what is left is rounding."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(6, 16, generator=generator)[torch.randint(6, (24,), generator=generator)]
    x = kinds * (1 + 1e-7 * torch.randn(5, 24, 16, generator=generator))
    attention = seen(1, 24).expand(5, -1, -1, -1)
    kept = [
        SCOPE().reduce(make_tokens(images=n, x=x[-n:], cls_attention=attention[:n]), 12).index
        for n in (5, images)
    ]
    assert bool((kept[0] == kept[0][:1]).all())
    assert torch.equal(kept[0][:images], kept[1])


@pytest.mark.parametrize("alike", [False, True])
def test_newlines_come_last(alike, make_tokens, check_index):
    """Also after tokens that add nothing."""
    attention = seen(2, 24)
    attention[..., 5::6] = -torch.inf
    x = torch.ones(2, 24, 8) if alike else features(2, 24)
    tokens = make_tokens(images=2, x=x, cls_attention=attention)
    for kept in (20, 22, 24):
        index = SCOPE().reduce(tokens, kept).index
        check_index(index, kept, 24)
        assert len({5, 11, 17, 23} & set(index[0].tolist())) == kept - 20


def test_defaults_and_registration():
    method = get_method("scope")()
    assert isinstance(method, SCOPE)
    assert (method.keep, method.alpha, method.published_positions) == (0.25, 1.0, "renumbered")


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        SCOPE(keep=0)
    with pytest.raises(FoveateError, match="alpha"):
        SCOPE(alpha=-1.0)
