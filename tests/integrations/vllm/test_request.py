"""What a request asks for; no vLLM is needed."""

import pytest

from foveate.errors import BudgetError, FoveateError, InputError, UnknownMethodError
from foveate.integrations.vllm.request import FIELDS, KEY, Request, pack, parse, split, unpack
from foveate.methods import DivPrune, VisionZip

DIVPRUNE = {"foveate_method": "divprune", "foveate_keep": 0.25}


def test_a_request_names_a_method_its_keep_and_its_fields():
    asked = {
        "foveate_method": "visionzip",
        "foveate_keep": 40,
        "foveate_fields": {"contextual": 4},
        "foveate_question": "what is it",
    }
    assert parse(asked, {}) == Request(VisionZip(keep=40, contextual=4), "what is it")


@pytest.mark.parametrize("fields", ['{"contextual": 4}', {"contextual": 4}])
def test_fields_may_come_as_text(fields):
    asked = {"foveate_method": "visionzip", "foveate_fields": fields}
    assert parse(asked, {}).method == VisionZip(contextual=4)


def test_one_is_all_as_json_writes_it():
    assert parse({**DIVPRUNE, "foveate_keep": 1}, {}).method.keep == 1.0


def test_nothing_is_asked_for_by_default():
    assert parse({}, {}) is None
    assert parse({"foveate_question": "who"}, {}) is None


def test_a_request_may_change_the_defaults_keep():
    assert parse({"foveate_keep": 0.5}, DIVPRUNE).method == DivPrune(keep=0.5)


def test_a_request_may_turn_the_default_off():
    assert parse({"foveate_method": None}, DIVPRUNE) is None


def test_a_named_method_comes_without_the_defaults_keep_and_fields():
    default = {"foveate_method": "visionzip", "foveate_keep": 8, "foveate_fields": {}}
    assert parse({"foveate_method": "divprune"}, default).method == DivPrune()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"foveate_method": "divprun"}, UnknownMethodError, "did you mean divprune"),
        ({**DIVPRUNE, "foveate_keep": 1.5}, BudgetError, "(0, 1]"),
        ({**DIVPRUNE, "foveate_keep": "half"}, BudgetError, "keep must be"),
        ({**DIVPRUNE, "foveate_keep": True}, FoveateError, "keep"),
        ({**DIVPRUNE, "foveate_fields": {"power": 2}}, InputError, "power"),
        ({**DIVPRUNE, "foveate_fields": "{"}, InputError, "not JSON"),
        ({**DIVPRUNE, "foveate_fields": [1]}, InputError, "an object of fields"),
        ({**DIVPRUNE, "foveate_fields": {"keep": 1}}, InputError, "give foveate_keep"),
        ({**DIVPRUNE, "foveate_question": 3}, InputError, "must be a string"),
        ({"foveate_method": 3}, InputError, "a method's name"),
        ({"foveate_method": "method.json"}, UnknownMethodError, "method.json"),
        ({"foveate_keep": 0.5}, InputError, "no foveate_method"),
        ({"foveate_method": None, "foveate_keep": 0.5}, InputError, "no foveate_method"),
    ],
)
def test_refusals_say_what_is_wrong(asked, error, message):
    with pytest.raises(error) as caught:
        parse(asked, {})
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["foveate_kepp", KEY])
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(InputError, match=f"{name} is unknown; foveate takes {FIELDS[0]}"):
        split({name: 1})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("foveate_keep_total", "caches each image by itself.*give foveate_keep as a count"),
        ("foveate_audio", "take images and videos, and no audio"),
    ],
)
def test_what_a_session_takes_and_vllm_does_not_is_refused_with_the_reason(name, why):
    with pytest.raises(InputError, match=f"{name} is not supported in vLLM: .*{why}"):
        split({**DIVPRUNE, name: 90})


def test_arguments_of_others_pass():
    assert split({**DIVPRUNE, "size": 3}) == (DIVPRUNE, {"size": 3})


def test_a_request_survives_the_way_to_the_model():
    asked = Request(VisionZip(keep=8, contextual=2), token_ids=(3, 4))
    packed = pack(asked.to_text(), 2)
    assert [Request.from_text(text) for text in unpack(packed)] == [asked, asked]


def test_equal_requests_are_written_alike():
    texts = {
        parse({**DIVPRUNE, "foveate_fields": fields}, {}).to_text()
        for fields in ({}, {"positions": None}, None)
    }
    assert len(texts) == 1
