"""Exchange: one request from its first byte to the last of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from foveate.errors import FoveateError
from foveate.serve.errors import RequestError, ServerError, too_late
from foveate.serve.images import load_images
from foveate.serve.metrics import Metrics
from foveate.serve.request import Delta, End, Question
from foveate.serve.schema import Body, messages_of, read, urls_of
from foveate.serve.settings import Settings
from foveate.serve.wire import Dialect

log = logging.getLogger("foveate.serve")
FAILED = "the server failed; its log says more"
Receive = Callable[[], Awaitable[Any]]
Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client has closed the connection."""


class Exchange:
    """Reads a request, asks the engine, and writes the answer in the dialect of the request.

    Args:
        engine: what answers.
        settings: the limits.
        metrics: what counts.
        dialect: a class of `wire`.
        left: called once when the request is over.
    """

    def __init__(
        self,
        engine: Any,
        settings: Settings,
        metrics: Metrics,
        dialect: type[Dialect],
        left: Callable[[], None],
    ) -> None:
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self._kind, self._left, self._over = dialect, left, False
        self._begun = time.monotonic()
        self._said: dict[str, Any] = {}

    async def respond(self, request: Request) -> Response:
        """The response; a stream goes on after this returns."""
        try:
            raw = await self._read(request)
            return await unless_gone(request.receive, self._respond(raw))
        except (ClientGoneError, ClientDisconnect):
            self.leave("cancelled")
            return Response(status_code=499)
        except BaseException as error:
            self.leave(outcome_of(error))
            if isinstance(error, FoveateError) or not isinstance(error, Exception):
                raise
            log.error("a request could not be answered", exc_info=error)
            raise ServerError(FAILED, 500) from None  # as another error it would cut the connection

    async def _respond(self, raw: bytes) -> Response:
        body = await asyncio.to_thread(read, raw, self._kind.body_type, self._settings)
        question = await self._question(body)
        dialect = self._kind(self._settings.model, body)
        self._said = {"id": dialect.id, "stream": bool(body.stream), "images": len(question.images)}
        events = self._engine.submit(question)
        first = await anext_of(events)
        if body.stream:
            return _Stream(self, dialect, events, first)
        text, end = await _collect(events, first)
        self.leave("answered", end)
        return JSONResponse(dialect.whole(text, end))

    async def _read(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            RequestError: it is too long, does not come, or is not said to be JSON.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which pages of other sites cannot send
            raise RequestError("a request needs the header Content-Type: application/json", 415)
        most, data = self._settings.max_body, bytearray()
        too_long = RequestError(f"the request has more than {most} bytes", 413)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_long
        stream = request.stream()
        while True:
            try:
                part = await asyncio.wait_for(anext_of(stream), self._seconds)
            except StopAsyncIteration:
                return bytes(data)
            except asyncio.TimeoutError:
                raise RequestError("the body did not arrive in time", 408) from None
            data += part
            if len(data) > most:
                raise too_long

    async def _question(self, body: Body) -> Question:
        loading = load_images(urls_of(body), self._settings)
        try:
            images = await asyncio.wait_for(loading, self._seconds)
        except asyncio.TimeoutError:
            raise too_late() from None
        return Question(
            messages_of(body, images),
            body.choice,
            body.sampling(self._settings),
            bool(body.show_kept or (body.show_kept is None and self._settings.show_kept)),
            self._seconds,
            bool(body.stream),
            body.keep_total,
        )

    @property
    def _seconds(self) -> float:
        """Until the deadline."""
        return max(self._settings.deadline - (time.monotonic() - self._begun), 0.0)

    def leave(self, outcome: str, end: End | None = None) -> None:
        """Count and log the request; only the first call counts."""
        if self._over:
            return
        self._over = True
        self._left()
        fields = {"path": self._kind.path, "outcome": outcome, **self._said}
        if end is not None:
            counted = {"foveate": end.summary, "tokens": end.tokens, "batch": end.batch}
            self._metrics.answered(counted)
            shown = {k: v for k, v in end.summary.items() if k != "images"}
            fields |= {**shown, "tokens": end.tokens, "batch": end.batch}
        fields["ms"] = round(1000 * (time.monotonic() - self._begun))
        self._metrics.ended(self._kind.path, outcome)
        log.info("request", extra={"fields": fields})


class _Stream(Response):
    """An answer as server-sent events, which ends with the client."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, dialect: Dialect, events: Any, first: Any) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._exchange, self._dialect = exchange, dialect
        self._events, self._first = events, first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_gone(receive, self._write(send))
        except ClientGoneError:
            self._exchange.leave("cancelled")
        finally:
            await self._events.aclose()
            self._exchange.leave("cancelled")

    async def _write(self, send: Any) -> None:
        headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in self._dialect.begin():
            await _body(send, part)
        try:
            text, end = "", None
            async for event in _after(self._first, self._events):
                if isinstance(event, End):
                    end = event
                    break
                text += event.text
                for part in self._dialect.delta(event.text):
                    await _body(send, part)
            assert end is not None
            parts = list(self._dialect.finish(text, end))
            self._exchange.leave("answered", end)
        except Exception as error:
            if not isinstance(error, FoveateError):
                log.error("an answer could not be written", exc_info=error)
            parts = list(self._dialect.fail(said(error)["error"]))
            self._exchange.leave(outcome_of(error))
        for part in parts:
            await _body(send, part)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work as long as the client is there, after its body was read.

    ASGI reports a disconnect after a complete response too, so what the work has returned counts
    before the client's absence.

    Args:
        receive: of ASGI.
        work: what to do; it is cancelled when the client leaves.

    Raises:
        ClientGoneError: the client has left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def anext_of(events: AsyncIterator[Result]) -> Result:
    """The next of some events, as a coroutine."""
    return await events.__anext__()


async def _after(first: Any, events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for event in events:
        yield event


async def _collect(events: Any, first: Delta | End) -> tuple[str, End]:
    """All text of an answer, and its end."""
    text = ""
    async with contextlib.aclosing(events):
        async for event in _after(first, events):
            if isinstance(event, End):
                return text, event
            text += event.text
    raise ServerError("the answer has no end", 500)


async def _body(send: Any, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


def status_of(error: BaseException) -> int:
    """The HTTP status of an error: what users cause is 400, whatever it is."""
    if isinstance(error, RequestError):
        return error.status
    return 400 if isinstance(error, FoveateError) else 500


def outcome_of(error: BaseException) -> str:
    """What metrics and logs call an error."""
    return "cancelled" if isinstance(error, asyncio.CancelledError) else str(status_of(error))


def said(error: BaseException) -> dict[str, Any]:
    """An error as OpenAI's interface says it."""
    status = status_of(error)
    known = isinstance(error, FoveateError)
    return {
        "error": {
            "message": str(error) if known else FAILED,
            "type": "server_error" if status >= 500 else "invalid_request_error",
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None) or (type(error).__name__ if known else None),
        }
    }
