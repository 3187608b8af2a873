"""InfiniPot-V's choice equals its equations, pair by pair."""

import pytest
import torch

from foveate.errors import BudgetError
from foveate.streaming import InfiniPotV
from tests.streaming.oracle import survivors

HEADS, FRAMES, CELLS, WIDTH = 3, 9, 7, 5


def drawn(seed):
    """Older frames lack tokens, others in each head; the last two are whole."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(HEADS):
        old = torch.randperm((FRAMES - 2) * CELLS, generator=generator)[:30].sort().values
        rows.append(torch.cat((old, torch.arange((FRAMES - 2) * CELLS, FRAMES * CELLS))))
    place = torch.stack(rows)
    states = torch.randn(2, HEADS, place.shape[1], WIDTH, generator=generator)
    return *states, place // CELLS, place % CELLS


@pytest.mark.parametrize(("tar", "count"), [(0.5, 36), (0.5, 20), (0.0, 30), (1.0, 30), (0.9, 40)])
def test_choice_equals_the_equations(tar, count):
    keys, values, frames, cells = drawn(count)
    if count == 36:  # a place that no recent frame shows any more
        cells = cells.masked_fill((cells == 3) & (frames >= FRAMES - 2), 4)
    got = InfiniPotV(tar=tar).choose(keys, values, cells, frames >= FRAMES - 2, count)
    for head in range(HEADS):
        slots = range(keys.shape[1])
        want = survivors(
            keys[head], values[head], slots, frames[head].tolist(), cells[head].tolist(),
            FRAMES - 2, count, tar,
        )  # fmt: skip
        assert got[head].tolist() == want
    assert len(set(map(tuple, got.tolist()))) == HEADS


def test_ties_go_to_the_older_token():
    keys, values = torch.ones(1, 8, 2), torch.ones(1, 8, 2)
    recent = torch.tensor([[False] * 6 + [True] * 2])
    got = InfiniPotV().choose(keys, values, torch.tensor([[0, 1] * 4]), recent, 5)
    assert got.tolist() == [[0, 1, 2, 6, 7]]


def test_recent_frames_are_a_share_of_those_held():
    rule = InfiniPotV(recent=0.25)
    assert [rule.recent_frames(held, 10) for held in (9, 79, 80, 119, 120)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("field", [{"keep": 0.0}, {"recent": 1.5}, {"tar": -0.1}, {"keep": 1}])
def test_shares_out_of_range_are_refused(field):
    (name,) = field
    with pytest.raises(BudgetError, match=f"{name} must be a share in"):
        InfiniPotV(**field)
