"""Fields are checked where they enter, and messages about them are one short line."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import foveate
from foveate.core import Keep, Scorer, Step, get_method, list_methods
from foveate.core.fields import LARGEST, MisfitError, Range, fit, spell
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.io.quoting import LONGEST, quoted, shown, within
from foveate.methods import DivPrune, FastV, PyramidDrop


def nested(depth):
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class Stranger:
    def __repr__(self):
        return "line\n" * 1000


HUGE = 10**5000
BAD = [
    None, True, -1, 0, 2.5, math.nan, math.inf, -math.inf, HUGE, -HUGE, "3", "x" * 5000, "a\0b",
    "\ud800", b"x", [], (), {}, {"values": [0.5]}, {"a": "b" * 5000}, nested(5000), Stranger(),
    Stranger, np.float32(0.5), np.float64("nan"), np.bool_(True), np.array([1, 2]), np.array(3),
    3j, set(), [[True]], (None,), ("a" * 5000,), (True,), (math.nan,), (HUGE,), (-1,), [-2, 1.5],
    foveate.per_request([0.5]), list(range(9999)),
]  # fmt: skip


def check_message(text):
    assert len(text) <= LONGEST
    assert "\n" not in text
    assert text.isprintable()


@pytest.mark.parametrize("slug", list_methods())
def test_every_field_takes_a_good_value_or_names_the_bad_one(slug):
    """What is not refused can be saved as JSON and read back."""
    cls, said = get_method(slug), []
    for field in dataclasses.fields(cls):
        for value in BAD:
            try:
                method = cls(**{field.name: value})
            except FoveateError as error:
                said.append(str(error))
            else:
                text = json.dumps(method.to_dict(), allow_nan=False)
                assert foveate.core.saving.from_dict(json.loads(text)) == method
    for message in said:
        check_message(message)
        assert slug in message or any(f.name in message for f in dataclasses.fields(cls))


@pytest.mark.parametrize("slug", list_methods())
def test_numbers_of_layers_are_whole_and_numbers_are_finite(slug):
    cls = get_method(slug)
    for field in dataclasses.fields(cls):
        if "layer" in field.name:
            for value in (1.0, "1", True, (1.5,), math.nan):
                with pytest.raises(LayerError, match=field.name):
                    cls(**{field.name: value})
        if isinstance(field.default, float):
            for value in (math.nan, math.inf, -math.inf, True, "0.5"):
                with pytest.raises(FoveateError):
                    cls(**{field.name: value})


@pytest.mark.parametrize("slug", list_methods())
def test_infinite_budgets_are_refused_as_budgets(slug):
    for keep in (math.inf, -math.inf, math.nan, (math.inf,), HUGE, -HUGE, True, {"a": 1}):
        with pytest.raises(BudgetError):
            get_method(slug)(keep=keep)


@pytest.mark.parametrize("slug", list_methods())
def test_no_budget_is_refused_where_the_method_wants_one(slug):
    """Whether it is one for several layers, or for methods that may decide themselves."""
    cls = get_method(slug)
    if cls.keep is not None:
        with pytest.raises(BudgetError, match="keep"):
            cls(keep=None)


def test_numbers_of_numpy_and_lists_become_plain():
    method = FastV(layer=np.int64(3), keep=np.float32(0.5))
    assert method == FastV(layer=3, keep=0.5)
    assert (type(method.layer), type(method.keep)) == (int, float)
    assert type(DivPrune(keep=np.int32(7)).keep) is int
    assert PyramidDrop([np.int64(2), 4], [0.5, np.float64(0.25)]) == PyramidDrop(
        (2, 4), (0.5, 0.25)
    )
    assert foveate.per_request([np.int64(3), 0.5]).values == (3, 0.5)


@pytest.mark.parametrize("values", [0.5, None, "ab", [None], [foveate.per_request([0.5])], [{}]])
def test_requests_are_budgets_of_rows(values):
    with pytest.raises(BudgetError):
        foveate.per_request(values)


Own = Annotated[int, Range(1)]


class Table:
    """What only a user's own method knows."""


