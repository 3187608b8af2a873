"""Names, classes, instances, mappings and files are methods, wherever a method is taken."""

import json
import sys

import pytest

import foveate
from foveate.core.from_text import make_methods, make_saved
from foveate.core.resolve import methods_of
from foveate.core.saving import Saved
from foveate.errors import FoveateError, InputError, UnknownMethodError
from foveate.integrations.chat import ChatModel
from foveate.methods import FastV, PyramidDrop, VisionZip
from foveate.testing.checks import check_method
from foveate.training.prepare import session_of
from tests.tinies import prompts, tiny_llava

ZIP, DROP = VisionZip(keep=8), PyramidDrop((3,), (0.5,))


@pytest.fixture
def files(tmp_path):
    one, several = tmp_path / "method.json", tmp_path / "several" / "foveate.json"
    one.write_text(json.dumps(DROP.to_dict()))
    Saved((ZIP, DROP)).write(several.parent)
    return one, several


def test_all_forms_mix_in_lists_and_tuples(files):
    one, several = files
    assert methods_of("fastv", layer=3) == (FastV(layer=3),)
    assert methods_of(FastV, layer=3) == methods_of(FastV(layer=3)) == (FastV(layer=3),)
    assert methods_of(["visionzip", "pyramiddrop"]) == (VisionZip(), PyramidDrop())
    mixed = [ZIP.to_dict(), "fastv", DROP, FastV, one, str(one)]
    assert (
        methods_of(mixed) == methods_of(tuple(mixed)) == (ZIP, FastV(), DROP, FastV(), DROP, DROP)
    )
    assert methods_of(several) == methods_of(str(several)) == (ZIP, DROP)
    assert methods_of([several]) == (ZIP, DROP)


def test_lists_are_taken_everywhere(files):
    model = tiny_llava()
    given = [ZIP.to_dict(), DROP]
    for form in (given, tuple(given), files[1]):
        assert foveate.use(model, form).methods == (ZIP, DROP)
        assert foveate.Session(model, form).methods == (ZIP, DROP)
        handle = foveate.apply(model, form)
        assert handle.methods == (ZIP, DROP)
        handle.remove()
    session = session_of(foveate.prepare(model, given))
    assert session.methods == (ZIP, DROP)
    session.remove()


def test_a_list_of_names_runs(llava):
    with foveate.use(llava, ["divprune", {"method": "fastv", "keep": 2}]) as run:
        llava(**prompts([[5, 7]]))
    assert [len(kept) for kept in run.kept[0].values()] == [4, 2]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "an empty list names no method"),
        ((), "an empty list names no method"),
        (3, "a method is an instance.*got 3 of type int"),
        (None, "a method is an instance.*got None"),
        (int, "a method is an instance.*of type type"),
        ({"fastv"}, "a method is an instance.*of type set"),
        (["fastv", 3], "a method is an instance"),
        ([["fastv"]], "a list of methods holds no lists"),
        ({"name": "fastv"}, "name under `method`"),
        ({"method": 3}, "name under `method`"),
        ({"method": "fastv", "layr": 2}, "fastv has no field 'layr'"),
        ({"method": "fastv", "layer": {}}, "layer must be an int"),
        ({"method": "pyramiddrop", "keep": {"values": 3}}, "per_request takes a list"),
        (["x" * 5000], "unknown method"),
        ("fastw", "did you mean fastv"),
        ("none.json", "cannot be read as a method"),
    ],
)
def test_other_things_are_refused_in_one_line(given, reason, llava):
    for call in (methods_of, lambda it: foveate.use(llava, it), lambda it: ChatModel(
        llava, type("P", (), {"tokenizer": type("T", (), {})()})(), it
    )):  # fmt: skip
        if given is None and call is not methods_of:
            continue
        with pytest.raises(FoveateError, match=reason) as found:
            call(given)
        assert len(str(found.value)) <= 300
        assert str(found.value).isprintable()


