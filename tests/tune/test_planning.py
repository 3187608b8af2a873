"""Recipes are scaled to what limits allow, by the account of `foveate flops`."""

import optuna
import pytest

from foveate import tiny
from foveate.errors import InputError
from foveate.methods import ClsDrop, DivPrune, FastV, ToMe
from foveate.run import use
from foveate.tune.planning import Planner, scale, typical
from foveate.tune.space import Space, describe


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def account(loaded):
    return Planner(*loaded, 1, (128, 128), 10)


def test_the_account_is_that_of_a_run(loaded, account):
    model, processor = loaded
    text = "<image> " + "red " * 8  # with <bos> and the blank, as the processor makes it
    inputs = processor(images=tiny.draw_scene(3).image, text=text, return_tensors="pt")
    words = int((inputs["input_ids"] != model.config.image_token_id).sum())
    planner = Planner(model, processor, 1, (128, 128), words)
    recipe = (ClsDrop(keep=0.3), FastV(keep=0.5))
    with use(model, recipe) as session:
        model(**inputs, logits_to_keep=1)
    report = session.report()
    shares = planner.shares(recipe)
    assert shares["flops"] == pytest.approx(report["flops"]["after"] / report["flops"]["before"])
    assert shares["kv"] == pytest.approx(report["kv_bytes"]["after"] / report["kv_bytes"]["before"])


@pytest.mark.parametrize("limit", [0.2, 0.5])
def test_as_much_is_kept_as_is_allowed(account, limit):
    scaled = scale(lambda s: (ClsDrop(keep=s),), {"flops": limit}, account)
    assert 0.97 * limit < scaled.shares["flops"] <= limit
    assert account.shares(scaled.recipe) == scaled.shares


def test_everything_is_kept_where_that_is_allowed(account):
    scaled = scale(lambda s: (FastV(keep=s),), {"kv": 1.0}, account)
    assert scaled.recipe == (FastV(keep=1.0),)


def test_what_costs_too_much_in_any_case_is_told(account):
    scaled = scale(lambda s: (DivPrune(keep=s),), {"flops": 0.2}, account)
    assert not scaled.recipe
    assert scaled.why_not.endswith("flops 0.30x of 0.2x")


def test_what_cannot_keep_so_little_is_told(account):
    """ToMe merges half of the tokens of a layer at most."""
    scaled = scale(lambda s: (ToMe(keep=s),), {"flops": 0.2}, account)
    assert not scaled.recipe
    assert "tome removes at most half" in scaled.why_not


def test_every_method_of_the_space_works_published(account):
    space = Space(account, None, {})
    assert {"divprune", "tome", "fastv"} <= set(space.names)
    assert {"random", "evs", "yopo"}.isdisjoint(space.names)
    for choice in space.published()[::4]:
        sketch = space.draw(optuna.trial.FixedTrial(choice))
        scaled = scale(sketch, {"flops": 0.9}, account)
        assert scaled.recipe, scaled.why_not


def test_methods_that_leave_a_dear_encoder_whole_are_left_out(account):
    space = Space(account, None, {"flops": 0.25})
    assert "divprune" in space.left_out
    assert "cls-drop" in space.names


def test_a_named_method_that_cannot_be_tuned_is_refused(account):
    with pytest.raises(InputError, match="evs cannot be tuned here: it compares the frames"):
        Space(account, ["evs"], {})


def test_a_recipe_in_one_line():
    recipe = (ToMe(r=(3, 2)), FastV(layer=3, keep=0.123456))
    assert describe(recipe) == "tome r=(3,2) + fastv layer=3 keep=0.123"


def test_the_typical_size_is_the_median():
    assert typical([(10, 10), (1, 1), (30, 2)]) == (30, 2)


def test_vflowopt_is_searched_as_its_calibration_does(account):
    """Within the published ranges, and with the average that the scale is."""
    space = Space(account, ["vflowopt"], {})
    places = {"keep": 0.5, "ratio": 0.5, "threshold": 0.5, "cell": 0.0}
    choice = {f"vflowopt.{name}": value for name, value in places.items()}
    choice |= {"early": "vflowopt", "late": "none", "vflowopt.fields": "searched"}
    sketch = space.draw(optuna.trial.FixedTrial(choice))
    (method,) = sketch(0.25)
    first, second, last = method.keep
    assert (method.threshold, method.cell) == (25.0, 3.0)
    assert first == pytest.approx(1.25 * 0.25)
    assert second / first == pytest.approx((0.533 + 1) / 2)
    layers, depth = method.published_layers(account.family), account.family.text_layers
    seen = layers[0] * first + (layers[1] - layers[0]) * second + (depth - layers[1]) * last
    assert seen / depth == pytest.approx(0.25)