@dataclass(frozen=True)
class Mine(Scorer):
    """A user's own method, with fields of kinds that foveate does not know."""

    keep: float = 0.5
    positions: str | None = None
    table: Table | None = None
    names: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    layer: Own = 1
    seed: int = None  # type: ignore[assignment]  # sloppy, and what the author wrote
    limit: float = math.inf
    mode: Literal["a", "b"] = "a"
    where: Path = Path("x")
    slug = "mine"

    def steps(self, model):
        return (Step("pre_llm"),)

    def scores(self, tokens):
        raise NotImplementedError


def test_own_methods_profit_and_keep_what_they_know():
    table, names = Table(), {"a": [1, 2]}
    method = Mine(table=table, names=names, keep=64)
    assert method.table is table
    assert method.names is names
    assert method.keep == 64
    assert type(method.keep) is int
    assert (method.seed, method.limit) == (None, math.inf)
    for fields in ({"layer": 0}, {"layer": 1.5}, {"seed": "3"}, {"limit": math.nan}, {"mode": "c"}):
        with pytest.raises(FoveateError, match=f"{next(iter(fields))} must be .* in mine"):
            Mine(**fields)


def test_annotations_that_cannot_be_evaluated_are_passed_over():
    class Hidden:
        pass

    @dataclass(frozen=True)
    class Local(Mine):
        hidden: "Hidden | None" = None
        share: "float" = 0.5
        slug = "local"

    one = Hidden()
    assert Local(hidden=one).hidden is one
    with pytest.raises(FoveateError, match="share must be a finite number, got 'x' in local"):
        Local(share="x")


@pytest.mark.parametrize(
    ("value", "hint", "plain"),
    [
        (2, float, 2.0),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([[True], []], tuple[tuple[bool, ...], ...], ((True,), ())),
        (3, int | tuple[int, ...] | None, 3),
        (1, float | int, 1),
        (1.0, int | float, 1.0),
        ("x", Path, Path("x")),
        (None, Own | None, None),
        (LARGEST, int, LARGEST),
        ({"any": 1}, dict[str, int], {"any": 1}),
    ],
)
def test_values_that_fit(value, hint, plain):
    got = fit(value, hint)
    assert got == plain
    assert type(got) is type(plain)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int), (1.0, int), ("1", int), (LARGEST + 1, int), (LARGEST + 1, float),
        (1, bool), (1, str), (b"x", str), ("ab", tuple[str, ...]), ((1,), tuple[int, int]),
        (1, Literal["1"]), (True, Literal[1]), (0, Own), (None, int), ({}, float | None),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(value, hint):
    with pytest.raises(MisfitError):
        fit(value, hint)


def test_ranges_say_what_they_hold():
    inside = Range(0, 1, above=True, below=True)
    assert [value in inside for value in (0, 0.5, 1)] == [False, True, False]
    assert str(inside) == "in (0, 1)"
    assert spell(Own | None) == "an int at least 1 or None"
    assert spell(Keep).startswith("a finite number or an int")


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
def test_quotes_are_short(value):
    for length in (20, 60):
        text = quoted(value, length)
        assert 0 < len(text) <= length
        assert text.isprintable()


def test_short_values_are_quoted_whole_and_long_ones_keep_both_ends():
    assert quoted((0.5, "a")) == "(0.5, 'a')"
    assert shown("/tmp/a b") == "/tmp/a b"
    assert shown("a\nb\0c\ud800") == r"a b\x00c\ud800"
    cut = shown("/begin/" + "x" * 5000 + "/end")
    assert len(cut) == 60
    assert cut.startswith("/begin/")
    assert cut.endswith("/end")
    check_message(within("f" * 5000, FoveateError("y" * 5000)))


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("pyramiddrop", "layers"), ("cls-drop", "layers"), ("biformer", "layers"),
        ("atp-llava", "layers"), ("toc3d", "scored"), ("dtop", "exits"),
    ],
)  # fmt: skip
def test_layers_ascend_in_every_method(name, field, layers):
    with pytest.raises(LayerError, match=f"{field} must be ascending and distinct, got "):
        get_method(name)(**{field: layers})
