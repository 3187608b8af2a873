"""A policy finds which questions need the dear recipe, keeps to its budget, and is read back."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.errors import FoveateError
from foveate.methods import DivPrune, FastV, Uniform
from foveate.tune.adapting import Known, Sight, adapt, choices, price_of, regression
from foveate.tune.data import Row, Split
from foveate.tune.ledger import Ledger
from foveate.tune.policy import SIGNALS, Option, Policy, signals
from foveate.tune.replies import Replies

CHEAP, DEAR = (DivPrune(keep=0.1),), (FastV(keep=0.5),)
COSTS = {CHEAP: 0.2, DEAR: 0.6}
NUMBERS = range(160)
SPLIT = Split(tuple(NUMBERS[:100]), tuple(NUMBERS[100:]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Questions, every other of which only the dear recipe can answer, and what answers them.

    Args:
        kind: what sets them apart: `words`, `images` or `nothing`.
    """
    folder = tmp_path_factory.mktemp("world")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "busy.png")
    Image.new("L", (64, 64), 90).save(folder / "plain.png")

    def make(kind):
        hard = [n % 2 == 1 for n in NUMBERS]
        files = ["busy" if h and kind == "images" else "plain" for h in hard]
        asked = ["how many" if h and kind == "words" else "what color" for h in hard]
        rows = [
            Row((folder / f"{file}.png",), f"{text} is it", "x")
            for file, text in zip(files, asked, strict=True)
        ]

        def ask(recipe, numbers):
            right = tuple(recipe != CHEAP or not hard[n] for n in numbers)
            cost = COSTS.get(recipe, 1.0)
            count = len(numbers)
            after = (round(1000 * cost) * count,) * 2
            return Replies(right, right, (0.0,) * count, (), (1000 * count,) * 2, after)

        good = [ask(recipe, SPLIT.search).right for recipe in COSTS]
        known = Known(tuple(COSTS), np.array([*COSTS.values()]), np.array(good, float), "accuracy")
        return known, Sight(rows), ask

    return make


@pytest.mark.parametrize("kind", ["words", "images"])
def test_the_dear_recipe_goes_where_it_is_needed(world, kind):
    known, sight, ask = world(kind)
    adapted = adapt(known, sight, SPLIT, 0.45, ask, Ledger(None, {}))
    assert adapted.fixed == CHEAP
    assert adapted.chosen == (30, 30)
    assert adapted.flops == pytest.approx((0.4, 0.2))
    assert adapted.gain[0] == pytest.approx(50)
    assert all(adapted.good)
    assert adapted.fixed_good == tuple(n % 2 == 0 for n in SPLIT.held_out)
    text, image = sight.rows[1].question, Image.open(sight.rows[1].images[0])
    assert adapted.policy.choose(text, [image]) == DEAR


def test_where_nothing_tells_questions_apart_nothing_is_won(world):
    known, sight, ask = world("nothing")
    adapted = adapt(known, sight, SPLIT, 0.45, ask, Ledger(None, {}))
    assert adapted.chosen == (60, 0)
    assert adapted.gain == (0, 0, 0)


def test_a_budget_below_every_recipe_is_refused(world):
    known, sight, ask = world("words")
    with pytest.raises(FoveateError, match=r"takes 0.1x.*cheapest takes 0.200x"):
        adapt(known, sight, SPLIT, 0.1, ask, Ledger(None, {}))


def test_the_price_is_the_smallest_that_keeps_to_the_budget():
    draw = np.random.default_rng(1)
    flops = np.array([0.1, 0.3, 0.3, 0.7, 1.0])
    for _ in range(20):
        values = draw.random((5, 30)) + flops[:, None] * draw.random()
        for budget in (0.1, 0.3, 0.55, 0.8):
            price = price_of(values, flops, budget)
            assert flops[choices(values, flops, price)].mean() <= budget + 1e-12
            if price:
                assert flops[choices(values, flops, price * (1 - 1e-6))].mean() > budget


