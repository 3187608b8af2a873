"""Request: which method a request asks for, read from its `mm_processor_kwargs`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.core.method import Method
from foveate.core.saving import from_dict
from foveate.errors import InputError
from foveate.io.quoting import quoted, shown

PREFIX = "foveate_"
FIELDS = ("foveate_method", "foveate_keep", "foveate_fields", "foveate_question")
ELSEWHERE = {
    "foveate_keep_total": "it encodes and caches each image by itself, so that what is left of one "
    "cannot depend on the others of its prompt; give foveate_keep as a count per image, or use "
    "foveate serve",
    "foveate_audio": "the models that foveate serves there take images and videos, and no audio",
}
"""What `foveate.use` takes, and a request of vLLM does not."""
KEY = "foveate"
"""Where a checked request stands among the arguments of vLLM's processor; hashed with the image."""


@dataclass(frozen=True)
class Request:
    """A method, and what it is told besides the image.

    Args:
        method: the method.
        question: the text that the method compares visual tokens with; `None` if it was not given.
        token_ids: the same as tokens of the language model; empty where the method reads no text.
    """

    method: Method
    question: str | None = None
    token_ids: tuple[int, ...] = field(default=())

    def to_text(self) -> str:
        """JSON, equal for equal requests."""
        return json.dumps(
            {"method": self.method.to_dict(), "token_ids": self.token_ids}, sort_keys=True
        )

    @classmethod
    def from_text(cls, text: str) -> Request:
        """The request that `to_text` has written."""
        data = json.loads(text)
        return cls(from_dict(data["method"]), token_ids=tuple(data["token_ids"]))


def split(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of foveate, and the others.

    Args:
        kwargs: `mm_processor_kwargs`.

    Raises:
        InputError: an argument of foveate has an unknown name, or is not for vLLM.
    """
    ours = {n: value for n, value in kwargs.items() if n == KEY or n.startswith(PREFIX)}
    for name, why in ELSEWHERE.items():
        if name in ours:
            raise InputError(f"{name} is not supported in vLLM: {why}")
    if unknown := sorted(set(ours) - set(FIELDS)):
        raise InputError(f"{shown(unknown[0])} is unknown; foveate takes {', '.join(FIELDS)}")
    return ours, {name: value for name, value in kwargs.items() if name not in ours}


def parse(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Request | None:
    """What a request asks for, or `None` for vLLM as it is.

    Args:
        given: the request's arguments of foveate. A method of `None` turns the default off; one
            that is named comes with its own keep and fields, and not with those of the default.
        defaults: the server's.

    Raises:
        UnknownMethodError: no such method.
        FoveateError: a field does not fit the method.
        BudgetError: the keep is out of range.
        InputError: a value is of the wrong type, or comes without a method.
    """
    merged = dict(given) if "foveate_method" in given else {**defaults, **given}
    name = merged.get("foveate_method")
    if name is None:
        if idle := [f for f in FIELDS[1:] if given.get(f) is not None and f != FIELDS[3]]:
            raise InputError(f"{idle[0]} is given, but no foveate_method")
        return None
    if not isinstance(name, str):
        raise InputError(f"foveate_method is a method's name, got {quoted(name)}")
    question = merged.get("foveate_question")
    if question is not None and not isinstance(question, str):
        raise InputError(f"foveate_question must be a string, got {quoted(question)}")
    return Request(from_dict({"method": name, **_fields(merged)}), question)


def _fields(merged: Mapping[str, Any]) -> dict[str, Any]:
    fields = merged.get("foveate_fields") or {}
    if isinstance(fields, str):  # as some clients send nested values
        try:
            fields = json.loads(fields)
        except ValueError:
            raise InputError(f"foveate_fields is not JSON: {quoted(fields)}") from None
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
        raise InputError(f"foveate_fields is an object of fields, got {quoted(fields)}")
    if "keep" in fields:
        raise InputError("foveate_fields holds the method's other fields; give foveate_keep")
    keep = merged.get("foveate_keep")
    return dict(fields) if keep is None else {**fields, "keep": _keep(keep)}


def _keep(keep: Any) -> Any:
    """A keep as JSON has it, where 1 is how many clients write 1.0: all."""
    return 1.0 if type(keep) is int and keep == 1 else keep


def pack(text: str, items: int) -> list[Tensor]:
    """A request as bytes, for each of the items that it is about."""
    packed = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return [packed.clone() for _ in range(items)]


def unpack(packed: Tensor | Sequence[Tensor]) -> list[str]:
    """The requests of items, from what `pack` has made of them."""
    return [bytes(row.flatten().tolist()).decode() for row in packed]
