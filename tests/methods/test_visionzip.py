"""VisionZip: dominant tokens by attention, contextual ones merged by likeness of keys."""

import math

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError
from foveate.methods.visionzip import VisionZip


def given(images, total, seed=0, heads=2, width=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        "cls_attention": torch.rand(images, 1, heads, total, generator=generator),
        "encoder_keys": torch.randn(images, 1, heads, total, width, generator=generator),
    }


def by_hand(scores, keys, x, dominant, contextual):
    """Tokens and values of one image, with plain loops over lists."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen = sorted(ranked[:dominant])
    rest = [i for i in range(len(scores)) if i not in chosen]
    step = max(1, len(rest) // contextual)
    targets = [rest[i * step] for i in range(contextual)]
    members = {target: [] for target in targets}

    def cosine(a, b):
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        return dot / (math.hypot(*a) * math.hypot(*b) or 1)

    for token in rest:
        if token not in members:
            best = max(targets, key=lambda target: cosine(keys[token], keys[target]))
            members[best].append(token)
    values = [x[i] for i in chosen]
    for target in targets:
        mean = sum((x[i] for i in members[target]), torch.zeros_like(x[0]))
        values.append(x[target] + mean / max(len(members[target]), 1))
    return chosen + targets, torch.stack(values)


@pytest.mark.parametrize(("count", "contextual"), [(8, 3), (5, 1), (12, 6), (23, 1), (4, 4)])
def test_it_gives_what_a_plain_loop_gives(count, contextual, make_tokens):
    signals, x = given(3, 24), torch.randn(3, 24, 5)
    reduction = VisionZip(contextual=contextual).reduce(
        make_tokens(images=3, x=x, **signals), count
    )
    assert reduction.ordered
    got = reduction.apply(x)
    for image in range(3):
        index, values = by_hand(
            signals["cls_attention"][image, 0].sum(0).tolist(),
            signals["encoder_keys"][image, 0].mean(0).tolist(),
            x[image],
            count - contextual,
            contextual,
        )
        assert reduction.index[image].tolist() == index
        torch.testing.assert_close(got[image], values)


def test_every_token_goes_somewhere(make_tokens):
    reduction = VisionZip(contextual=3).reduce(make_tokens(images=2, **given(2, 24)), 8)
    assert reduction.sizes(24).sum(1).tolist() == [24, 24]
    assert reduction.sizes(24)[:, :5].eq(1).all()


def test_without_contextual_tokens_the_rest_is_dropped(make_tokens, check_index):
    signals = given(2, 24)
    reduction = VisionZip(contextual=0).reduce(make_tokens(images=2, **signals), 6)
    check_index(reduction.index, 6, 24)
    assert not reduction.merges


@pytest.mark.parametrize(
    ("count", "contextual"), [(64, 10), (128, 20), (192, 30), (32, 5), (640, 100)]
)
def test_default_split_is_the_published_one(count, contextual, make_tokens):
    tokens = make_tokens((27, 27), **given(1, 729))
    sizes = VisionZip().reduce(tokens, count).sizes(729)[0]
    assert len(sizes) == count
    assert sizes[: count - contextual].eq(1).all()
    assert sizes[count - contextual :].sum() == 729 - count + contextual


def test_received_attention_ranks_where_there_is_no_class_token(make_tokens, facts):
    signals = given(1, 24)
    received = torch.rand(1, 1, 24)
    tokens = make_tokens(received_attention=received, encoder_keys=signals["encoder_keys"])
    index = VisionZip(contextual=0).reduce(tokens, 6).index
    assert index[0].tolist() == sorted(received[0, 0].topk(6).indices.tolist())
    for class_token, name in ((True, "cls_attention"), (False, "received_attention")):
        (step,) = VisionZip().steps(facts(class_token=class_token))
        assert [(n.name, n.layers) for n in step.needs] == [(name, (22,)), ("encoder_keys", (22,))]


def test_newlines_are_not_merged_into_others(make_tokens):
    signals, x = given(1, 24), torch.randn(1, 24, 5)
    signals["cls_attention"][..., 5::6] = -torch.inf
    signals["encoder_keys"][..., 5::6, :] = 0
    x[:, 5::6] = torch.nan
    reduction = VisionZip(contextual=2).reduce(make_tokens(x=x, **signals), 8)
    assert reduction.slot[0, 5::6].tolist() == [-1] * 4
    assert reduction.apply(x.nan_to_num()).isfinite().all()
    assert reduction.sizes(24).sum() == 20


def test_batch_equals_single(make_tokens):
    signals, x = given(3, 24), torch.randn(3, 24, 5)
    together = VisionZip().reduce(make_tokens(images=3, x=x, **signals), 9)
    for image in range(3):
        one = slice(image, image + 1)
        part = {name: signal[one] for name, signal in signals.items()}
        alone = VisionZip().reduce(make_tokens(x=x[one], **part), 9)
        assert torch.equal(together.index[one], alone.index)
        torch.testing.assert_close(together.apply(x)[one], alone.apply(x[one]))


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_and_zero_signals_give_finite_values(value, make_tokens):
    total, x = 6, torch.ones(1, 6, 5)
    signals = {
        "cls_attention": torch.full((1, 1, 2, total), value),
        "encoder_keys": torch.full((1, 1, 2, total, 4), value),
    }
    for count in range(1, total):
        reduction = VisionZip(contextual=min(2, count)).reduce(
            make_tokens((2, 3), x=x, **signals), count
        )
        assert reduction.index[0].unique().numel() == count
        assert reduction.apply(x).isfinite().all()


def test_defaults_and_registration():
    method = get_method("visionzip")()
    assert isinstance(method, VisionZip)
    assert (method.keep, method.contextual, method.published_positions) == (64, None, "renumbered")


def test_wrong_arguments_are_refused(make_tokens):
    with pytest.raises(BudgetError):
        VisionZip(keep=0)
    with pytest.raises(BudgetError, match="contextual"):
        VisionZip(contextual=-1)
    with pytest.raises(BudgetError, match="contextual"):
        VisionZip(contextual=9).reduce(make_tokens(**given(1, 24)), 8)
