"""What the engine is asked, and what it says: plain values, which can cross processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Sampling:
    """How tokens of an answer are chosen, and where it ends.

    Args:
        max_tokens: longest answer; `None` for what the engine allows.
        temperature: 0 takes the likeliest token each time.
        top_p: draw among the likeliest tokens that have this much probability together.
        seed: of the draws; `None` for another one each time.
        stop: strings before which the answer ends.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What is to remove visual tokens.

    Args:
        method: a name that `foveate list` shows; `None` for the server's method.
        keep: what survives; `None` for the method's own. 1 is all tokens, other whole numbers are
            counts per image, and a list is a schedule.
        fields: other fields of the method.
    """

    method: str | None = None
    keep: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Question:
    """One request.

    Args:
        messages: a conversation as chat templates take it, each a list of parts, images as RGB.
        choice: what removes visual tokens.
        sampling: how the answer is made.
        show_kept: whether the answer holds drawings of the kept tokens.
        seconds: from now to the deadline.
        streamed: whether the client is sent the text as it comes.
        keep_total: most visual tokens of it, where it asks for fewer than the engine allows.
    """

    messages: list[dict[str, Any]]
    choice: Choice = field(default_factory=Choice)
    sampling: Sampling = field(default_factory=Sampling)
    show_kept: bool = False
    seconds: float = 300.0
    streamed: bool = False
    keep_total: int | None = None

    @property
    def images(self) -> list[Image.Image]:
        """Its images, in order."""
        parts = (
            p for m in self.messages if not isinstance(m["content"], str) for p in m["content"]
        )
        return [part["image"] for part in parts if part["type"] == "image"]

    @property
    def text(self) -> str:
        """What its last message says."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return "\n".join(part["text"] for part in content if part["type"] == "text")


@dataclass(frozen=True)
class Delta:
    """More text of an answer."""

    text: str


@dataclass(frozen=True)
class End:
    """The end of an answer.

    Args:
        reason: `stop`, or `length` where the answer was cut.
        prompt_tokens: of the prompt before anything was removed.
        tokens: of the answer, without the token that ended it.
        batch: requests that were answered together.
        summary: what was removed and what it saved; the `foveate` object of a response.
    """

    reason: str
    prompt_tokens: int
    tokens: int
    batch: int
    summary: dict[str, Any]
