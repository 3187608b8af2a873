"""ToMe: schedules, matching, budgets."""

import pytest
import torch
import torch.nn.functional as F

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.tome import ToMe
from foveate.ops.matching import match, match_every


def naive(keys, r, special):
    """Groups of patches of one image, in the release's order."""
    rows = {special + i: key for i, key in enumerate(keys)}
    even, odd = [i for i in rows if i % 2 == 0], [i for i in rows if i % 2 == 1]
    best = {a: max(odd, key=lambda b: float(rows[a] @ rows[b])) for a in even}
    order = sorted(even, key=lambda a: -float(rows[a] @ rows[best[a]]))
    merged, rest = order[:r], order[r:]
    groups = {i: [i] for i in rows}
    for a in merged:
        groups[best[a]].append(a)
    kept = (sorted(rest) if special else rest) + odd
    return [[i - special for i in groups[k]] for k in kept]


@pytest.mark.parametrize("special", [0, 1, 2, 4, 5])
@pytest.mark.parametrize(("total", "r"), [(16, 3), (17, 8), (9, 1), (24, 12), (7, 3)])
def test_matching_equals_a_naive_loop(total, r, special, check_index):
    keys = F.normalize(torch.randn(3, total, 8), dim=-1)
    index, slot = match(keys, r, special)
    check_index(index.sort(-1).values, total - r, total)
    for image in range(3):
        want = naive(keys[image], r, special)
        got = [(slot[image] == number).nonzero()[:, 0].tolist() for number in range(total - r)]
        assert [sorted(group) for group in want] == got
        assert index[image].tolist() == [group[0] for group in want]


@pytest.mark.parametrize("every", [2, 3, 5])
def test_every_other_matching_equals_a_naive_loop(every):
    keys = F.normalize(torch.randn(2, 17, 8), dim=-1)
    index, slot = match_every(keys, every)
    targets = list(range(every - 1, 17, every))
    for image in range(2):
        assert index[image].tolist() == targets
        for i in range(17):
            if i >= 17 // every * every:
                assert slot[image, i] == -1
            elif i in targets:
                assert slot[image, i] == targets.index(i)
            else:
                scores = [float(keys[image, i] @ keys[image, t]) for t in targets]
                assert slot[image, i] == scores.index(max(scores))


def test_keys_are_averaged_over_heads_and_normed(make_tokens):
    """A head with tiny keys must not decide, and a token's length neither."""
    keys = torch.randn(2, 3, 24, 8)
    lengths = torch.rand(2, 1, 24, 1) + 0.5
    tokens, longer = (
        make_tokens(images=2, encoder_keys=k[:, None]) for k in (keys, keys * lengths)
    )
    want = match(F.normalize(keys.mean(1), dim=-1), 6, 0)
    for given in (tokens, longer):
        reduction = ToMe().reduce(given, 18)
        assert torch.equal(reduction.index, want[0])
        assert torch.equal(reduction.slot, want[1])


def test_values_are_weighted_by_sizes():
    from foveate.core import VisualTokens

    keys, sizes = torch.randn(1, 2, 12, 8), torch.rand(1, 12) + 1
    index = torch.arange(12)[None]
    tokens = VisualTokens(
        lambda: None, index, (3, 4), signals={"encoder_keys": keys[:, None]}, merged=sizes
    )
    reduction = ToMe().reduce(tokens, 8)
    x = torch.randn(1, 12, 5)
    for number, value in enumerate(reduction.apply(x)[0]):
        rows = (reduction.slot[0] == number).nonzero()[:, 0]
        want = (x[0, rows] * sizes[0, rows, None]).sum(0) / sizes[0, rows].sum()
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"r": 3}, [3, 3, 3, 3]),
        ({"r": (5, 1)}, [5, 1, 0, 0]),
        ({"r": (1, 2, 3, 4, 5)}, [1, 2, 3, 4]),
        ({"r": 8, "inflect": -1.0}, [16, 10, 5, 0]),
        ({"r": 8, "inflect": 1.0}, [0, 5, 10, 16]),
    ],
)
def test_schedules(fields, want):
    assert list(ToMe(**fields).schedule(4)) == want


def test_one_layer_has_a_schedule():
    assert ToMe(r=4, inflect=-1.0).schedule(1) == (8,)


def test_layers_that_nobody_reads_do_not_merge(facts):
    steps = ToMe(r=3).steps(facts(vision_layers=24, feature_layer=22))
    assert [step.layer for step in steps] == list(range(23))
    assert ToMe(r=0).steps(facts()) == ()
    assert [s.layer for s in ToMe(r=(0, 2, 0, 1)).steps(facts())] == [1, 3]


@pytest.mark.parametrize("keep", [0.5, 0.3, 100, 1.0, 576])
def test_keep_is_reached_by_equal_steps(keep, facts):
    method, alive, removed = ToMe(keep=keep), 576, []
    for number, step in enumerate(method.steps(facts())):
        left = method.count(alive, 576, step, number)
        removed.append(alive - left)
        alive = left
    assert alive == (keep if isinstance(keep, int) else int(576 * keep))
    assert max(removed) - min(removed) <= 1


def test_more_than_half_in_a_layer_is_refused_for_keep_and_clipped_for_r(facts):
    model = facts(vision_layers=2, feature_layer=1)
    first, second = ToMe(keep=2).steps(model)
    left = ToMe(keep=2).count(16, 16, first, 0)
    with pytest.raises(BudgetError, match="at most half"):
        ToMe(keep=2).count(left, 16, second, 1)
    assert ToMe(r=100).count(17, 17, ToMe(r=100).steps(model)[0], 0) == 9


@pytest.mark.parametrize(
    "fields", [{"r": -1}, {"r": 2.5}, {"r": (1, -2)}, {"inflect": 1.5}, {"r": (8, -1.0)}]
)
def test_wrong_arguments_are_refused(fields):
    with pytest.raises(FoveateError, match="r must be"):
        ToMe(**fields)


def test_keep_is_one_share_or_count():
    from foveate import per_request

    for keep in ((0.5, 0.2), per_request([0.5])):
        with pytest.raises(BudgetError, match="one share or count"):
            ToMe(keep=keep)
    with pytest.raises(BudgetError):
        ToMe(keep=1.5)


def test_defaults_and_registration():
    method = get_method("tome")()
    assert isinstance(method, ToMe)
    assert (method.r, method.prop_attn, method.keep, method.stage) == (8, True, None, "vision")
    assert ToMe(r=[1, 2]) == ToMe(r=(1, 2))
    assert hash(ToMe(r=[1, 2]))
