"""Command-line text becomes the method that Python would build."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from foveate.core import Scorer, Step, get_method, list_methods
from foveate.core.from_text import make_method, parse_keep, read_field, signature
from foveate.errors import BudgetError, InputError, UnknownMethodError
from foveate.methods import FastV, PyramidDrop


@dataclass(frozen=True)
class Everything(Scorer):
    """A method with a field of every type; not registered, so that no other test sees it."""

    slug = "everything"

    keep: float = 0.5
    positions: Literal["original", "renumbered"] = "original"
    flag: bool = False
    number: int | float | None = None
    layers: tuple[int, ...] | None = None
    name: str = "x"

    def steps(self, model):
        return (Step("llm", 1),)

    def scores(self, tokens):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("0.25", 0.25),
        ("64", 64),
        ("1", 1),
        ("1.0", 1.0),
        ("0.5,0.25,0.125", (0.5, 0.25, 0.125)),
        ("64, 32", (64, 32)),
        ("(0.5, 16)", (0.5, 16)),
        ("0.5,", (0.5,)),
        ("1e-1", 0.1),
    ],
)
def test_keep(text, keep):
    got = parse_keep(text)
    assert got == keep
    assert type(got) is type(keep)


@pytest.mark.parametrize("text", ["", "half", "0.5;0.25", "0.5,,0.2", "25%"])
def test_keep_that_is_no_number(text):
    with pytest.raises(BudgetError, match="keep must be a share like"):
        parse_keep(text)


@pytest.mark.parametrize("text", ["1.5", "0", "-3", "0.0"])
def test_keep_out_of_range(text):
    with pytest.raises(BudgetError, match="must be in"):
        make_method("fastv", text)


def test_fields_are_read_by_their_type():
    assert make_method("fastv", "0.25", ["layer=3"]) == FastV(layer=3, keep=0.25)
    assert make_method("pyramiddrop", "0.5,0.25", ["layers=2,4"]) == PyramidDrop(
        layers=(2, 4), keep=(0.5, 0.25)
    )
    assert make_method("pyramiddrop", None, ["layers=none"]) == PyramidDrop()
    assert make_method("fastv", None, ["positions=renumbered"]).positions == "renumbered"
    assert make_method("fastv", None, ["keep=64"]).keep == 64


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("flag=true", True),
        ("number=2", 2),
        ("number=2.5", 2.5),
        ("number=none", None),
        ("layers=7", (7,)),
        ("layers=1, 2", (1, 2)),
        ("name=2", "2"),
        ("name=a=b", "a=b"),
    ],
)
def test_every_type(setting, value):
    name, _, text = setting.partition("=")
    got = read_field(Everything, name, text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "setting", ["flag=2", "number=two", "layers=1;2", "positions=middle", "layers=1.5"]
)
def test_value_of_the_wrong_type(setting):
    name, _, text = setting.partition("=")
    with pytest.raises(InputError, match=rf"cannot read {name}=.*expected .*its fields: keep=0.5"):
        read_field(Everything, name, text)


def test_unknown_field_lists_the_fields():
    with pytest.raises(InputError, match=r"no field 'layers'.*layer=None, keep=0.5, positions="):
        make_method("fastv", None, ["layers=2"])


def test_setting_without_equals():
    with pytest.raises(InputError, match="takes field=value, got 'layer'"):
        make_method("fastv", None, ["layer"])


def test_unknown_method_names_its_neighbour():
    with pytest.raises(UnknownMethodError, match="did you mean fastv"):
        make_method("fast-v")


@pytest.mark.parametrize("slug", list_methods())
def test_every_default_can_be_typed(slug):
    cls = get_method(slug)
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            assert read_field(cls, field.name, str(field.default)) == field.default


def test_signature_shows_defaults():
    assert signature(PyramidDrop).startswith("layers=None, keep=(0.5, 0.25, 0.125)")
