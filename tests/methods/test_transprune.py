"""TransPrune: transitions plus instruction attention."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import LayerError
from foveate.methods.transprune import TransPrune
from tests.core.test_schedule import Text


def naive(transition, attention, mask):
    """One image, token by token."""
    layers, total = transition.shape
    heads, asked = attention.shape[1:3]
    changed = [sum(float(transition[i, v]) for i in range(layers)) for v in range(total)]
    rows = [q for q in range(asked) if mask[q]]
    seen = []
    for v in range(total):
        means = [sum(float(attention[0, h, q, v]) for h in range(heads)) / heads for q in rows]
        seen.append(sum(means) / len(rows))
    pairs = list(zip(changed, seen, strict=True))
    return [c / (sum(changed) + 1e-8) + s / (sum(seen) + 1e-8) for c, s in pairs]


@pytest.fixture
def signals():
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    return {
        "transition": torch.rand(2, 3, 24),
        "question_attention": torch.rand(2, 1, 4, 5, 24) * mask[:, None, None, :, None],
        "question_mask": mask,
    }


def test_scores_equal_a_naive_loop(make_tokens, signals):
    scores = TransPrune().scores(make_tokens(images=2, **signals))
    for image in range(2):
        want = naive(*(signals[n][image] for n in ("transition", "question_attention")),
                     signals["question_mask"][image])  # fmt: skip
        torch.testing.assert_close(scores[image], torch.tensor(want))


def test_keeps_the_highest(make_tokens, signals, check_index):
    tokens = make_tokens(images=2, **signals)
    index = TransPrune().reduce(tokens, 7).index
    check_index(index, 7, 24)
    scores = TransPrune().scores(tokens)
    kept = scores.gather(1, index).amin(1)
    dropped = scores.scatter(1, index, -1.0).amax(1)
    assert (kept > dropped).all()


@pytest.mark.parametrize("asked", [0, 4])
def test_nothing_to_go_by_is_no_nan(asked, make_tokens):
    zero = {
        "transition": torch.zeros(1, 1, 6),
        "question_attention": torch.zeros(1, 1, 2, asked, 6),
        "question_mask": torch.zeros(1, asked, dtype=torch.bool),
    }
    tokens = make_tokens((2, 3), **zero)
    assert (TransPrune().scores(tokens) == 0).all()
    assert TransPrune().reduce(tokens, 2).index.shape == (1, 2)


def test_each_drop_sums_the_transitions_before_it():
    steps = TransPrune().steps(Text())
    summed = [{n.name: n.layers for n in step.needs} for step in steps]
    assert [s.layer for s in steps] == [7, 9, 12]
    assert [n["transition"] for n in summed] == [(6,), (6, 7, 8), (6, 7, 8, 9, 10, 11)]
    assert [n["question_attention"] for n in summed] == [(7,), (9,), (12,)]
    chosen = TransPrune(layers=(3, 5), keep=(0.7, 0.3), accumulate=(1, 2, 4)).steps(Text(8))
    assert [s.needs[0].layers for s in chosen] == [(1, 2), (1, 2, 4)]


def test_accumulation_must_begin_before_the_first_drop():
    with pytest.raises(LayerError, match="accumulate must begin before"):
        TransPrune(accumulate=(7,)).steps(Text())


@pytest.mark.parametrize("accumulate", [(), (6, 5), (3, 3)])
def test_accumulated_layers_ascend(accumulate):
    with pytest.raises(LayerError, match="accumulate must be ascending"):
        TransPrune(accumulate=accumulate)


def test_counts_are_the_published_ones():
    method = get_method("transprune")()
    steps = method.steps(Text())
    assert [method.count(576, 576, s, i) for i, s in enumerate(steps)] == [504, 360, 72]
