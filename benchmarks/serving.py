"""`foveate serve` beside transformers' own server: requests per second, and time to tokens.

    python benchmarks/serving.py [--method fastv] [--keep 0.25] [--rounds 3]

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
from vllm_serving import TOKENS, WORDS, checkpoint

from foveate.measure.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "serving.json"
REQUESTS = {1: 8, 8: 24, 32: 96}
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

            async def one(messages: Any) -> tuple[float, float]:
                async with gate:
                    return await timed(client, server.model, messages, more)

            start = time.perf_counter()
            times = await asyncio.gather(*map(one, bodies))
        return {
            "requests_per_s": requests / (time.perf_counter() - start),
            "first_token_s": statistics.median(first for first, _ in times),
            "answer_s": statistics.median(whole for _, whole in times),
        }

    def _messages(self) -> list[dict]:
        pixels = np.random.default_rng(next(self._number)).integers(0, 255, (336, 336, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        return [{"role": "user", "content": [image, {"type": "text", "text": WORDS}]}]


async def timed(client: AsyncOpenAI, model: str, messages: Any, more: dict) -> tuple[float, float]:
    """Seconds to the first token of an answer, and to its end; all answers are equally long."""
    begun, first, usage = time.perf_counter(), None, None
    stream = await client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=more,
    )
    async for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begun
        usage = chunk.usage or usage
    assert first is not None and usage is not None  # noqa: PT018
    assert usage.completion_tokens == TOKENS, f"{model} gave {usage.completion_tokens} tokens"
    return first, time.perf_counter() - begun


def endless(folder: Path) -> None:
    """Let the model of a folder end no answer by itself."""
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        settings = json.loads(file.read_text())
        for part in (settings, settings.get("text_config", {})):
            part.pop("eos_token_id", None)
        settings["eos_token_id"] = None
        if "text_config" in settings:
            settings["text_config"]["eos_token_id"] = None
        file.write_text(json.dumps(settings))


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
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        endless(Path(folder))
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
            settings = {
                "model": "random LLaVA-1.5, llama 512 x 8, 576 visual tokens, float32",
                "method": given.method,
                "keep": given.keep,
                "rounds": given.rounds,
                "new_tokens": TOKENS,
                "max_batch": 8,
            }
            head = {"machine": describe_machine(), "settings": settings}
            rows = asyncio.run(measure(asked, given.rounds))
            RESULT.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
        finally:
            for server in servers:
                server.stop()


if __name__ == "__main__":
    main()
