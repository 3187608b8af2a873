"""Replicas under Ray Serve answer as one server, also while one of them is killed."""

import asyncio
import os
import signal
import time

import httpx
import pytest

from foveate.errors import InputError
from foveate.methods import PyramidDrop
from foveate.serve.errors import ServerError
from foveate.serve.replicas import Fleet, Replicas, Spec
from foveate.serve.request import Delta, End, Question
from tests.serve.running import client, running, turn

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'foveate[ray]'")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments")  # of Ray's own


@pytest.fixture(scope="module")
def replicas():
    """Two replicas on a Ray of two CPUs and a bit."""
    engine = Replicas(Spec("tiny", (PyramidDrop(),), max_batch=4), Fleet(2, cpus=0.5, patience=5.0))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def fleet(replicas):
    """The address of a server of them."""
    with running(replicas) as found:
        yield found


def processes():
    """Our replicas."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica" in process.name() or "ServeReplica" in process.cmdline()[0]:
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


async def ask(asked, scene, number, **more):
    question = scene.questions[number % len(scene.questions)]
    messages = [turn(question.text, scene.image)]
    found = await asked.chat.completions.create(model="tiny", messages=messages, **more)
    return question.text, found


def test_answers_are_those_of_one_server(fleet, address, scenes):
    async def go(where):
        async with client(where) as asked:
            return await asyncio.gather(*[ask(asked, scene, 1) for scene in scenes])

    for (_, got), (_, want) in zip(asyncio.run(go(fleet)), asyncio.run(go(address)), strict=True):
        assert got.choices[0].message.content == want.choices[0].message.content
        assert got.usage.visual_tokens == want.usage.visual_tokens
    listed = [httpx.get(f"{where}/v1/methods").json() for where in (fleet, address)]
    assert listed[0] == listed[1]
    assert httpx.get(f"{fleet}/ready").status_code == 200


def test_what_a_replica_refuses_keeps_its_words_and_status(fleet, scenes):
    body = {"model": "tiny", "messages": [turn("?", scenes[0].image)], "method": "fastvee"}
    got = httpx.post(f"{fleet}/v1/chat/completions", json=body)
    assert got.status_code == 400
    assert "unknown method 'fastvee'" in got.json()["error"]["message"]


def test_a_stream_comes_in_pieces(fleet, scenes):
    async def go():
        async with client(fleet) as asked:
            _, stream = await ask(asked, scenes[0], 0, stream=True)
            return [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]

    pieces = [piece for piece in asyncio.run(go()) if piece]
    assert pieces


def test_a_killed_replica_loses_no_request(fleet, replicas, scenes):
    """32 are in flight when one of two replicas is killed; all are answered, as they are alone."""

    async def go():
        async with client(fleet) as asked:
            calls = [(scenes[n % 8], n) for n in range(32)]
            first = [await ask(asked, *call) for call in calls]
            tasks = [asyncio.ensure_future(ask(asked, *call)) for call in calls]
            await asyncio.sleep(0.3)
            assert sum(task.done() for task in tasks) < 32
            (victim, *_) = processes()
            os.kill(victim.pid, signal.SIGKILL)
            return first, await asyncio.gather(*tasks), victim.pid

    assert len(processes()) == 2
    before, after, killed = asyncio.run(go())
    for (question, want), (same, got) in zip(before, after, strict=True):
        assert question == same
        assert got.choices[0].message.content == want.choices[0].message.content
    ends = time.monotonic() + 90
    while len(processes()) < 2 and time.monotonic() < ends:
        time.sleep(0.2)
    assert len(processes()) == 2
    assert killed not in [process.pid for process in processes()]


class Failing(Replicas):
    """Replicas of which some die; each of them sends some events first."""

    def __init__(self, *sent):
        self._ray, self.sent = ray, list(sent)

    async def _send(self, question):
        for event in self.sent.pop(0):
            if event is None:
                raise ray.exceptions.ActorDiedError
            yield event


async def events_of(engine, **more):
    return [event async for event in engine.submit(Question([], **more))]


def test_what_has_not_begun_is_sent_again(monkeypatch):
    monkeypatch.setattr("foveate.serve.replicas.PAUSE", 0.01)
    good = [Delta("a"), Delta("b"), End("stop", 1, 2, 1, {})]
    engine = Failing([None], [None], good, [None])
    assert asyncio.run(events_of(engine, streamed=True)) == good
    assert engine.sent == [[None]]


def test_a_stream_that_had_begun_ends_with_an_error():
    engine = Failing([Delta("a"), None], [Delta("a"), End("stop", 1, 1, 1, {})])
    with pytest.raises(ServerError, match="was answering died"):
        asyncio.run(events_of(engine, streamed=True))
    assert len(engine.sent) == 1


def test_a_request_that_kills_replicas_is_given_up(monkeypatch):
    monkeypatch.setattr("foveate.serve.replicas.PAUSE", 0.01)
    engine = Failing(*[[None]] * 9)
    with pytest.raises(ServerError, match="4 processes died"):
        asyncio.run(events_of(engine))
    assert len(engine.sent) == 5
    with pytest.raises(ServerError, match="deadline"):
        asyncio.run(events_of(Failing(*[[None]] * 9), seconds=0.005))


def test_replicas_need_ray(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"foveate\[ray\]"):
        Replicas(Spec("tiny"), Fleet(1))