def test_a_mapping_without_end_is_refused():
    value: list = []
    value.append(value)
    with pytest.raises(InputError, match="nests more than"):
        methods_of({"method": "fastv", "layer": value})
    assert sys.getrecursionlimit() > 64


def test_fields_go_with_names_and_classes(llava, files):
    for given in (["fastv"], FastV(), {"method": "fastv"}, files[0], str(files[0])):
        with pytest.raises(FoveateError, match="fields go with a method's name; got keep"):
            foveate.use(llava, given, keep=0.5)
    assert foveate.use(llava, FastV, keep=0.25).methods == (FastV(keep=0.25),)


def test_check_method_takes_one():
    with pytest.raises(FoveateError, match="one method"):
        check_method(["fastv", "divprune"])
    with pytest.raises(UnknownMethodError):
        check_method(["fastw"])


def test_the_command_line_composes_in_stream_order(files):
    assert make_methods(["pyramiddrop", "visionzip"]) == (VisionZip(), PyramidDrop())
    got = make_methods(["pyramiddrop", "visionzip"], ["0.5,0.25", "8"])
    assert got == (ZIP, PyramidDrop(keep=(0.5, 0.25)))
    got = make_methods(["visionzip", "fastv"], [], ["fastv.layer=3", "visionzip.keep=8"])
    assert got == (ZIP, FastV(layer=3))
    assert make_methods(["fastv"], ["0.25"], ["layer=3", "fastv.positions=original"]) == (
        FastV(layer=3, keep=0.25, positions="original"),
    )
    assert make_methods([str(files[1])]) == (ZIP, DROP)


@pytest.mark.parametrize(
    ("names", "keeps", "settings", "reason"),
    [
        (["fastv", "visionzip"], ["0.5"], [], "2 methods, but 1 --keep"),
        (["fastv"], ["0.5", "0.25"], [], "1 methods, but 2 --keep"),
        (["fastv", "visionzip"], [], ["layer=3"], "method.field=value with one of fastv"),
        (["fastv", "fastv"], [], ["fastv.layer=3"], "each named once"),
        (["fastv"], [], ["divprune.keep=3"], "method.field=value"),
        (["fastv"], [], ["x" * 5000], "takes field=value"),
        (["fastv"], [], ["layer=" + "9" * 5000], "cannot read layer="),
        (["fastv"], ["9" * 5000], [], "keep must be a share"),
        (["fastv"], ["inf"], [], r"keep must be in \(0, 1\]"),
        (["fastv"], ["nan"], [], r"keep must be in \(0, 1\]"),
        (["yopo"], [], ["ffn_factor=inf"], "ffn_factor must be"),
        (["a\0.json"], [], [], "cannot be read as a method"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused(names, keeps, settings, reason):
    with pytest.raises(FoveateError, match=reason) as found:
        make_methods(names, keeps, settings)
    assert len(str(found.value)) <= 300


def test_a_file_may_hold_a_total(tmp_path):
    """Of which the file alone may say, and the call something else; elsewhere it is refused."""
    model, path = tiny_llava(), Saved((ZIP,), keep_total=9).write(tmp_path)
    assert foveate.use(model, path).plan.total == 9
    assert foveate.use(model, str(path), keep_total=5).plan.total == 5
    handle = foveate.apply(model, path)
    assert handle.plan.total == 9
    handle.remove()
    assert make_saved([str(path)], ["4"]).keep_total == 9
    others = (
        lambda: methods_of(path), lambda: foveate.use(model, [path]),
        lambda: foveate.Session(model, path), lambda: make_methods([str(path)]),
        lambda: make_methods([str(path), "fastv"]), lambda: ChatModel(model, None, path),
    )  # fmt: skip
    for given in others:
        with pytest.raises(InputError, match=r"also sets keep_total, which is read where the file"):
            given()


def test_a_method_has_no_total():
    with pytest.raises(InputError, match=r"no field 'keep_total'.*a whole session's: foveate\.use"):
        methods_of({"method": "divprune", "keep_total": 9})
