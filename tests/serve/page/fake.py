"""A server that answers as the page expects, with canned words, and notes what it was asked."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from foveate.serve.page import router

METHODS = [
    {
        "slug": "tome",
        "stage": "vision",
        "paper": "Bolya et al. 2023, arXiv:2210.09461",
        "summary": "Merge similar patches.",
        "default_keep": None,
        "works": False,
        "why_not": "tome needs <b>encoder keys</b>",
        "default": None,
    },
    {
        "slug": "fastv",
        "stage": "llm",
        "paper": "Chen et al. 2024, arXiv:2403.06764",
        "summary": "Rank <i>once</i> by attention.",
        "default_keep": 0.5,
        "works": True,
        "why_not": "",
        "default": None,
    },
    {
        "slug": "pyramiddrop",
        "stage": "llm",
        "paper": "Xing et al. 2024, arXiv:2410.17247",
        "summary": "Rank by attention, stage by stage.",
        "default_keep": [0.5, 0.25, 0.125],
        "works": True,
        "why_not": "",
        "default": None,
    },
]
BEFORE = 256


class Fake:
    """What the server says, to be changed by a test; the bodies and keys that it got.

    Attributes:
        words: of the answer with a method, and with all tokens.
        refusal: what every question gets instead of an answer.
        methods: what it has.
        key: the API key that is asked for.
        truncated: whether the stream ends in the middle.
        broken: message of an error within the stream.
        pause: seconds between two words.
        requests: bodies of the questions, in order.
        left: how many streams were closed by the page.
    """

    def __init__(self) -> None:
        self.words = ["a", "red", "heart"], ["a", "red", "heart"]
        self.refusal: Response | None = None
        self.methods = METHODS
        self.key = ""
        self.truncated, self.broken, self.pause = False, "", 0.0
        self.requests: list[dict[str, Any]] = []
        self.left = 0
        self.app = FastAPI()
        self.app.include_router(router)
        self.app.get("/v1/models")(self.models)
        self.app.get("/v1/methods")(lambda: self.methods)
        self.app.post("/v1/chat/completions")(self.complete)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny"}]}

    async def complete(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "a key is needed"}}, 401)
        if self.refusal is not None:
            return self.refusal
        body = await request.json()
        self.requests.append(body)
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        words, pause = self.words[body["keep"] == 1], self.pause
        try:
            for number, word in enumerate(words):
                delta = {"content": word if not number else f" {word}"}
                yield line({"choices": [{"delta": delta, "finish_reason": None}]})
                await asyncio.sleep(pause)
                if self.truncated:
                    return
            if self.broken:
                yield line({"error": {"message": self.broken}})
                return
        except asyncio.CancelledError:
            self.left += 1
            raise
        yield line({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        yield line({"choices": [], "foveate": facts(body)})
        yield "data: [DONE]\n\n"


def line(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def facts(body: dict[str, Any]) -> dict[str, Any]:
    """The `foveate` object of a response: two stages, half the tokens at the first."""
    keep = body["keep"] if isinstance(body["keep"], float) else 1
    kept = round(keep * BEFORE)
    images = sum(part["type"] == "image_url" for part in body["messages"][0]["content"])
    stages = [
        {"site": site, "name": name, "kept": count, "picture": data_url(png((200, 80, 0)))}
        for site, name, count in (
            ("llm:3", "from layer 3 on", (kept + BEFORE) // 2),
            ("llm:6", "from layer 6 on", kept),
        )
    ]
    shown = [{"before": BEFORE, "stages": stages}] * images if body.get("show_kept") else None
    return {
        "method": {},
        "visual_tokens": {"before": BEFORE, "after": kept},
        "flops": {"prefill": 3e9 * keep, "prefill_all": 3e9},
        "kv_bytes": {"now": int(4e6 * keep), "all": 4_000_000},
        "seconds": {"first_token": 0.2 * keep, "total": 0.3},
        **({"images": shown} if shown else {}),
    }


def png(colour: tuple[int, int, int]) -> bytes:
    """A small image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app from a thread, on a free port; the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