def test_regression_is_that_of_the_textbook():
    """Least squares on unit signals with rows of the square root of the ridge below them."""
    draw = np.random.default_rng(2)
    x, good = draw.random((40, 4)) * [1, 10, 0.1, 1], draw.random((3, 40))
    x[:, 3] = 5.0  # does not vary
    bias, weights = regression(x, good, 7.0)
    unit = (x[:, :3] - x[:, :3].mean(0)) / x[:, :3].std(0)
    for recipe in range(3):
        below = np.vstack([unit, math.sqrt(7.0) * np.eye(3)])
        right = np.concatenate([good[recipe] - good[recipe].mean(), np.zeros(3)])
        slopes = np.linalg.lstsq(below, right, rcond=None)[0]
        want = good[recipe].mean() + unit @ slopes
        np.testing.assert_allclose(bias[recipe] + x @ weights[recipe], want)
        assert weights[recipe, 3] == 0


def test_signals_are_what_they_say():
    board = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    found = signals("How many, many cats?", [board, Image.new("RGB", (4, 2))], ["many", "dog"])
    want = [math.log(5), 2, math.log1p(72), 1.0, 0.5, 1, 0]  # of the board 2 and 1 bit
    assert found == pytest.approx(want)


def policy():
    size = len(SIGNALS) + 1
    slopes = (0.0, 0.0, 0.0, 2.0, 0.0, 0.0)
    options = (Option(CHEAP, 0.2, 0.5, (0.0,) * size), Option(DEAR, 0.6, 0.3, slopes))
    return Policy(options, 0.5, ("many",), (0.0,) * size, (4.0, 1.0, 12.0, 0.1, 8.0, 1.0))


def test_what_was_never_seen_counts_as_the_nearest_that_was():
    board = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    assert policy().choose("what", [board]) == CHEAP  # 0.3 + 2 * 0.1 - 0.3, not 0.3 + 2 * 2 - 0.3
    assert policy().choose("what", []) == CHEAP


def test_a_policy_is_read_back_as_it_was_written(tmp_path):
    policy().write(tmp_path / "policy.json")
    assert foveate.adaptive(tmp_path / "policy.json") == policy()
    assert foveate.adaptive(policy()) == policy()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("policy"), "this is no policy"),
        (lambda d: d.update(policy=2), "this is no policy"),
        (lambda d: d.update(price="much"), "`price` of a policy is a number"),
        (lambda d: d.update(price=True), "`price` of a policy is a number"),
        (lambda d: d.update(options=[]), "needs recipes"),
        (lambda d: d.update(options=[1]), "`options` of a policy is a list of objects"),
        (lambda d: d.update(signals=["many"]), "begin with words, images"),
        (lambda d: d["low"].pop(), "needs 6 numbers"),
        (lambda d: d["options"][0].update(weights=[1]), "needs 6 numbers"),
        (lambda d: d["options"][0].update(methods=[]), "`methods` of a policy"),
        (lambda d: d["options"][0].update(methods=["x.json"]), "a method is a mapping"),
        (lambda d: d["options"][0]["methods"][0].update(method="fastw"), "unknown method 'fastw'"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(tmp_path, change, said):
    path = tmp_path / "policy.json"
    policy().write(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(FoveateError, match=said) as error:
        foveate.adaptive(path)
    assert "policy.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", ["none.json", 7, None])
def test_what_is_no_file_is_refused(wrong):
    with pytest.raises(FoveateError):
        foveate.adaptive(wrong)


def test_all_tokens_are_an_option_and_beaten_recipes_are_not():
    class Scored:
        def __init__(self, recipe, flops, right):
            self.recipe, self.replies = recipe, Replies(right, right)
            self.scored = type("Score", (), {"metrics": {"flops": flops}})

    class Found:
        unpruned = Replies((True, True, True), (True, True, True))
        finalists = (
            Scored(DEAR, 0.6, (True, True, False)),
            Scored((FastV(keep=0.6),), 0.7, (True, False, True)),
            Scored(CHEAP, 0.2, (False, True, False)),
        )

    known = Known.of(Found, "accuracy")
    assert known.recipes == (CHEAP, DEAR, (Uniform(keep=1.0),))
    assert known.flops.tolist() == [0.2, 0.6, 1.0]
    assert known.good.tolist() == [[0, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert known.fixed(0.65) == 1
