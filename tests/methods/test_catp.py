"""CATP, as we read it: alignment and diversity first, then growing attention."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.methods.catp import CATP, aligned_and_diverse, alignment, growing
from foveate.methods.divprune import cosine_distance
from tests.core.test_schedule import Text


def scaled(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) for v in values]


def cosine(a, b):
    return float(F.cosine_similarity(a.double(), b.double(), dim=0))


def naive_choice(x, text, kept, balance):
    """One image: the greedy rule, everything rebuilt at each step."""
    aligned = scaled([sum(cosine(v, t) for t in text) / len(text) for v in x])
    picked = [aligned.index(max(aligned))]
    while len(picked) < kept:
        best, worth = -1, -math.inf
        for i in range(len(x)):
            far = min(1 - cosine(x[i], x[j]) for j in picked)
            value = balance * aligned[i] + (1 - balance) * far / 2
            if i not in picked and value > worth:
                best, worth = i, value
        picked.append(best)
    return picked


def naive_growth(attention, states, last):
    """One image: (V) scores."""
    early, late = attention.double().mean(1)
    grown = scaled((late - early).tolist())
    return [g * (1 + cosine(s, last)) / 2 for g, s in zip(grown, states, strict=True)]


@pytest.fixture
def asked():
    return {
        "question_embeddings": torch.randn(2, 4, 8) * torch.tensor([1, 1, 1, 0])[:, None],
        "question_mask": torch.tensor([[True, True, True, False], [False, True, True, False]]),
        "paired_mask": torch.tensor([[True, True, False, False], [False, True, True, False]]),
    }


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_first_choice_equals_a_naive_loop(balance, make_tokens, asked):
    x = torch.randn(2, 24, 8)
    tokens = make_tokens(images=2, x=x, **asked)
    aligned = alignment(tokens)
    order = aligned_and_diverse(cosine_distance(x), aligned, 9, balance)
    index = CATP(balance=balance).reduce(tokens, 9).index
    for i in range(2):
        text = asked["question_embeddings"][i][asked["paired_mask"][i]]
        want = naive_choice(x[i], text, 9, balance)
        assert order[i].tolist() == want
        assert index[i].tolist() == sorted(want)


def test_growth_equals_a_naive_loop(make_tokens, asked):
    signals = {
        "text_attention": torch.rand(2, 2, 4, 24),
        "llm_states": torch.randn(2, 1, 24, 8),
        "question_states": torch.randn(2, 1, 4, 8),
        "question_mask": asked["question_mask"],
    }
    tokens = replace(make_tokens(images=2, **signals), number=1)
    scores = growing(tokens)
    for i, last in enumerate((2, 2)):
        want = naive_growth(
            signals["text_attention"][i],
            signals["llm_states"][i, 0],
            signals["question_states"][i, 0, last],
        )
        torch.testing.assert_close(scores[i], torch.tensor(want), rtol=1e-4, atol=1e-6)
    index = CATP().reduce(tokens, 6).index
    assert torch.equal(index, scores.topk(6).indices.sort().values)


def test_attention_that_shrinks_counts_less(make_tokens):
    """The most attended token goes if attention leaves it."""
    attention = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.5, 0.2]]).view(1, 2, 1, 3)
    tokens = make_tokens(
        (1, 3),
        text_attention=attention,
        llm_states=torch.ones(1, 1, 3, 4),
        question_states=torch.ones(1, 1, 1, 4),
        question_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    assert growing(tokens)[0].argsort().tolist() == [1, 2, 0]


@pytest.mark.parametrize("width", [0, 2])
def test_nothing_to_go_by_is_no_nan(width, make_tokens):
    mask = torch.zeros(1, width, dtype=torch.bool)
    first = make_tokens(
        x=torch.ones(1, 24, 8), question_embeddings=torch.zeros(1, width, 8), paired_mask=mask
    )
    assert CATP().reduce(first, 5).index.tolist() == [[0, 1, 2, 3, 4]]
    later = make_tokens(
        text_attention=torch.zeros(1, 2, 4, 24),
        llm_states=torch.zeros(1, 1, 24, 8),
        question_states=torch.zeros(1, 1, width, 8),
        question_mask=mask,
    )
    assert (growing(later) == 0).all()
    assert CATP().reduce(replace(later, number=2), 5).index.unique().numel() == 5


def test_one_token(make_tokens, asked):
    signals = {name: signal[:1] for name, signal in asked.items()}
    tokens = make_tokens((1, 1), x=torch.randn(1, 1, 8), **signals)
    assert CATP().reduce(tokens, 1).index.tolist() == [[0]]


def test_steps_and_counts():
    method = get_method("catp")()
    steps = method.steps(Text())
    assert [s.site for s in steps] == ["pre_llm", "llm:6", "llm:8", "llm:10"]
    assert [s.needs[0].layers for s in steps[1:]] == [(5, 6), (7, 8), (9, 10)]
    assert [method.count(576, 576, s, i) for i, s in enumerate(steps)] == [288, 230, 173, 128]
    assert [s.site for s in CATP(keep=0.25).steps(Text())] == ["pre_llm"]


def test_growth_is_measured_between_layers_that_see_everything():
    steps = CATP().steps(Text(6, windowed=(0, 2, 4)))
    assert [(s.layer, s.needs[0].layers) for s in steps[1:]] == [(3, (1, 3))]


def test_wrong_arguments_are_refused():
    with pytest.raises(FoveateError, match="balance"):
        CATP(balance=1.5)
    with pytest.raises(BudgetError, match="2 steps"):
        CATP(layers=(3,))
    with pytest.raises(LayerError, match="begin at 1"):
        CATP(layers=(0,), keep=(0.5, 0.2))
    with pytest.raises(LayerError, match="none before it sees"):
        CATP(layers=(2,), keep=(0.5, 0.2)).steps(Text(6, windowed=(0, 1)))
