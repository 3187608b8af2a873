"""A server with a policy answers each question with the recipe that the policy chooses for it."""

import json

import openai
import pytest

from foveate import tiny
from foveate.errors import FoveateError
from foveate.methods import CDPruner, DivPrune, FastV, Uniform
from foveate.serve import Engine
from foveate.tune.policy import SIGNALS, Option, Policy
from tests.serve.running import running, turn
from tests.serve.test_answers import LONGEST, alone, ask

CHEAP, DEAR = (DivPrune(keep=0.1),), (DivPrune(keep=0.5), FastV(keep=0.25))
EMPTY = (0.0,) * len(SIGNALS)


def policy(*recipes):
    """The last of the recipes for questions about colors, the first for others."""
    options = tuple(
        Option(recipe, 0.5, 0.5, (*EMPTY, 1.0 if recipe == recipes[-1] else 0.0))
        for recipe in recipes
    )
    return Policy(options, 0.0, ("color",), (*EMPTY, 0.0), (*EMPTY, 1.0))


@pytest.fixture(scope="module")
def adaptive():
    with running(Engine(*tiny.load(), policy=policy(CHEAP, DEAR))) as found:
        yield found


def test_each_question_gets_its_recipe(adaptive, loaded, scenes):
    picture = scenes[2].image
    for question, recipe in (("what color is the star ?", DEAR), ("where is the star ?", CHEAP)):
        got = ask(adaptive, [turn(question, picture)], max_tokens=LONGEST)
        methods = json.loads(json.dumps([method.to_dict() for method in recipe]))
        assert got.foveate["method"] == (methods if len(methods) > 1 else methods[0])
        assert got.choices[0].message.content == alone(loaded, [picture], question, list(recipe))[0]


def test_the_last_message_is_the_question(adaptive, scenes):
    first = turn("what color is the star ?", scenes[2].image)
    messages = [first, {"role": "assistant", "content": "red"}, turn("where is the star ?")]
    got = ask(adaptive, messages, max_tokens=2)
    assert got.foveate["method"]["method"] == "divprune"


def test_a_request_may_still_name_its_own(adaptive, scenes):
    messages = [turn("what color is the star ?", scenes[0].image)]
    got = ask(adaptive, messages, extra_body={"method": "fastv", "keep": 0.5})
    assert got.foveate["method"]["method"] == "fastv"
    everything = ask(adaptive, messages, extra_body={"keep": 1})
    assert everything.usage.visual_tokens == {"before": 256, "after": 256}
    with pytest.raises(openai.BadRequestError, match="chooses methods by the question"):
        ask(adaptive, messages, extra_body={"keep": 0.5})


def test_all_tokens_can_be_what_it_chooses(scenes):
    with running(Engine(*tiny.load(), policy=policy(CHEAP, (Uniform(keep=1.0),)))) as address:
        got = ask(address, [turn("what color ?", scenes[0].image)], max_tokens=2)
        assert got.usage.visual_tokens == {"before": 256, "after": 256}
        text = ask(address, [turn("what color ?")], max_tokens=2)
        assert text.usage.prompt_tokens


def test_a_recipe_that_does_not_work_is_refused_before_anything_is_served():
    with pytest.raises(FoveateError, match="cdpruner"):
        Engine(*tiny.load(), policy=policy(CHEAP, (CDPruner(relevance="clip"),)))
