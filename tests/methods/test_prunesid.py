"""PruneSID: groups by principal components, and quotas by what repeats least."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError
from foveate.methods.prunesid import PruneSID, component, not_repeated, quotas
from tests.methods.chance import seen


def features(images, total, width=16, alike=0.8, seed=1):
    """(G, 1, V, C) that are more or less alike."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(images, 1, total, width, generator=generator)
    return own + alike * torch.randn(images, 1, 1, width, generator=generator)


@pytest.mark.parametrize("kept", [1, 3, 8, 20, 40, 62, 63])
@pytest.mark.parametrize(("width", "alike"), [(16, 0.8), (96, 0.8), (16, 2.0), (16, 0.0)])
def test_it_keeps_what_a_plain_loop_keeps(
    kept, width, alike, make_tokens, check_index, transcribed
):
    """With more tokens than channels, and with fewer."""
    x, attention = features(3, 63, width, alike), seen(3, 63)
    tokens = make_tokens((7, 9), images=3, encoder_features=x, cls_attention=attention)
    index = PruneSID().reduce(tokens, kept).index
    check_index(index, kept, 63)
    for image in range(3):
        tensors = {"encoder_features": x[image], "cls_attention": attention[image]}
        wanted = transcribed("prunesid").transcription(tensors, kept)
        assert index[image].tolist() == wanted.tolist()


def test_groups_are_what_varies_together():
    """Tokens that are one pattern, whatever its sign, are one group."""
    wave, other = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    x = torch.stack((wave, -wave, 1.2 * wave, 0.4 * other, -0.4 * other))[None]
    for wide in (x, x[..., :4]):  # more tokens than channels too
        group = component(wide, 2)[0].tolist()
        assert group[:3] == [0, 0, 0]
        assert group[3:] == [1, 1]


def test_components_without_variance_have_no_tokens():
    """Beyond the rank of the features, rounding alone would choose."""
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).expand(2, 30, 3)
    assert component(x, 8).tolist() == [[0] * 30] * 2
    assert component(torch.zeros(1, 6, 4), 3).tolist() == [[0] * 6]


def test_the_same_image_keeps_the_same_tokens(make_tokens):
    """The release's randomised decomposition does not promise that."""
    x, attention = features(1, 63), seen(1, 63)
    tokens = make_tokens((7, 9), encoder_features=x, cls_attention=attention)
    torch.manual_seed(0)
    first = PruneSID().reduce(tokens, 20).index
    torch.manual_seed(1)
    assert torch.equal(PruneSID().reduce(tokens, 20).index, first)


def test_repetitions_are_suppressed_within_their_group():
    like = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1, 0.8], [0.2, 0.8, 1]])[None]
    rank, candidates = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool)
    for group, wanted in (([0, 0, 0], [1, 0, 1]), ([0, 1, 1], [1, 1, 0]), ([0, 1, 2], [1, 1, 1])):
        fresh = not_repeated(like, torch.tensor([group]), rank, candidates, torch.tensor([0.7]))
        assert fresh.int().tolist() == [wanted]


def test_quotas_are_shared_by_what_is_not_repeated():
    size, survivors = torch.tensor([[9, 9, 9, 0]]), torch.tensor([[4, 2, 2, 0]])
    assert quotas(size, survivors, 7, 7).tolist() == [[3, 2, 2, 0]]
    # One each and four to share, of which bounds let none have more than all that is fresh; bounds
    # grow until the budget fits, and the group with most fresh tokens takes what is left.
    assert quotas(size, torch.tensor([[5, 1, 1, 0]]), 10, 10).tolist() == [[6, 2, 2, 0]]


def test_batch_equals_single(make_tokens):
    x, attention = features(4, 24), seen(4, 24)
    tokens = make_tokens(images=4, encoder_features=x, cls_attention=attention)
    together = PruneSID().reduce(tokens, 9).index
    for image in range(4):
        one = slice(image, image + 1)
        alone = make_tokens(encoder_features=x[one], cls_attention=attention[one])
        assert torch.equal(PruneSID().reduce(alone, 9).index, together[one])


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_tokens(value, dtype, make_tokens, check_index):
    tokens = make_tokens(
        images=2,
        encoder_features=torch.full((2, 1, 24, 8), value, dtype=dtype),
        received_attention=torch.full((2, 1, 24), 1 / 24),
    )
    for kept in (1, 5, 16, 24):
        check_index(PruneSID().reduce(tokens, kept).index, kept, 24)


def test_newlines_come_last(make_tokens, check_index):
    x, attention = features(2, 24), seen(2, 24)
    attention[..., 5::6] = -torch.inf
    x[:, :, 5::6] = 0
    tokens = make_tokens(images=2, encoder_features=x, cls_attention=attention)
    index = PruneSID().reduce(tokens, 12).index
    check_index(index, 12, 24)
    assert not {5, 11, 17, 23} & set(index.flatten().tolist())
    check_index(PruneSID().reduce(tokens, 24).index, 24, 24)


def test_defaults_and_registration(facts):
    method = get_method("prunesid")()
    assert isinstance(method, PruneSID)
    assert method.keep == 192
    (step,) = method.steps(facts(class_token=False))
    names = [(need.name, need.layers) for need in step.needs]
    assert names == [("received_attention", (22,)), ("encoder_features", (22,))]


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        PruneSID(keep=0)
