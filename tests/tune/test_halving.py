"""Who is asked more: the best third, as long as no interval says that it is behind."""

import pytest

from foveate.bench.stats import Paired
from foveate.tune.halving import Candidate, promoted, rungs, why_stop
from foveate.tune.replies import Replies, Score, difference
from foveate.tune.targets import Aim

AIM = Aim.of(["flops<=0.5x"], [], True)
LOOSE = Aim.of(["accuracy>=-60"], ["flops"], True)
BOTH = Aim.of(["accuracy>=-10"], ["flops"], True)


def candidate(number, right, flops=0.5, kl=0.0):
    replies = Replies(right, right, (kl,) * len(right), (), (100, 100), (round(100 * flops), 50))
    score = Score.of(replies, Replies((True,) * len(right), (True,) * len(right)), "accuracy", {})
    return Candidate(number, (), tuple, {}, replies=replies, score=score)


def some(right, of):
    return (True,) * right + (False,) * (of - right)


def test_rungs_grow_threefold_up_to_all():
    assert rungs(16, 300) == [16, 48, 144, 300]
    assert rungs(16, 60) == [16, 60]
    assert rungs(16, 10) == [10]


def test_the_best_third_goes_on():
    alive = [candidate(n, some(n, 10)) for n in range(9)]
    assert [c.number for c in promoted(alive, AIM)] == [6, 7, 8]


def test_ties_go_to_the_nearer_to_the_unpruned():
    alive = [candidate(n, some(8, 10), kl=kl) for n, kl in enumerate([0.3, 0.1, 0.2])]
    assert [c.number for c in promoted(alive, AIM)] == [1]


def test_where_costs_count_the_cheap_go_on_too():
    alive = [candidate(0, some(9, 10), 0.9), candidate(1, some(5, 10), 0.1)]
    alive += [candidate(n, some(4, 10), 0.8) for n in range(2, 6)]
    assert [c.number for c in promoted(alive, BOTH)] == [0, 1]


def test_who_is_behind_a_finalist_stops():
    unpruned = Replies(some(40, 40), some(40, 40))
    best = candidate(7, some(38, 40))
    assert why_stop(candidate(1, some(36, 40)), unpruned, [best], AIM) == ""
    said = why_stop(candidate(1, some(20, 40)), unpruned, [best], AIM)
    assert "-45.0 points" in said
    assert "against trial 7" in said


@pytest.mark.parametrize("flops", [0.5, 0.3])
def test_a_dearer_finalist_stops_nobody(flops):
    unpruned = Replies(some(40, 40), some(40, 40))
    best = candidate(7, some(38, 40), flops=0.5)
    said = why_stop(candidate(1, some(20, 40), flops=flops), unpruned, [best], LOOSE)
    assert ("against trial" in said) == (flops == 0.5)


def test_who_cannot_meet_the_target_stops():
    unpruned = Replies(some(40, 40), some(40, 40))
    said = why_stop(candidate(1, some(20, 40)), unpruned, [], BOTH)
    assert "below accuracy>=-10" in said
    assert why_stop(candidate(1, some(34, 40)), unpruned, [], BOTH) == ""


def test_differences_are_those_of_pairs_of_right_and_wrong():
    first, second = some(30, 40), (False,) * 5 + (True,) * 31 + (False,) * 4
    paired = Paired.of(first, second)
    change, low, high = difference(first, second)
    assert change == pytest.approx(100 * paired.difference)
    assert high - low == pytest.approx(200 * paired.half_width)
