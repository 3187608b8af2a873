"""DART: pivots by key norm, and what repeats them least."""

import pytest
import torch
import torch.nn.functional as F

from foveate.core import Step, get_method
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.methods.dart import DART

STEP = Step("llm", 2)


def naive(keys, states, text_keys, text_states, kept, own, asked, order=None):
    """One image, read from the paper: strongest keys are pivots, each takes what is unlike it."""
    total = len(states)
    image = sorted(range(total), key=lambda i: -float(keys[:, i].abs().sum()))[: min(own, kept)]
    text = sorted(range(len(text_states)), key=lambda i: -float(text_keys[:, i].abs().sum()))
    pivots = [states[i] for i in image] + [text_states[i] for i in text[:asked]]
    if order is not None:
        pivots = [pivots[i] for i in order]
    left = [i for i in range(total) if i not in image]
    picks = kept - len(image)
    taken = list(image)
    for number, pivot in enumerate(pivots):
        quota = picks // len(pivots) + (number < picks % len(pivots))
        left.sort(key=lambda i: float(F.cosine_similarity(pivot, states[i], dim=0)))
        taken, left = taken + left[:quota], left[quota:]
    return sorted(taken)


def signals(images, total, asked, seed=0, heads=3, width=16):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "llm_keys": random(images, 1, heads, total, 4),
        "question_keys": random(images, 1, heads, asked, 4),
        "normed_states": random(images, 1, total, width),
        "question_normed_states": random(images, 1, asked, width),
        "question_mask": torch.ones(images, asked, dtype=torch.bool),
        "prompt_positions": torch.arange(5, 5 + total).expand(images, -1),
        "question_positions": torch.arange(5 + total, 5 + total + asked).expand(images, -1),
    }


def rows_of(given, image):
    names = ("llm_keys", "normed_states", "question_keys", "question_normed_states")
    keys, states, text_keys, text_states = (given[name][image, 0] for name in names)
    mask = given["question_mask"][image]
    return keys, states, text_keys[:, mask], text_states[mask]


@pytest.mark.parametrize("kept", [1, 3, 4, 5, 11, 17, 24])
@pytest.mark.parametrize(("own", "asked"), [(4, 4), (2, 3), (1, 0), (7, 20)])
def test_equals_the_naive_loop(kept, own, asked, make_tokens, check_index):
    given = signals(3, 24, 9)
    given["question_mask"][1, 2:] = False  # a short question
    given["question_mask"][2] = False  # none
    method = DART(image_pivots=own, text_pivots=asked)
    index = method.reduce(make_tokens(images=3, **given), kept).index
    check_index(index, kept, 24)
    for image in range(3):
        assert index[image].tolist() == naive(*rows_of(given, image), kept, own, asked)


def test_without_any_text(make_tokens, check_index):
    given = signals(2, 24, 0)
    index = DART().reduce(make_tokens(images=2, **given), 10).index
    check_index(index, 10, 24)
    assert index[1].tolist() == naive(*rows_of(given, 1), 10, 4, 4)


def test_batch_equals_single(make_tokens):
    given = signals(4, 24, 9)
    given["question_mask"][2, 3:] = False
    together = DART().reduce(make_tokens(images=4, **given), 11).index
    for image in range(4):
        alone = {name: value[image : image + 1] for name, value in given.items()}
        alone_index = DART().reduce(make_tokens(**alone), 11).index
        assert torch.equal(together[image : image + 1], alone_index)


def test_padding_of_the_question_changes_nothing(make_tokens):
    given = signals(1, 24, 9)
    wanted = DART().reduce(make_tokens(**given), 11).index
    wide = dict(given)
    for name in ("question_keys", "question_normed_states"):
        wide[name] = torch.cat((given[name], 100 + torch.zeros_like(given[name])), -2)
    wide["question_mask"] = torch.cat((given["question_mask"], ~given["question_mask"]), 1)
    assert torch.equal(DART().reduce(make_tokens(**wide), 11).index, wanted)


def test_as_released_visits_pivots_as_python_visits_a_set(make_tokens):
    given = signals(2, 24, 9)
    given["prompt_positions"] = given["prompt_positions"] + torch.tensor([[0], [30]])
    given["question_positions"] = given["question_positions"] + torch.tensor([[0], [30]])
    method = DART(keep=13, as_released=True)
    assert method.count(24, 24, STEP, 0) == 4 + 8
    index = method.reduce(make_tokens(images=2, **given), 12).index
    for image in range(2):
        keys, _, text_keys, _ = rows_of(given, image)
        own = keys.abs().sum((0, 2)).topk(4).indices
        asked = text_keys.abs().sum((0, 2)).topk(4).indices
        places = [int(given["prompt_positions"][image, i]) for i in own]
        places += [int(given["question_positions"][image, i]) for i in asked]
        order = [places.index(place) for place in set(places)]
        assert order != sorted(order), "the test does not bite"
        wanted = naive(*rows_of(given, image), 12, 4, 4, order)
        assert index[image].tolist() == wanted


@pytest.mark.parametrize(("keep", "expected"), [(0.222, 4 + 15 * 8), (128, 4 + 16 * 8), (3, 4)])
def test_counts_as_released(keep, expected):
    assert DART(keep=keep, as_released=True).count(576, 576, STEP, 0) == expected


@pytest.mark.parametrize(("keep", "expected"), [(0.222, 127), (128, 128), (3, 3)])
def test_counts(keep, expected):
    assert DART(keep=keep).count(576, 576, STEP, 0) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_tokens(value, dtype, make_tokens, check_index):
    given = {
        name: torch.full_like(tensor, value).to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in signals(2, 24, 3).items()
    }
    for kept in (1, 4, 13, 23):
        check_index(DART().reduce(make_tokens(images=2, **given), kept).index, kept, 24)


def test_one_token(make_tokens):
    assert DART().reduce(make_tokens((1, 1), **signals(1, 1, 2)), 1).index.tolist() == [[0]]


@pytest.mark.parametrize(
    ("depth", "first", "layer"), [(32, 0, 2), (28, 0, 2), (80, 0, 5), (4, 0, 1), (4, 3, 3)]
)
def test_the_layer_scales_with_depth(depth, first, layer, facts):
    (step,) = DART().steps(facts(text_layers=depth, first_llm_layer=first))
    assert step.site == f"llm:{layer}"
    assert {need.name: need.layers for need in step.needs} == {
        "llm_keys": (layer - 1,),
        "question_keys": (layer - 1,),
        "normed_states": (layer,),
        "question_normed_states": (layer,),
    }


def test_a_given_layer_is_taken_as_it_is(facts):
    (step,) = DART(layer=7, as_released=True).steps(facts())
    assert step.site == "llm:7"
    assert {"prompt_positions", "question_positions"} < {need.name for need in step.needs}


def test_defaults_and_registration():
    method = get_method("dart")()
    assert isinstance(method, DART)
    assert (method.keep, method.published_positions) == (0.222, "original")


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        DART(keep=2.0)
    with pytest.raises(LayerError, match="at least 1"):
        DART(layer=0)
    with pytest.raises(FoveateError, match="image_pivots"):
        DART(image_pivots=0)
