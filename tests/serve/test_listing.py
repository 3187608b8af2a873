"""The list of methods says what requests get that name none; stages have names for readers."""

import json

import pytest

from foveate.methods import DivPrune, FastV, PyramidDrop
from foveate.serve.choices import Choices
from tests.serve.test_answers import ask, turn


def defaults(model, *methods):
    listing = json.loads(json.dumps(Choices(model, methods).listing()))
    return {entry["slug"]: entry["default"] for entry in listing if entry["default"] is not None}


@pytest.mark.parametrize(
    ("methods", "want"),
    [
        ([], {}),
        ([FastV(keep=0.25)], {"fastv": {"keep": 0.25, "fields": {}}}),
        ([FastV(layer=3)], {"fastv": {"keep": 0.5, "fields": {"layer": 3}}}),
        ([PyramidDrop()], {"pyramiddrop": {"keep": [0.5, 0.25, 0.125], "fields": {}}}),
        ([DivPrune(keep=0.5), FastV()], {}),  # no one method does what these do
    ],
    ids=str,
)
def test_the_servers_own_method_is_marked(loaded, methods, want):
    assert defaults(loaded[0], *methods) == want


def test_summaries_are_whole_sentences(loaded):
    assert all(entry["summary"].endswith(".") for entry in Choices(loaded[0]).listing())


def test_stages_have_names(address, scenes):
    messages = [turn(scenes[0].questions[0].text, scenes[0].image)]
    got = ask(address, messages, extra_body={"show_kept": True, "method": "divprune"})
    (stage,) = got.foveate["images"][0]["stages"]
    assert (stage["site"], stage["name"]) == ("pre_llm", "before the LLM")
