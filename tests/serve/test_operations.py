"""Clients that leave, deadlines, limits, metrics, logs and signals."""

import asyncio
import contextlib
import http.client
import io
import json
import logging
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch

import foveate
from foveate import tiny
from foveate.serve import Engine
from foveate.serve.logs import JsonLines
from tests.serve.running import client, running, turn

ROOT = Path(foveate.__file__).parent.parent
PAUSE = 0.02  # seconds that each step of a slow model takes besides its work
LONG = 600  # tokens, hence 12 seconds at least
SOON = 6.0  # far less than what is left of a long answer, far more than a short one takes


class Slow:
    """An engine whose model takes its time and never ends by itself; it counts its steps."""

    def __init__(self, **options):
        model, processor = tiny.load()
        config = model.generation_config
        config.eos_token_id = 10**6
        config.suppress_tokens = processor.tokenizer.all_special_ids  # of which no text comes
        model.register_forward_pre_hook(self._step)
        self.steps = 0
        self.engine = Engine(model, processor, max_tokens=LONG, **options)

    def _step(self, *_):
        self.steps += 1
        time.sleep(PAUSE)


@contextmanager
def slowly(limits=None, **options):
    slow = Slow(**options)
    with running(slow.engine, **{"max_tokens": LONG, **(limits or {})}) as found:
        yield found, slow


