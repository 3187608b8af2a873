"""Dialects: how OpenAI's two kinds of responses are written, whole and as streams.

Every object passes the official client's own types, so that a field it needs cannot be forgotten.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from pydantic import BaseModel

from foveate.serve.request import End
from foveate.serve.schema import Body, ChatBody, ResponsesBody


def sse(data: str, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {data}\n\n".encode()


@dataclass
class Dialect(ABC):
    """One response, as one of OpenAI's interfaces writes it.

    Args:
        model: the name of the model.
        body: the request.
    """

    body_type: ClassVar[type[Body]]
    path: ClassVar[str]
    model: str
    body: Any
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @abstractmethod
    def whole(self, text: str, end: End) -> dict[str, Any]:
        """The response in one piece."""

    @abstractmethod
    def begin(self) -> Iterator[bytes]:
        """Events before the text."""

    @abstractmethod
    def delta(self, text: str) -> Iterator[bytes]:
        """Events that carry more text."""

    @abstractmethod
    def finish(self, text: str, end: End) -> Iterator[bytes]:
        """Events after the text."""

    @abstractmethod
    def fail(self, error: dict[str, Any]) -> Iterator[bytes]:
        """Events that end a stream which cannot go on."""


class Chat(Dialect):
    """`/v1/chat/completions`."""

    body_type = ChatBody
    path = "/v1/chat/completions"

    def whole(self, text: str, end: End) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": end.reason, "logprobs": None}
        return _checked(
            ChatCompletion,
            **self._head("chat.completion"),
            choices=[choice],
            usage=_chat_usage(end),
            foveate=end.summary,
        )

    def begin(self) -> Iterator[bytes]:
        """The role."""
        yield self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: str) -> Iterator[bytes]:
        """A piece of content."""
        yield self._chunk({"content": text})

    def finish(self, text: str, end: End) -> Iterator[bytes]:
        """The last chunk carries the `foveate` object; usage comes in one of its own."""
        yield self._chunk({}, end.reason, foveate=end.summary)
        options = self.body.stream_options
        if options is not None and options.include_usage:
            head = self._head("chat.completion.chunk")
            usage = _checked(ChatCompletionChunk, **head, choices=[], usage=_chat_usage(end))
            yield sse(json.dumps(usage))
        yield sse("[DONE]")

    def fail(self, error: dict[str, Any]) -> Iterator[bytes]:
        """An error in place of a chunk."""
        yield sse(json.dumps({"error": error}))

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        head = self._head("chat.completion.chunk")
        chunk = _checked(ChatCompletionChunk, **head, choices=[choice], **more)
        return sse(json.dumps(chunk))

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


@dataclass
class Responses(Dialect):
    """`/v1/responses`."""

    body_type = ResponsesBody
    path = "/v1/responses"
    number: int = 0

    def whole(self, text: str, end: End) -> dict[str, Any]:
        """A `response`."""
        cut = {"reason": "max_output_tokens"} if end.reason == "length" else None
        return self._response(
            "incomplete" if cut else "completed",
            incomplete_details=cut,
            output=[self._message(text, "incomplete" if cut else "completed")],
            usage=_responses_usage(end),
            foveate=end.summary,
        )

    def begin(self) -> Iterator[bytes]:
        """The response, its message and the message's text, all empty."""
        empty = self._response("in_progress", output=[])
        yield self._event("response.created", response=empty)
        yield self._event("response.in_progress", response=empty)
        item = {**self._message("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def delta(self, text: str) -> Iterator[bytes]:
        """A piece of text."""
        yield self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def finish(self, text: str, end: End) -> Iterator[bytes]:
        """The text, the message and the response, all complete."""
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=_part(text))
        response = self.whole(text, end)
        item = response["output"][0]
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def fail(self, error: dict[str, Any]) -> Iterator[bytes]:
        """An error, and a response that failed."""
        said = {"code": "server_error", "message": error["message"]}
        yield self._event("error", message=error["message"], code=error["code"], param=None)
        failed = self._response("failed", output=[], error=said)
        yield self._event("response.failed", response=failed)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return sse(json.dumps(event), kind)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text)],
        }

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        fixed = {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": float(self.created),
            "model": self.model,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "parallel_tool_calls": False,
            "temperature": self.body.temperature or 0.0,
            "tool_choice": "none",
            "tools": [],
            "top_p": self.body.top_p or 1.0,
            "error": None,
            "incomplete_details": None,
        }
        return _checked(Response, **{**fixed, "status": status, **fields})


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _chat_usage(end: End) -> dict[str, Any]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt_tokens + end.tokens,
        "visual_tokens": end.summary["visual_tokens"],
    }


def _responses_usage(end: End) -> dict[str, Any]:
    return {
        "input_tokens": end.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": end.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": end.prompt_tokens + end.tokens,
        "visual_tokens": end.summary["visual_tokens"],
    }


def _checked(kind: type[BaseModel], **fields: Any) -> dict[str, Any]:
    """Fields that are a valid object of the official client."""
    return kind.model_validate(fields).model_dump(mode="json", exclude_unset=True)
