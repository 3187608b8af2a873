"""Conversations as chat templates of other models write them."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from foveate import tiny
from foveate.serve import Engine
from tests.serve.running import running, turn

BARE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system\\nrole') }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
"""Parts follow each other without a space, and there is nothing besides them."""


@pytest.fixture(scope="module")
def bare():
    """A server of a model with the bare template, which waits for batches."""
    model, processor = tiny.load()
    processor.chat_template = BARE
    processor.tokenizer.add_bos_token = False
    with running(Engine(model, processor, max_tokens=2, max_wait=200)) as found:
        yield found


def ask(address, *conversations):
    """Status, and the message of the error or the response, of requests at the same time."""

    def post(messages):
        body = {"model": "tiny", "messages": messages}
        got = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        said = got.json()
        return got.status_code, said["error"]["message"] if "error" in said else said

    with ThreadPoolExecutor(len(conversations)) as threads:
        return list(threads.map(post, conversations))


def test_what_a_template_refuses_is_the_clients_error(bare):
    conversation = [{"role": "system", "content": "a"}, turn("red star")]
    (refused, why), (status, _) = ask(bare, conversation, [turn("red star")])
    assert (refused, status) == (400, 200)
    assert why == "the model's processor refuses this conversation: no system role"


@pytest.mark.parametrize("halves", [("a <ima", "ge> b"), ("a <ima ", " ge> b")])
def test_parts_may_not_make_a_placeholder_together(bare, halves):
    message = turn("star ?", tiny.draw_scene(0).image)
    message["content"] += [{"type": "text", "text": half} for half in halves]
    ((status, why),) = ask(bare, [message])
    assert status == 400
    assert "'<image>', which stands for an image" in why


def test_a_prompt_of_no_tokens_is_refused_and_others_are_not(bare):
    (refused, why), (status, _) = ask(bare, [turn("")], [turn("red star")])
    assert (refused, status) == (400, 200)
    assert "has no tokens" in why


def test_figures_of_text_are_those_that_it_has_alone(bare):
    """Of a single token too, and beside longer prompts."""
    texts = ["red", "red star", "red star " * 6]
    alone = [ask(bare, [turn(text)])[0][1] for text in texts]
    together = [said for _, said in ask(bare, *[[turn(text)] for text in texts])]
    assert [said["usage"]["prompt_tokens"] for said in alone] == [1, 2, 12]
    for one, other in zip(alone, together, strict=True):
        assert one["usage"] == other["usage"]
        for figure in ("flops", "kv_bytes", "visual_tokens"):
            assert one["foveate"][figure] == other["foveate"][figure]
    flops = [said["foveate"]["flops"]["prefill"] for said in alone]
    assert flops == sorted(set(flops))
