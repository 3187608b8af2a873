"""`vllm serve` with the plugin, asked over HTTP by the official client."""

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integrations.vllm.cases import case, images_of
from tests.integrations.vllm.conftest import ROOT

pytestmark = pytest.mark.vllm
openai = pytest.importorskip("openai")
DEFAULT = {"foveate_method": "divprune", "foveate_keep": 0.5}


@pytest.fixture(scope="module")
def client(environment, checkpoint, tmp_path_factory):
    """A client of a server whose default is DivPrune with half of the tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint("llava")),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--mm-processor-kwargs", json.dumps(DEFAULT), "--trust-request-mm-kwargs",
    ]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        wait(server, f"http://127.0.0.1:{port}/health", log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait(60)


def wait(server, url, log, seconds=600):
    for _ in range(seconds):
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-4000:]
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def ask(client, asked, *images, **arguments):
    """A completion of one prompt, greedy."""
    parts = []
    for picture in images_of({"images": images, "size": (80, 64)}):
        data = io.BytesIO()
        picture.save(data, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": "w1 w2 w3"})
    body = {"ignore_eos": True} | ({} if asked is None else {"mm_processor_kwargs": asked})
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=8, temperature=0,
        extra_body=body, **arguments,
    )  # fmt: skip


def prompt_tokens(client, asked):
    return ask(client, asked, 0).usage.prompt_tokens


def test_the_prompt_is_as_long_as_is_asked_for(client):
    text = prompt_tokens(client, {"foveate_method": None}) - 64
    assert prompt_tokens(client, None) == text + 32
    assert prompt_tokens(client, {"foveate_keep": 0.25}) == text + 16
    assert prompt_tokens(client, {"foveate_keep": 1}) == text + 64
    assert prompt_tokens(client, {"foveate_method": "fastervlm", "foveate_keep": 10}) == text + 10


def test_answers_are_those_of_transformers(client, answers):
    """In the chat's prompt, and streamed."""
    cases = [case("divprune", 0.5), case("visionzip", 16), case("fastervlm", 0.25, images=[1])]
    want = answers("llava", cases, by="reference")
    requests = [
        (None, 0),
        ({"foveate_method": "visionzip", "foveate_keep": 16}, 0),
        ({"foveate_method": "fastervlm", "foveate_keep": 0.25}, 1),
    ]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda of: ask(client, of[0], of[1]), requests))
    words = [answer.choices[0].message.content.split() for answer in got]
    assert words == [expected["words"] for expected in want]
    stream = ask(client, requests[1][0], 0, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    assert text.split() == want[1]["words"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"foveate_method": "divprun"}, "unknown method 'divprun'; did you mean divprune"),
        ({"foveate_keep": 1.5}, "keep must be in (0, 1]"),
        ({"foveate_kepp": 0.5}, "foveate_kepp is unknown"),
        ({"foveate_method": "pyramiddrop"}, "the paged cache of vLLM has one length"),
        ({"foveate_method": "tome"}, "acts inside the vision tower"),
        ({"foveate_method": "llava-prumerge"}, "chooses from the tokens"),
        ({"foveate_method": "cdpruner"}, "give its text as foveate_question"),
        ({"foveate_method": "visionzip", "foveate_keep": 3, "foveate_fields": {"contextual": 5}},
         "cannot be contextual"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_the_clients_error(client, asked, message):
    """Status 400 with foveate's own message, and the server goes on."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, asked, 0)
    assert message in str(caught.value)
    assert ask(client, None, 0).usage.completion_tokens == 8


def test_a_prompt_without_images_is_served(client):
    assert ask(client, None).usage.completion_tokens == 8
