"""Many clients at once, some of them bad: every answer is that of its own request, given once."""

import asyncio
import random
from collections import Counter

import httpx
import psutil
import pytest

from foveate import tiny
from foveate.serve import Engine
from tests.serve.running import running, turn

AT_ONCE = 32
USUAL, ALL = 160, 1000
GROWTH = 150 * 2**20  # bytes that a process may grow by after its first answers
METHODS = ({}, {"keep": 0.25}, {"keep": 1}, {"method": "fastv", "keep": 64}, {"method": "divprune"})


@pytest.fixture(scope="module")
def small():
    engine = Engine(*tiny.load(), "pyramiddrop", max_batch=8)
    with running(engine, max_body=400_000, max_held=AT_ONCE + 8, max_tokens=8) as address:
        yield address


def sound(scenes):
    """Distinct requests that can be answered, each about an image of its own."""
    found = []
    for number, scene in enumerate(scenes):
        for question in scene.questions[:2]:
            body = {"model": "tiny", "messages": [turn(question.text, scene.image)]}
            found.append({**body, **METHODS[(number + len(found)) % len(METHODS)]})
    return found


def bad(body):
    """What is wrong, and the request."""
    return [
        (400, {**body, "method": "fastvee"}),
        (400, {**body, "messages": []}),
        (400, {**body, "keep": -1}),
        (413, {**body, "user": "x" * 500_000}),
        (400, {**body, "messages": [turn("an <image> of somebody else")]}),
    ]


async def post(asked, body, timeout=120):
    return await asked.post("/v1/chat/completions", json=body, timeout=timeout)


async def answers_of(asked, bodies):
    """Each body's answer, asked for alone."""
    found = []
    for body in bodies:
        response = await post(asked, body)
        assert response.status_code == 200, response.text
        found.append(told(response))
    return found


def told(response):
    said = response.json()
    return said["choices"][0]["message"]["content"], said["usage"], said["foveate"]["method"]


async def soak(address, bodies, count):
    """Outcomes of many requests at once."""
    draw, outcomes, seen = random.Random(0), Counter(), set()
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=address, limits=limits) as asked:
        wanted = await answers_of(asked, bodies)
        before = psutil.Process().memory_info().rss

        async def one():
            kind, number = draw.random(), draw.randrange(len(bodies))
            async with gate:
                if kind < 0.1:  # leaves
                    try:
                        await post(asked, bodies[number], timeout=httpx.Timeout(60, read=0.05))
                        outcomes["answered before it left"] += 1
                    except httpx.ReadTimeout:
                        outcomes["left"] += 1
                elif kind < 0.25:
                    status, body = draw.choice(bad(bodies[number]))
                    response = await post(asked, body)
                    assert response.status_code == status, response.text
                    outcomes[f"refused, {status}"] += 1
                else:  # many of them twice
                    response = await post(asked, bodies[number])
                    assert response.status_code == 200, response.text
                    assert told(response) == wanted[number]
                    seen.add(response.json()["id"])
                    outcomes["answered"] += 1

        await asyncio.gather(*[one() for _ in range(count)])
        metrics = (await asked.get("/metrics")).text
    assert len(seen) == outcomes["answered"]
    return outcomes, len(bodies), metrics, psutil.Process().memory_info().rss - before


def test_each_request_gets_its_own_answer_once(small, scenes, request):
    """The scenes differ, so that an answer about another's image would be seen."""
    bodies = sound(scenes)
    assert len({str(body) for body in bodies}) == len(bodies)
    count = ALL if request.config.getoption("--all-cells") else USUAL
    outcomes, warm, metrics, growth = asyncio.run(soak(small, bodies, count))
    print(dict(outcomes), f"growth {growth / 2**20:.0f} MiB")
    assert sum(outcomes.values()) == count
    assert {"answered", "left", "refused, 400", "refused, 413"} <= set(outcomes)
    assert "foveate_held_requests 0.0" in metrics
    done = sum(
        float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("foveate_requests_total")
    )
    assert done == count + warm
    assert growth < GROWTH
