"""FoPru: attention received or given among patches, ranked by token or by row."""

import statistics

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError, InputError
from foveate.methods.fopru import FoPru


def maps(images, total, special, seed=0, sharp=2.0):
    """(G, S + V, S + V) attention of one layer, mean over heads."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, total + special, total + special, generator=generator)
    columns = torch.randn(images, 1, total + special, generator=generator)
    return (logits + sharp * columns).softmax(-1)


def signals(attention, special):
    """What the engine would deliver of such a layer."""
    found = {
        "received_attention": attention.mean(1)[:, None, special:],
        "given_attention": attention[:, special:, special:].sum(-1)[:, None],
    }
    if special:
        found["cls_attention"] = attention[:, None, None, 0, special:]
    return found


def by_hand(attention, special):
    """Received or given attention among the patches of one image, whichever varies more."""
    rows = attention[special:, special:].tolist()
    total = len(rows)
    received = [sum(row[j] for row in rows) / total for j in range(total)]
    given = [sum(row) / total for row in rows]
    use_received = statistics.variance(received) > statistics.variance(given)
    return received if use_received else given


@pytest.mark.parametrize("special", [0, 1])
@pytest.mark.parametrize("sharp", [0.0, 2.0])
def test_scores_are_those_of_the_whole_map(special, sharp, make_tokens):
    attention = maps(3, 24, special, sharp=sharp)
    scores = FoPru().scores(make_tokens(images=3, **signals(attention, special)))
    for image in range(3):
        expected = torch.tensor(by_hand(attention[image], special))
        torch.testing.assert_close(scores[image] / 24, expected, rtol=1e-4, atol=1e-7)


def test_given_attention_ranks_where_it_varies_more(make_tokens):
    """A class token that takes all of some patches' attention, and none of others'."""
    attention = torch.full((1, 7, 7), 1 / 7)
    for row, share in enumerate((0.9, 0.1, 0.5, 0.3, 0.7, 0.2), 1):
        attention[0, row, 0] = share
        attention[0, row, 1:] = (1 - share) / 6
    tokens = make_tokens((2, 3), **signals(attention, 1))
    assert FoPru().reduce(tokens, 2).index[0].tolist() == [1, 5]
    torch.testing.assert_close(
        FoPru().scores(tokens)[0], torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3, 0.8])
    )


def test_images_of_a_batch_may_use_different_vectors(make_tokens):
    wide, narrow = maps(1, 24, 1, sharp=3.0), maps(1, 24, 1, seed=1, sharp=0.0)
    narrow[:, 1:, 0] = torch.linspace(0, 20, 24)
    narrow = narrow / narrow.sum(-1, keepdim=True)
    both = torch.cat((wide, narrow))
    scores = FoPru().scores(make_tokens(images=2, **signals(both, 1))) / 24
    received = both[:, 1:, 1:].mean(1)
    given = both[:, 1:, 1:].mean(2)
    torch.testing.assert_close(scores[0], received[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scores[1], given[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kept", [1, 6, 24])
def test_rank_keeps_the_highest(kept, make_tokens, check_index):
    attention = maps(2, 24, 1)
    index = FoPru().reduce(make_tokens(images=2, **signals(attention, 1)), kept).index
    check_index(index, kept, 24)
    for image in range(2):
        scores = by_hand(attention[image], 1)
        ranked = sorted(range(24), key=lambda i: -scores[i])
        assert index[image].tolist() == sorted(ranked[:kept])


@pytest.mark.parametrize(("count", "rows"), [(6, 1), (11, 1), (12, 2), (23, 3)])
def test_row_keeps_whole_rows(count, rows, make_tokens, check_index):
    attention = maps(2, 24, 1)
    tokens = make_tokens((4, 6), images=2, **signals(attention, 1))
    index = FoPru(strategy="row").reduce(tokens, count).index
    check_index(index, rows * 6, 24)
    for image in range(2):
        scores = by_hand(attention[image], 1)
        sums = [sum(scores[row * 6 : row * 6 + 6]) for row in range(4)]
        best = sorted(sorted(range(4), key=lambda row: -sums[row])[:rows])
        assert index[image].tolist() == [row * 6 + i for row in best for i in range(6)]


def test_row_refuses_what_it_cannot_keep_whole(make_tokens):
    tokens = make_tokens((4, 6), **signals(maps(1, 24, 1), 1))
    with pytest.raises(BudgetError, match="rows have 6"):
        FoPru(strategy="row").reduce(tokens, 5)
    some = make_tokens((4, 6), index=torch.arange(20)[None], **signals(maps(1, 20, 1), 1))
    with pytest.raises(InputError, match="earlier method"):
        FoPru(strategy="row").reduce(some, 6)


def test_newlines_rank_last(make_tokens):
    found = signals(maps(1, 24, 1), 1)
    for signal in found.values():
        signal[..., 5::6] = -torch.inf
    scores = FoPru().scores(make_tokens(**found))
    assert scores[0, 5::6].isneginf().all()
    assert scores[0, [0, 1, 2, 3, 4, 6, 7]].isfinite().all()


def test_batch_equals_single(make_tokens):
    found = signals(maps(3, 24, 1), 1)
    for strategy in ("rank", "row"):
        method = FoPru(strategy=strategy)
        together = method.reduce(make_tokens(images=3, **found), 12).index
        for image in range(3):
            alone = {name: signal[image : image + 1] for name, signal in found.items()}
            assert torch.equal(
                together[image : image + 1], method.reduce(make_tokens(**alone), 12).index
            )


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_attention_still_keeps_the_count(grid, value, make_tokens, check_index):
    total = grid[0] * grid[1]
    found = {
        name: torch.full((1, 1, total), value) for name in ("received_attention", "given_attention")
    }
    found["cls_attention"] = torch.full((1, 1, 2, total), value)
    for count in range(1, total + 1):
        check_index(FoPru().reduce(make_tokens(grid, **found), count).index, count, total)


def test_it_scores_in_the_feature_layer(facts):
    def needs(**model):
        (step,) = FoPru().steps(facts(**model))
        return [(need.name, need.layers) for need in step.needs]

    names = ["received_attention", "given_attention", "cls_attention"]
    assert needs() == [(name, (22,)) for name in names]
    assert needs(class_token=False) == [(name, (22,)) for name in names[:2]]


def test_defaults_and_registration():
    method = get_method("fopru")()
    assert isinstance(method, FoPru)
    assert (method.keep, method.strategy, method.rounding(143.9)) == (0.25, "rank", 143)


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        FoPru(keep=0)
    with pytest.raises(FoveateError, match="strategy"):
        FoPru(strategy="column")
