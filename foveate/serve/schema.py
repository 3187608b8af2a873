"""Bodies of requests: what is taken, what changes nothing, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from foveate.io.quoting import shown
from foveate.serve.errors import RequestError
from foveate.serve.request import Choice, Sampling
from foveate.serve.settings import Settings

IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Fields that say nothing about the answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "conversation": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not supported, and the values that ask for nothing."""
WORDS = {
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "union_tag_not_found": "needs a type",
}
"""What pydantic says in terms of its own, in those of JSON."""
TEXTS = ("content", "input", "stop")
"""Lists in place of which a text is taken."""
SOUND = ("input_audio", "audio", "audio_url")
"""Types of parts that hold audio, as clients spell them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        """Without what is null: clients that repeat an answer send all fields it could have."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class _Image(_Strict):
    url: str
    detail: Literal["auto"] | None = None


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @field_validator("text")
    @classmethod
    def _whole(cls, text: str) -> str:
        """JSON can spell halves of characters, of which no tokenizer makes anything."""
        text.encode()
        return text


class ImagePart(_Strict):
    """An image of a message, in chat completions."""

    type: Literal["image_url"]
    image_url: _Image

    @property
    def url(self) -> str:
        """Where it is."""
        return self.image_url.url


class InputImage(_Strict):
    """An image of a message, in responses."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto"] | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return self.image_url


class Message(_Strict):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart | InputImage, Field(discriminator="type")]]
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    refusal: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        """A text is a message of one part."""
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Body(_Strict):
    """What both kinds of requests share."""

    model: str
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    method: str | None = None
    keep: Any = None
    keep_total: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    fields: dict[str, Any] | None = None
    show_kept: bool | None = None

    @property
    def choice(self) -> Choice:
        """What removes visual tokens."""
        return Choice(self.method, self.keep, self.fields or {})

    def sampling_with(self, settings: Settings, limit: str, **more: Any) -> Sampling:
        """How the answer is made; `limit` is the field that has its longest."""
        most: int | None = getattr(self, limit)
        if most is not None and most > settings.max_tokens:
            raise RequestError(
                f"the answer may have up to {settings.max_tokens} tokens here, got {most}",
                param=limit,
            )
        return Sampling(most, self.temperature or 0.0, self.top_p or 1.0, **more)


class StreamOptions(_Strict):
    """What a stream holds besides text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatBody(_Body):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(
        None, max_length=4
    )
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def turns(self) -> list[Message]:
        """The conversation."""
        return self.messages

    def sampling(self, settings: Settings) -> Sampling:
        """How the answer is made."""
        limit = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
        return self.sampling_with(settings, limit, seed=self.seed, stop=tuple(self.stop or ()))


class ResponsesBody(_Body):
    """Body of `/v1/responses`."""

    input: Annotated[list[Message], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _messages(cls, given: Any) -> Any:
        return [{"role": "user", "content": given}] if isinstance(given, str) else given

    @property
    def turns(self) -> list[Message]:
        """The conversation, with the instructions first."""
        if not self.instructions:
            return self.input
        return [Message(role="system", content=self.instructions), *self.input]  # type: ignore[arg-type]

    def sampling(self, settings: Settings) -> Sampling:
        """How the answer is made."""
        return self.sampling_with(settings, "max_output_tokens")


Body = ChatBody | ResponsesBody


def read(raw: bytes, kind: type[Body], settings: Settings) -> Body:
    """A body, checked.

    Raises:
        RequestError: says the first thing that is wrong.
    """
    try:
        given = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {shown(str(error), 100)}") from None
    if not isinstance(given, dict):
        raise RequestError("the body must be a JSON object")
    wanted = {k: v for k, v in given.items() if v is not None and k not in IGNORED}
    for name, values in NEUTRAL.items():
        foreign = name in wanted and name not in kind.model_fields
        if foreign and wanted.pop(name) not in values:
            why = ", whose messages hold text and images alone" if name == "audio" else ""
            raise RequestError(f"{name} is not supported by this server{why}", param=name)
    try:
        body: Body = kind.model_validate(wanted)
        _check(body, settings)
    except ValidationError as error:
        raise _told(error) from None
    return body


def _check(body: Body, settings: Settings) -> None:
    """Refuse another model, and conversations that ask nothing."""
    if body.model != settings.model:
        raise RequestError(
            f"there is no model {shown(body.model, 100)!r} here; this server has "
            f"{settings.model!r}",
            404,
            "model",
            "model_not_found",
        )
    if body.turns[-1].role != "user":
        raise RequestError("the last message must be the user's", param="messages")
    for turn in body.turns:
        if turn.role != "user" and any(not isinstance(part, TextPart) for part in turn.content):
            raise RequestError(f"a message of the {turn.role} holds text alone", param="messages")
        if not turn.content:
            raise RequestError("a message needs content", param="messages")


def messages_of(body: Body, images: list[Any]) -> list[dict[str, Any]]:
    """The conversation as chat templates take it.

    Args:
        body: the request.
        images: in the order of `urls_of`.
    """
    left, messages = iter(images), []
    for turn in body.turns:
        parts = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image", "image": next(left)}
            for part in turn.content
        ]
        role = "system" if turn.role == "developer" else turn.role
        messages.append({"role": role, "content": parts})
    return messages


def urls_of(body: Body) -> list[str]:
    """Where the images are, in order."""
    parts = (part for turn in body.turns for part in turn.content)
    return [part.url for part in parts if not isinstance(part, TextPart)]


def _told(error: ValidationError) -> RequestError:
    """The first error of a body, as one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field {shown(where, 100)}", param=where)
    if first["type"] == "union_tag_invalid" and _kind(first["input"]) in SOUND:
        return RequestError(
            f"{shown(where, 100)}: {_kind(first['input'])} is not supported by this server, whose "
            "messages hold text and images alone",
            param=where,
        )
    why = WORDS.get(first["type"], first["msg"])
    if first["type"] == "list_type":
        why = "must be a text or a list" if first["loc"][-1] in TEXTS else "must be a list"
    return RequestError(
        f"{shown(where, 100) or 'the body'}: {shown(why, 200)}", param=where or None
    )


def _path(steps: tuple[int | str, ...]) -> str:
    """Where a value is in a body, without the type of a part, which pydantic counts as a step."""
    parts = [n for n, step in enumerate(steps) if n > 1 and steps[n - 2] == "content"]
    return ".".join(str(step) for n, step in enumerate(steps) if n not in parts)


def _kind(part: Any) -> Any:
    """The type of a message's part."""
    return part.get("type") if isinstance(part, dict) else None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
