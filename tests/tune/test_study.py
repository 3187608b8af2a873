"""The search finds what is planted, goes on after a kill as if none had been, and asks no held-out
question before it has chosen.
"""

import pytest

from foveate.errors import InputError
from foveate.tune.ledger import Ledger
from tests.tune.conftest import HELD_OUT, QUESTIONS


def at_the_first_layer(recipe):
    """Right where patches go in the encoder's first layer, at their own positions."""
    (method,) = recipe
    return 0.4 + 0.25 * (method.layers[0] == 0) + 0.25 * (method.positions == "original")


def either(recipe):
    return 0.9 if {"tome", "fastv"} == {method.slug for method in recipe} else 0.5


def test_the_planted_recipe_is_found(tune):
    verdict, _, _ = tune(at_the_first_layer)
    (method,) = verdict.chosen.recipe
    assert (method.layers[0], method.positions) == (0, "original")
    assert not verdict.chosen.published
    assert verdict.published.recipe[0].layers == (1,)
    gain, low, high = verdict.gain
    assert low <= gain <= high
    assert gain > 0


def test_the_planted_composition_is_found(tune):
    verdict, _, _ = tune(either, methods=("tome", "cls-drop", "fastv"), trials=40)
    assert [method.slug for method in verdict.chosen.recipe] == ["tome", "fastv"]


def test_the_cheapest_that_meets_the_target_is_chosen(tune, planner):
    """Worth falls with what is removed; 10 points may be lost, which takes about half of FLOPs."""

    def worth(recipe):
        return 0.95 - max(0.0, 0.5 - planner.shares(recipe)["flops"])

    verdict, _, _ = tune(
        worth, targets=("accuracy>=-10",), minimize=("flops",), trials=40, methods=("cls-drop",)
    )
    score = verdict.chosen.scored
    assert score.metrics["accuracy"] >= -10
    assert 0.3 < score.metrics["flops"] < 0.6
    costs = [c.scored.metrics["flops"] for c in verdict.front]
    qualities = [c.scored.quality for c in verdict.front]
    assert costs == sorted(costs)
    assert qualities == sorted(qualities)


def test_everyone_keeps_to_the_account_before_anything_runs(tune, planner):
    verdict, calls, _ = tune(at_the_first_layer)
    for recipe, _ in calls:
        assert not recipe or planner.shares(recipe)["flops"] <= 0.25
    assert verdict.chosen.scored.metrics["flops"] <= 0.25


def test_what_costs_more_than_planned_is_made_smaller(tune):
    """As methods do that decide by the tokens how many survive."""
    verdict, _, _ = tune(at_the_first_layer, dearer=1.3)
    costs = [c.scored.metrics["flops"] for c in verdict.found.finalists]
    assert costs
    assert all(0.23 < cost <= 0.25 for cost in costs)


def test_held_out_questions_are_not_asked_by_the_search(tune):
    _, calls, searched = tune(at_the_first_layer)
    assert {n for _, numbers in calls[:searched] for n in numbers} <= set(QUESTIONS)
    assert {n for _, numbers in calls[searched:] for n in numbers} == set(HELD_OUT)


def test_the_same_seed_is_the_same_search(tune):
    one, another, other = (tune(at_the_first_layer, seed=n) for n in (3, 3, 4))
    assert one[0].to_dict() == another[0].to_dict()
    assert one[1] == another[1]
    assert one[1] != other[1]


@pytest.mark.parametrize("killed_at", [3, 20, 45])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tune, tmp_path, killed_at):
    whole, calls, _ = tune(at_the_first_layer)
    path = tmp_path / "asked.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tune(at_the_first_layer, path, killed_at=killed_at)
    with path.open("ab") as file:  # a line on which it was killed
        file.write(b'{"key": "asked')
    again, rest, _ = tune(at_the_first_layer, path)
    assert again.to_dict() == whole.to_dict()
    assert len(rest) == len(calls) - killed_at
    assert rest == calls[killed_at:]


def test_a_record_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "asked.jsonl"
    Ledger(path, {"seed": 1, "trials": 2})
    assert len(Ledger(path, {"seed": 1, "trials": 2})) == 0
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        Ledger(path, {"seed": 2, "trials": 2})
    path.write_text("[]\n")
    with pytest.raises(InputError, match="not a record of a search"):
        Ledger(path, {"seed": 1})


def test_a_recipe_that_fails_is_told_and_the_others_go_on(tune):
    def broken(recipe):
        if recipe[0].layers[0] == 2:
            raise RuntimeError("no memory")
        return at_the_first_layer(recipe)

    verdict, _, _ = tune(broken)
    failed = [c for c in verdict.found.candidates if "RuntimeError: no memory" in c.why_out]
    assert failed
    assert verdict.chosen.recipe[0].layers[0] != 2
    assert any("RuntimeError" in why for why, _ in verdict.rejected())


def test_the_time_limit_ends_the_search(tune):
    left = iter(range(60))
    verdict, calls, _ = tune(at_the_first_layer, late=lambda: next(left, None) is None)
    assert not verdict.found.finished
    assert len(verdict.found.candidates) < 30
    assert len(calls) < 60


def test_where_nothing_meets_the_target_nothing_is_chosen(tune):
    verdict, _, _ = tune(lambda recipe: 0.2, targets=("accuracy>=-1", "flops<=0.25x"), trials=10)
    assert verdict.chosen is None
    assert verdict.gain is None
    assert all("below accuracy>=-1" in c.why_out for c in verdict.found.candidates)