def metrics(address):
    """The value of each metric, by its name with its labels."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return {k: float(v) for k, _, v in (x.rpartition(" ") for x in lines if x[0] != "#")}


def held(address):
    return metrics(address)["foveate_held_requests"]


def answered(address):
    found = metrics(address)
    path = "/v1/chat/completions"
    return found.get(f'foveate_requests_total{{outcome="answered",path="{path}"}}', 0)


async def until(condition):
    """Wait for something that comes soon."""
    end = time.monotonic() + SOON
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def asking(tokens, **more):
    return {"model": "tiny", "messages": [turn("star ?")], "max_tokens": tokens, **more}


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_makes_way(stream):
    async def go(address, slow):
        async with client(address) as asked:
            long = asyncio.ensure_future(leave(asked, slow))
            await until(lambda: slow.steps > 3)
            begun = time.monotonic()
            await long
            got = await asked.chat.completions.create(**asking(1))
            assert time.monotonic() - begun < SOON
        assert got.usage.completion_tokens == 1
        assert slow.steps < LONG / 2
        done = slow.steps
        await asyncio.sleep(10 * PAUSE)
        assert slow.steps == done

    async def leave(asked, slow):
        if stream:
            async with await asked.chat.completions.create(**asking(LONG, stream=True)) as chunks:
                async for _ in chunks:
                    if slow.steps > 5:
                        return
        with pytest.raises(openai.APITimeoutError):
            await asked.with_options(timeout=1).chat.completions.create(**asking(LONG))

    with slowly() as (address, slow):
        asyncio.run(go(address, slow))
        seen = metrics(address)
    path = "/v1/chat/completions"
    assert seen[f'foveate_requests_total{{outcome="cancelled",path="{path}"}}'] == 1
    assert seen[f'foveate_requests_total{{outcome="answered",path="{path}"}}'] == 1
    assert seen["foveate_held_requests"] == seen["foveate_queue_length"] == 0
    assert seen["foveate_answer_tokens_total"] == 1


def test_a_row_that_is_left_ends_alone():
    """The other row of its batch goes on, with the answer that it has alone."""

    async def go(address, slow):
        async with client(address) as asked:
            alone = await asked.chat.completions.create(**asking(30))
            first = slow.steps
            both = [
                asked.with_options(timeout=0.6).chat.completions.create(**asking(LONG)),
                asked.chat.completions.create(**asking(30)),
            ]
            left, got = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(left, openai.APITimeoutError)
        assert got.choices == alone.choices
        await until(lambda: held(address) == 0)
        assert slow.steps - first < LONG / 2

    with slowly(max_wait=200) as (address, slow):
        asyncio.run(go(address, slow))


def test_who_leaves_the_queue_is_forgotten():
    """With the images of the request, however long others are answered."""

    async def go(address):
        async with client(address) as asked:
            long = asyncio.ensure_future(asked.chat.completions.create(**asking(LONG)))
            await until(lambda: held(address) == 1)
            with pytest.raises(openai.APITimeoutError):
                await asked.with_options(timeout=0.3).chat.completions.create(**asking(1))
            await until(lambda: held(address) == 1)
            assert metrics(address)["foveate_queue_length"] == 0
            assert not long.done()
            long.cancel()

    with slowly(max_batch=1) as (address, _):
        asyncio.run(go(address))


def test_what_fails_in_a_row_is_no_matter_of_others(monkeypatch):
    """The first to end cannot be drawn; the other has begun, and is answered to its end."""

    def fail(*_):
        raise ValueError("a secret")

    async def go(address):
        async with client(address) as asked:
            return await asyncio.gather(
                asked.chat.completions.create(**asking(3, extra_body={"show_kept": True})),
                asked.chat.completions.create(**asking(9)),
                return_exceptions=True,
            )

    monkeypatch.setattr("foveate.serve.batch.draw", fail)
    with slowly(max_wait=200) as (address, _):
        drawn, other = asyncio.run(go(address))
    assert drawn.status_code == 500
    assert "a secret" not in drawn.message
    assert other.usage.completion_tokens == 9


def test_a_fault_leaves_the_connection_to_other_requests(monkeypatch):
    def fail(*_):
        raise LookupError("a secret")

    monkeypatch.setattr("foveate.serve.choices.Choices.resolve", fail)
    with running(Engine(*tiny.load(), max_tokens=2)) as address:
        line = http.client.HTTPConnection(address.removeprefix("http://"))
        for _ in range(2):
            body, kind = json.dumps(asking(1)), {"content-type": "application/json"}
            line.request("POST", "/v1/chat/completions", body, kind)
            got = line.getresponse()
            assert got.status == 500
            assert b"a secret" not in got.read()
            time.sleep(0.1)  # in which a server that closes the connection does so
        line.close()


def test_a_deadline_that_passes_is_told():
    with slowly({"deadline": 1.0}) as (address, slow):
        begun = time.monotonic()
        got = httpx.post(f"{address}/v1/chat/completions", json=asking(LONG), timeout=30)
        assert 1.0 <= time.monotonic() - begun < SOON
        assert got.status_code == 504
        assert got.headers["x-should-retry"] == "false"
        assert got.json()["error"]["code"] == "deadline"
        body = asking(LONG, stream=True)
        got = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30)
        assert got.status_code == 200
        *_, last = [x for x in got.text.splitlines() if x.startswith("data: {")]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline"
        asyncio.run(until(lambda: held(address) == 0))
        assert slow.steps < LONG / 2


def test_no_more_are_held_than_may_be():
    async def go(address):
        async with client(address) as asked:
            held_ones = [
                asyncio.ensure_future(asked.chat.completions.create(**asking(150)))
                for _ in range(2)
            ]
            await until(lambda: held(address) == 2)
            with pytest.raises(openai.InternalServerError) as refused:
                await asked.chat.completions.create(**asking(1))
            assert all(not one.done() for one in held_ones)
            answers = await asyncio.gather(*held_ones)
            after = await asked.chat.completions.create(**asking(1))
        assert [one.usage.completion_tokens for one in [*answers, after]] == [150, 150, 1]
        return refused.value

    with slowly({"max_held": 2}) as (address, _):
        error = asyncio.run(go(address))
    assert error.status_code == 503
    assert error.response.headers["retry-after"] == "1"
    assert "holds 2 requests" in error.message


def test_metrics_count_what_was_done():
    scene = tiny.draw_scene(0)
    body = {"model": "tiny", "messages": [turn(scene.questions[0].text, scene.image)]}
    url = "v1/chat/completions"
    with running(Engine(*tiny.load(), "fastv")) as address:
        post = httpx.Client(base_url=address, timeout=60).post
        answers = [post(url, json={**body, "keep": keep}) for keep in (0.25, 0.5, 1)]
        assert post(url, json={**body, "n": 2}).status_code == 400
        assert post("v1/responses", json={"model": "other", "input": "a"}).status_code == 404
        seen = metrics(address)
    said = [one.json() for one in answers]
    kv = [one["foveate"]["kv_bytes"] for one in said]
    assert seen == seen | {
        'foveate_requests_total{outcome="answered",path="/v1/chat/completions"}': 3,
        'foveate_requests_total{outcome="400",path="/v1/chat/completions"}': 1,
        'foveate_requests_total{outcome="404",path="/v1/responses"}': 1,
        'foveate_visual_tokens_total{when="before"}': 3 * 256,
        'foveate_visual_tokens_total{when="after"}': 64 + 128 + 256,
        'foveate_kv_bytes_total{when="all"}': sum(one["all"] for one in kv),
        'foveate_kv_bytes_total{when="now"}': sum(one["now"] for one in kv),
        "foveate_answer_tokens_total": sum(one["usage"]["completion_tokens"] for one in said),
        "foveate_first_token_seconds_count": 3,
        "foveate_answer_seconds_count": 3,
        "foveate_batch_rows_count": 3,
        "foveate_batch_rows_sum": 3,
        "foveate_queue_length": 0,
        "foveate_held_requests": 0,
    }
    assert seen["foveate_answer_seconds_sum"] >= seen["foveate_first_token_seconds_sum"] > 0


@pytest.fixture
def logged():
    """What the server logs, as its operators read it."""
    lines, log = io.StringIO(), logging.getLogger("foveate.serve")
    handler = logging.StreamHandler(lines)
    handler.setFormatter(JsonLines())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


def test_logs_hold_neither_question_nor_image_nor_answer(logged):
    scene = tiny.draw_scene(0)
    question, word = scene.questions[0].text, scene.questions[0].answer
    body = {"model": "tiny", "messages": [turn(question, scene.image)], "show_kept": True}
    with running(Engine(*tiny.load(), "fastv")) as address:
        got = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        httpx.post(f"{address}/v1/chat/completions", json={**body, "method": "no-such"})
    assert word in got.text
    answered, refused = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert (answered["event"], answered["outcome"]) == ("request", "answered")
    assert got.json()["id"] == f"chatcmpl-{answered['id']}"
    assert answered["visual_tokens"] == {"before": 256, "after": 128}
    assert answered["images"] == 1
    assert refused["outcome"] == "400"
    for private in (question, word, "base64", "iVBOR", "no-such"):
        assert private not in logged.getvalue()


def test_a_model_that_fails_tells_its_log_and_not_the_client(logged):
    slow = Slow()
    slow.engine._chat.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with running(slow.engine, max_tokens=LONG) as address:
        got = httpx.post(f"{address}/v1/chat/completions", json=asking(1), timeout=60)
        assert httpx.get(f"{address}/health").status_code == 200
    assert got.status_code == 500
    assert "division" not in got.text
    failed, request = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert "division by zero" in failed["error"]
    assert request["outcome"] == "500"


def test_a_device_that_is_lost_ends_the_engine():
    """Nothing can be computed any more: who waits is told, and whoever asks for its health."""

    def fail(*_):
        raise torch.AcceleratorError("device-side assert triggered")

    async def go(address):
        async with client(address) as asked:
            waiting = [asked.chat.completions.create(**asking(2)) for _ in range(3)]
            told = await asyncio.gather(*waiting, return_exceptions=True)
            assert 500 in {error.status_code for error in told} <= {500, 503}
            with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
                await asked.chat.completions.create(**asking(2))

    slow = Slow(max_batch=1)
    slow.engine._chat.model.register_forward_pre_hook(fail)
    with running(slow.engine, max_tokens=LONG) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        asyncio.run(go(address))
        assert httpx.get(f"{address}/health").status_code == 503
        assert held(address) == 0


@contextmanager
def started(*options):
    """`foveate serve tiny` as a process of its own; gives it and its address."""
    line = [sys.executable, "-m", "foveate", "serve", "tiny", "--port", "0", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(line, **pipes) as process:
        try:
            said = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert address, said
            yield process, address[0]
        finally:
            process.kill()


def test_a_signal_lets_the_server_finish():
    """What it holds is answered, what is new is refused, and it ends well."""
    scene = tiny.draw_scene(0)
    body = {"model": "tiny", "messages": [turn(scene.questions[0].text, scene.image)]}
    body["show_kept"] = True
    with (
        started("--max-batch", "1", "-m", "fastv", "--keep", "0.5") as (process, address),
        ThreadPoolExecutor(16) as threads,
    ):
        url = f"{address}/v1/chat/completions"
        asyncio.run(until(lambda: httpx.get(f"{address}/ready").status_code == 200))
        asked = [threads.submit(httpx.post, url, json=body, timeout=100) for _ in range(16)]
        asyncio.run(until(lambda: held(address) + answered(address) == len(asked)))
        assert held(address) > 0
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(httpx.TransportError):  # if nobody listens any more
            assert httpx.post(url, json=body).status_code == 503
        answers = [one.result() for one in asked]
        assert process.wait(60) == 0
        lines = process.stderr.read().splitlines()
    assert [one.status_code for one in answers] == [200] * 16
    texts = {one.json()["choices"][0]["message"]["content"] for one in answers}
    assert texts == {scene.questions[0].answer}
    done = [json.loads(line) for line in lines if line.startswith("{")]
    assert sum(line.get("outcome") == "answered" for line in done) == 16
    assert scene.questions[0].text not in "".join(lines)


def test_a_fault_within_a_stream_is_the_servers(monkeypatch):
    def fail(*_):
        raise ValueError("a secret")

    monkeypatch.setattr("foveate.serve.wire.Chat.finish", fail)
    with running(Engine(*tiny.load(), max_tokens=2)) as address:
        body = {"model": "tiny", "messages": [turn("what color is the star ?")], "stream": True}
        got = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        assert '"type": "server_error"' in got.text
        assert "a secret" not in got.text
        assert 'foveate_requests_total{outcome="500"' in httpx.get(f"{address}/metrics").text
