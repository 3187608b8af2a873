"""`foveate serve` beside transformers' own server: requests per second, and seconds of an answer.

    python benchmarks/serving.py [--method fastv] [--keep 0.25] [--rounds 2]

The random LLaVA of `vllm_serving.py` (512 x 8, 576 visual tokens an image) is served by
`transformers serve` and by `foveate serve` at the same time, each on the same cores; one is asked
while the other idles. Every request has an image of its own. In each round all servers and budgets
are asked in turn; ratios are those of a round. 8 new tokens, greedy, float32.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from openai import AsyncOpenAI
from PIL import Image

from benchmarks.vllm_serving import TOKENS, WORDS, checkpoint
from foveate.measure.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "serving.json"
REQUESTS = {1: 3, 8: 16, 32: 32}
"""Requests in flight -> requests of a measurement."""
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image> {% endif %}"
    "{% endfor %}{% endfor %}"
)


class Server:
    """A server in a process of its own.

    Args:
        command: starts it at a port.
        port: of it.
        model: what requests call the model.
    """

    def __init__(self, command: list[str], port: int, model: str) -> None:
        self.port, self.model = port, model
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen([*command, "--port", str(port)], env=environment, **quiet)

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            assert self._process.poll() is None, "a server has ended"
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise TimeoutError("a server does not answer")

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(60)


class Load:
    """Requests, each with an image that no other has."""

    def __init__(self) -> None:
        self._number = itertools.count()

    async def measure(self, server: Server, more: dict, flying: int, requests: int) -> dict:
        """Requests per second, and the median of seconds until an answer was complete.

        Args:
            server: what is asked.
            more: fields of foveate.
            flying: requests at a time.
            requests: how many in all.
        """
        bodies = [self._messages() for _ in range(requests)]
        gate = asyncio.Semaphore(flying)
        address = f"http://127.0.0.1:{server.port}/v1"
        async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:

            async def one(messages: Any) -> float:
                async with gate:
                    begun = time.perf_counter()
                    await client.chat.completions.create(
                        model=server.model,
                        messages=messages,
                        max_tokens=TOKENS,
                        temperature=0,
                        extra_body=more,
                    )
                    return time.perf_counter() - begun

            start = time.perf_counter()
            seconds = await asyncio.gather(*map(one, bodies))
        return {
            "requests_per_s": requests / (time.perf_counter() - start),
            "answer_s": statistics.median(seconds),
        }

    def _messages(self) -> list[dict]:
        pixels = np.random.default_rng(next(self._number)).integers(0, 255, (336, 336, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        return [{"role": "user", "content": [image, {"type": "text", "text": WORDS}]}]


async def measure(asked: dict[str, tuple[Server, dict]], rounds: int) -> list[dict]:
    """Rows of the table; the first entry is what the others are compared with."""
    load, rows = Load(), []
    for server, more in asked.values():
        await load.measure(server, more, 2, 2)
    for flying, requests in REQUESTS.items():
        found: dict[str, list[dict]] = {name: [] for name in asked}
        for number in range(rounds):
            names = list(asked)[number % len(asked) :] + list(asked)[: number % len(asked)]
            for name in names:
                found[name].append(await load.measure(*asked[name], flying, requests))
        first = next(iter(found.values()))
        for name, mine in found.items():
            speed = [a["requests_per_s"] / b["requests_per_s"] for a, b in zip(mine, first)]  # noqa: B905
            rows.append(
                {
                    "in_flight": flying,
                    "requests": requests,
                    "server": name,
                    **{key: statistics.median(one[key] for one in mine) for key in mine[0]},
                    "speedup": {
                        "median": statistics.median(speed),
                        "least": min(speed),
                        "most": max(speed),
                    },
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="fastv")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        (Path(folder) / "chat_template.jinja").write_text(TEMPLATE)
        stock = [str(Path(sys.executable).parent / "transformers"), "serve", folder]
        ours = [sys.executable, "-m", "foveate", "serve", folder, "--max-batch", "8"]
        servers = [
            Server([*stock, "--device", "cpu", "--dtype", "float32"], 8191, folder),
            Server([*ours, "--name", "llava"], 8192, "llava"),
        ]
        try:
            for server in servers:
                server.wait()
            fewer = {"method": given.method, "keep": given.keep}
            asked = {
                "transformers": (servers[0], {}),
                "foveate, all tokens": (servers[1], {}),
                f"foveate, {given.method} {given.keep:g}": (servers[1], fewer),
            }
            rows = asyncio.run(measure(asked, given.rounds))
        finally:
            for server in servers:
                server.stop()
    settings = {"rounds": given.rounds, "new_tokens": TOKENS, "max_batch": 8}
    result = {"machine": describe_machine(), "settings": settings, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
