"""CDPruner: a determinantal point process, conditioned on the question."""

import pytest
import torch
import torch.nn.functional as F

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.cdpruner import CDPruner


def naive_relevance(x, text, negate=False):
    """Mean cosine to the text, scaled to [0, 1] by the definition."""
    values = [float(F.cosine_similarity(row[None], text).mean()) for row in x]
    values = [-value if negate else value for value in values]
    low, high = min(values), max(values)
    return torch.tensor([(value - low + 1e-6) / (high - low) for value in values]).double()


def naive_choice(x, relevance, kept):
    """Every pick tries every token, and takes the one with the largest determinant."""
    unit = F.normalize(x, dim=-1)
    cosine = (unit @ unit.T).fill_diagonal_(1)
    kernel = relevance[:, None] * cosine * relevance
    picked = []
    while len(picked) < kept:
        trials = [i for i in range(len(x)) if i not in picked]
        found = {i: kernel[[*picked, i]][:, [*picked, i]].logdet().item() for i in trials}
        picked.append(max(found, key=found.get))
    return sorted(picked)


def sample(images=3, total=24, asked=5, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, total, width, generator=generator, dtype=torch.float64)
    text = torch.randn(images, asked, width, generator=generator, dtype=torch.float64)
    return x, text, torch.ones(images, asked, dtype=torch.bool)


@pytest.fixture
def reduce(make_tokens):
    """Reduce by the language model's embeddings."""

    def run(method, x, text, mask, kept, **more):
        tokens = make_tokens(
            images=len(x), x=x, question_embeddings=text, question_mask=mask, **more
        )
        return method.reduce(tokens, kept).index

    return run


@pytest.mark.parametrize("kept", [1, 2, 7, 15])
@pytest.mark.parametrize("negate", [None, True])
def test_equals_the_naive_loop(kept, negate, reduce, check_index):
    x, text, mask = sample()
    mask[1, 2:] = False
    index = reduce(CDPruner(negate=negate), x, text, mask, kept)
    check_index(index, kept, 24)
    for image in range(3):
        relevance = naive_relevance(x[image], text[image][mask[image]], negate)
        assert index[image].tolist() == naive_choice(x[image], relevance, kept)


@pytest.mark.parametrize("negate", [None, False])
def test_clip_counts_tokens_that_resemble_the_text_less(negate, make_tokens):
    x, _, _ = sample()
    patches, text, mask = sample(width=8, asked=2, seed=1)
    tokens = make_tokens(
        images=3, x=x, clip_patches=patches[:, None], clip_questions=text, clip_questions_mask=mask
    )
    index = CDPruner(relevance="clip", negate=negate).reduce(tokens, 7).index
    for image in range(3):
        relevance = naive_relevance(patches[image], text[image], negate is None)
        assert index[image].tolist() == naive_choice(x[image], relevance, 7)


def test_the_most_relevant_token_is_kept(reduce):
    x, text, mask = sample()
    x[:, 9] = 2 * text.mean(1)
    assert (reduce(CDPruner(), x, text, mask, 2) == 9).any(1).all()
    assert not (reduce(CDPruner(negate=True), x, text, mask, 12) == 9).any()


def test_batch_equals_single(reduce):
    x, text, mask = sample(4)
    mask[2, 1:] = False
    together = reduce(CDPruner(), x, text, mask, 9)
    for image in range(4):
        part = slice(image, image + 1)
        assert torch.equal(together[part], reduce(CDPruner(), x[part], text[part], mask[part], 9))


def test_as_released_scales_over_the_images_of_a_prompt(make_tokens):
    x, text, mask = sample(4)
    text = text[:1].expand(4, -1, -1)
    tokens = make_tokens(images=4, x=x, question_embeddings=text, question_mask=mask)
    object.__setattr__(tokens, "rows", (0, 0, 2, 0))
    relevance = CDPruner(as_released=True).scaled_relevance(tokens)
    mine = CDPruner().scaled_relevance(tokens)
    row = relevance[[0, 1, 3]]
    assert row.min() < 1e-4
    torch.testing.assert_close(row.max(), torch.tensor(1.0).double(), rtol=0, atol=1e-4)
    assert (row.amin(1) > 1e-3).sum() == 2  # one lowest token in three images
    torch.testing.assert_close(relevance[2], mine[2])
    assert (mine.amin(1) < 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_constant_tokens(value, dtype, reduce, check_index):
    _, text, mask = sample(2)
    x = torch.full((2, 24, 32), value, dtype=dtype)
    for kept in (1, 5, 23):
        check_index(reduce(CDPruner(), x, text.to(dtype), mask, kept), kept, 24)


def test_beyond_the_rank_the_most_relevant_follow(reduce):
    """Five kinds of tokens: the first of each is diversity, then relevance decides."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(5, 32, generator=generator)
    x = kinds[torch.arange(24) % 5][None]
    text = kinds[2][None, None]
    index = reduce(CDPruner(), x, text, torch.ones(1, 1, dtype=torch.bool), 9)[0]
    found = torch.bincount(index % 5, minlength=5)
    assert found[2] == 5  # all tokens of the kind that is asked for
    assert (found >= 1).sum() >= 4  # the least relevant kind weighs nothing


def test_without_text_it_is_pure_diversity(reduce):
    x, text, mask = sample()
    index = reduce(CDPruner(), x, text, torch.zeros_like(mask), 7)
    none = reduce(CDPruner(), x, text[:, :0], mask[:, :0], 7)
    assert torch.equal(index, none)
    for image in range(3):
        ones = torch.ones(24, dtype=torch.float64)
        assert index[image].tolist() == naive_choice(x[image], ones, 7)


def test_tokens_of_zero_length_come_last(reduce):
    x, text, mask = sample(1)
    x[0, [0, 5]] = 0
    index = reduce(CDPruner(), x, text, torch.zeros_like(mask), 20)
    assert not set(index[0].tolist()) & {0, 5}


def test_one_token(reduce):
    x, text, mask = sample(1, total=1)
    tokens = reduce(CDPruner(), x, text, mask, 1, grid=(1, 1))
    assert tokens.tolist() == [[0]]


def test_defaults_and_registration(facts):
    method = get_method("cdpruner")()
    assert (method.keep, method.published_positions) == (64, "renumbered")
    (step,) = method.steps(facts())
    assert (step.site, [need.name for need in step.needs]) == ("pre_llm", ["question_embeddings"])
    (step,) = CDPruner(relevance="clip").steps(facts())
    assert [(n.name, n.layers) for n in step.needs] == [
        ("clip_patches", (22,)),
        ("clip_questions", ()),
    ]


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        CDPruner(keep=2.0)
    with pytest.raises(FoveateError, match="relevance must be"):
        CDPruner(relevance="siglip")
