"""Recoverable Compression: two filters sized by outliers, and clusters of the rest."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from foveate.core import get_method
from foveate.errors import FoveateError
from foveate.methods.recoverablecompression import RecoverableCompression
from tests.ops.test_outliers import naive_outliers

WIDTH, HEADS = 24, 3


def highest(values, among, count):
    return sorted(among, key=lambda i: -values[i])[:count]


def naive(x, seen, keys, asked, method):
    """One image, step by step as published: places and values of the survivors."""
    total = len(seen)
    everything = list(range(total))

    def share(count, part, whole):
        return int(count * (part / whole)) if method.as_released else count * part // whole

    found = sum(naive_outliers(seen, method.neighbours))
    visual = highest(seen, everything, max(share(total, found, total), 1))
    lowered = [min(asked) if i in visual else asked[i] for i in everything]
    found = sum(naive_outliers(lowered, method.neighbours))
    rest = [i for i in everything if i not in visual]
    recovered = highest(lowered, rest, share(len(rest), found, total))
    main = sorted(visual + recovered)
    rest = [i for i in everything if i not in main]
    found = sum(naive_outliers([seen[i] for i in rest], method.centre_neighbours))
    if method.as_released:
        found = min(share(WIDTH, found, len(rest)), len(rest))
    key = dict(zip(rest, keys[: len(rest)] if method.as_released else keys[rest], strict=True))
    centres = highest(seen, rest, found)
    places, values = list(main), [x[i] for i in main]
    for centre in centres:
        likeness = {
            i: float(F.cosine_similarity(key[centre], key[i], dim=0))
            + method.text_weight * asked[i]
            for i in rest
            if i != centre
        }
        members = highest(likeness, likeness, method.cluster_size)
        places.append(centre)
        values.append(x[centre] + sum(seen[i] * x[i] for i in members))
    spare = [i for i in rest if i not in centres]
    if centres and spare:
        places.append(highest(seen, spare, 1)[0])
        values.append(sum(seen[i] * x[i] for i in spare))
    return places, torch.stack(values)


def sample(images=3, total=60, seed=0):
    """Features, attention with a heavy tail, keys and a question."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    attention = (2 * random(images, total)).softmax(1)
    return {
        "x": random(images, total, 16),
        "joint_cls_attention": attention[:, None],
        "encoder_keys": random(images, 1, HEADS, total, WIDTH // HEADS),
        "question_embeddings": random(images, 4, 16) + 0.3,
        "question_mask": torch.ones(images, 4, dtype=torch.bool),
    }


def asked_of(given, image):
    text = given["question_embeddings"][image][given["question_mask"][image]]
    likeness = F.cosine_similarity(given["x"][image][:, None], text[None], dim=-1)
    return (likeness.mean(1) / math.sqrt(given["x"].shape[-1])).tolist()


def reduced(method, tokens):
    """Places and values of each image's survivors."""
    found = {}
    for members, reduction in method.reduce_each(tokens):
        values = reduction.apply(tokens.x[torch.tensor(members)])
        assert reduction.ordered
        for number, member in enumerate(members):
            assert member not in found
            found[member] = reduction.index[number].tolist(), values[number]
    return [found[i] for i in range(len(tokens.index))]


@pytest.mark.parametrize(
    "method",
    [
        RecoverableCompression(),
        RecoverableCompression(as_released=True),
        RecoverableCompression(neighbours=5, centre_neighbours=4, cluster_size=3),
        RecoverableCompression(cluster_size=100, text_weight=0.0),
    ],
    ids=["default", "released", "small", "large"],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_naive_steps(method, seed, make_tokens):
    given = sample(seed=seed)
    given["question_mask"][1, 2:] = False
    found = reduced(method, make_tokens((1, 60), images=3, **given))
    clusters = 0
    for image, (places, values) in enumerate(found):
        keys = given["encoder_keys"][image, 0].transpose(0, 1).flatten(1)
        seen = given["joint_cls_attention"][image, 0].tolist()
        wanted = naive(given["x"][image], seen, keys, asked_of(given, image), method)
        assert places == wanted[0]
        # Attention is taken as float32, as the release has it.
        torch.testing.assert_close(values.double(), wanted[1], rtol=1e-5, atol=1e-6)
        clusters += any(b < a for a, b in pairwise(places))
    assert clusters, "the test does not bite"


@pytest.mark.parametrize("seed", [28, 36, 51])
def test_the_released_counts_are_products_of_rounded_shares(seed, make_tokens):
    """16 of 49 times 49 fall just below 16, so that one fewer is kept."""
    given = sample(1, 49, seed)
    seen = given["joint_cls_attention"][0, 0].tolist()
    found = sum(naive_outliers(seen, 20))
    assert int(49 * (found / 49)) == found - 1, "the test does not bite"
    tokens = make_tokens((1, 49), **given)
    keys = given["encoder_keys"][0, 0].transpose(0, 1).flatten(1)
    for method in (RecoverableCompression(as_released=True), RecoverableCompression()):
        ((places, _),) = reduced(method, tokens)
        wanted, _ = naive(given["x"][0], seen, keys, asked_of(given, 0), method)
        assert places == wanted


def test_batch_equals_single(make_tokens):
    given = sample(5)
    together = reduced(RecoverableCompression(), make_tokens((1, 60), images=5, **given))
    assert len({len(places) for places, _ in together}) > 1, "the test does not bite"
    for image, (places, values) in enumerate(together):
        alone = {name: value[image : image + 1] for name, value in given.items()}
        ((one, alone_values),) = reduced(RecoverableCompression(), make_tokens((1, 60), **alone))
        assert places == one
        torch.testing.assert_close(values, alone_values)


def test_tokens_that_are_no_patches_are_dropped(make_tokens):
    given = sample(1)
    wanted = reduced(RecoverableCompression(), make_tokens((1, 60), **given))[0]
    wide = {}
    for name, value in given.items():
        axis = {"x": 1, "joint_cls_attention": 2, "encoder_keys": 3}.get(name)
        if axis is not None:
            blank = torch.full_like(value.narrow(axis, 0, 5), 0.0 if axis != 2 else -math.inf)
            value = torch.cat((value.narrow(axis, 0, 30), blank, value.narrow(axis, 30, 30)), axis)
        wide[name] = value
    places, values = reduced(RecoverableCompression(), make_tokens((1, 65), **wide))[0]
    assert places == [i if i < 30 else i + 5 for i in wanted[0]]
    torch.testing.assert_close(values, wanted[1])


def test_clip_space(make_tokens):
    given = sample(1)
    text, mask = given.pop("question_embeddings"), given.pop("question_mask")
    patches = torch.randn(1, 60, 16, dtype=torch.float64)
    tokens = make_tokens(
        (1, 60), clip_plain_patches=patches[:, None], clip_questions=text,
        clip_questions_mask=mask, **given,
    )  # fmt: skip
    places, _ = reduced(RecoverableCompression(relevance="clip"), tokens)[0]
    asked = asked_of({"x": patches, "question_embeddings": text, "question_mask": mask}, 0)
    keys = given["encoder_keys"][0, 0].transpose(0, 1).flatten(1)
    seen = given["joint_cls_attention"][0, 0].tolist()
    assert places == naive(given["x"][0], seen, keys, asked, RecoverableCompression())[0]


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_tokens_keep_one(value, make_tokens):
    given = {
        name: torch.full_like(tensor, value) if tensor.is_floating_point() else tensor
        for name, tensor in sample(2).items()
    }
    for places, values in reduced(
        RecoverableCompression(), make_tokens((1, 60), images=2, **given)
    ):
        assert places == [0]
        assert values.isfinite().all()


@pytest.mark.parametrize("total", [1, 2, 5, 24])
@pytest.mark.parametrize("as_released", [False, True])
def test_few_tokens(total, as_released, make_tokens):
    method = RecoverableCompression(as_released=as_released)
    for seed in range(5):
        given = sample(2, total, seed)
        for places, values in reduced(method, make_tokens((1, total), images=2, **given)):
            assert 1 <= len(places) == len(set(places)) <= total
            assert values.isfinite().all()


def test_needs_and_registration(facts):
    method = get_method("recoverable-compression")()
    assert isinstance(method, RecoverableCompression)
    assert (method.keep, method.published_positions) == (None, "renumbered")
    (step,) = method.steps(facts())
    assert step.site == "pre_llm"
    assert {need.name: need.layers for need in step.needs} == {
        "joint_cls_attention": (23,),
        "encoder_keys": (23,),
        "question_embeddings": (),
    }
    (step,) = RecoverableCompression(relevance="clip").steps(facts())
    assert [(n.name, n.layers) for n in step.needs[2:]] == [
        ("clip_plain_patches", (23,)),
        ("clip_questions", ()),
    ]


def test_wrong_arguments_are_refused():
    with pytest.raises(FoveateError, match="relevance must be"):
        RecoverableCompression(relevance="siglip")
    with pytest.raises(FoveateError, match="cluster_size must be at least 1"):
        RecoverableCompression(cluster_size=0)
