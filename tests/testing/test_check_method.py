"""`check_method` passes what is sound, and names what is not."""

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch

import foveate
from foveate.core import Keep, Need, Reduction, Scorer, Step
from foveate.errors import FoveateError
from foveate.methods.flowcut import FlowCut
from foveate.testing import check_method, models
from foveate.testing.checks import check_oracle
from tests.methods_for_tests import readers_methods


@pytest.mark.parametrize("name", readers_methods())
def test_every_method_of_ours_passes(name):
    checks = check_method(name)
    assert not checks.failed
    assert "llava: removal" in checks.passed or "m-rope: removal" in checks.passed


@dataclass(frozen=True)
class Sound(Scorer):
    """Large features first."""

    keep: Keep = 0.5
    positions: str | None = None
    slug, stage, needs, paper = "sound", "pre_llm", (), ""

    def steps(self, model):
        return (Step("pre_llm"),)

    def scores(self, tokens):
        return tokens.x.norm(dim=-1)


class Coupled(Sound):
    """Ranks by what the whole group has."""

    def scores(self, tokens):
        return (tokens.x.norm(dim=-1) - tokens.x.norm(dim=-1).mean(0)).abs()


class Fickle(Sound):
    """Chooses anew each time."""

    def scores(self, tokens):
        return torch.rand(
            tokens.index.shape, generator=torch.Generator().manual_seed(random.getrandbits(30))
        )


class Lossy(Sound):
    """Divides by a spread that may be zero."""

    def reduce(self, tokens, count):
        spread = (tokens.x.amax(1) - tokens.x.amin(1)).mean(-1)[:, None, None]
        weights = torch.eye(tokens.count)[:count] * (spread / spread)
        return Reduction(torch.arange(count).expand(len(tokens.index), -1), weights)


class Greedy(Sound):
    """Removes even if everything is to be kept."""

    def count(self, remaining, total, step, number, row=0):
        return max(remaining - 1, 1)


class Unordered(Sound):
    """Hands out survivors in any order."""

    def reduce(self, tokens, count):
        return Reduction(self.scores(tokens).topk(count).indices)


@pytest.mark.parametrize(
    ("method", "check"),
    [
        (Coupled, "batch"),
        (Fickle, "removal"),
        (Lossy, "degenerate"),
        (Greedy, "identity"),
        (Unordered, "oracle"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_check_fails_where_its_promise_is_broken(method, check):
    with pytest.raises(AssertionError, match=rf"FAILED +(llava|m-rope): {check}"):
        check_method(method)


def test_rows_that_depend_on_each_other_are_found():
    with pytest.raises(AssertionError, match=r"FAILED +llava: batch") as caught:
        check_method(FlowCut(keep=0.25, as_released=True))
    assert str(caught.value).count("FAILED") == 1


def test_sound_method_passes_everything():
    checks = check_method(Sound)
    assert len(checks.passed) == 11
    assert not checks.skipped


def test_settings_must_be_json():
    @dataclass(frozen=True)
    class Holder(Sound):
        where: object = field(default_factory=lambda: torch.device("cpu"))

    with pytest.raises(AssertionError, match=r"FAILED +settings"):
        check_method(Holder)


def test_method_that_works_nowhere_says_why():
    @dataclass(frozen=True)
    class Lost(Sound):
        def steps(self, model):
            return (Step("llm", 99, (Need("text_attention", (99,)),)),)

    with pytest.raises(FoveateError, match="layer 99"):
        check_method(Lost)


FIRST = [name for name in readers_methods() if foveate.get_method(name).stage != "llm"]
SECOND = [name for name in readers_methods() if foveate.get_method(name).stage == "llm"]
SECOND = [name for name in SECOND if name not in ("lvlm-csp", "yopo")]  # which the oracle knows not
FIRST = [name for name in FIRST if foveate.get_method(name).removes]  # nor approximate layers
PAIRS = random.Random(0).sample(
    list(itertools.product(FIRST, SECOND)), min(24, len(FIRST) * len(SECOND))
)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_composed_methods_equal_the_oracle(first, second):
    model = models.llava()
    pair = [foveate.get_method(name)() for name in (first, second)]
    if first == "todre":  # which would leave nothing to the second
        pair[0] = foveate.get_method("todre")(drop_layer=-1)
    with torch.no_grad():
        check_oracle(pair, model)


@pytest.mark.parametrize(("first", "second"), PAIRS[:4])
def test_illegal_order_is_refused(first, second):
    pair = [foveate.get_method(name)() for name in (second, first)]
    with pytest.raises(FoveateError, match="stream order"):
        foveate.use(models.llava(), pair)


def test_combined_budget_is_reported():
    model = models.llava()
    methods = [foveate.get_method("divprune")(keep=0.5), foveate.get_method("fastv")(keep=0.5)]
    with torch.no_grad(), foveate.use(model, methods) as run:
        model(**models.prompts(model, [(4, 5)]))
    report = run.report()
    stages = report["images"][0]["kept"]
    assert [len(stages[place]) for place in ("pre_llm", "llm:2")] == [128, 64]
