"""A policy: which recipe a question gets, by what the question and its images show beforehand.

Of every recipe a line says how good its answer is likely to be:

    value = bias + weights . signals - price * flops

and the recipe with the largest value is taken. Signals are cheap: they need neither the model nor
its processor. `foveate.tune.adapting` fits a policy.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.core import Method
from foveate.core.saving import check_readable, check_registered, from_dict, read_json
from foveate.errors import FoveateError, InputError
from foveate.io.quoting import quoted, shown, within
from foveate.io.writing import write_json

FORMAT = 1
SIGNALS = ("words", "images", "megapixels", "gradient", "entropy")
"""Signals before those that tell whether a word is in the question."""
SIDE = 256
"""Images are measured at this width and height at most."""


def words_in(question: str) -> list[str]:
    """The words of a question, in lower case and in order."""
    return re.findall(r"\w+", question.lower())


def signals(question: str, images: Iterable[Image.Image], words: Sequence[str]) -> list[float]:
    """What is seen before the model runs.

    Args:
        question: its text.
        images: its images; frames of a video count as images.
        words: words to look for.

    Returns:
        Logarithm of the number of words; number of images; logarithm of their pixels; mean
        gradient of the grey levels, of 1 between black and white; entropy of the grey levels in
        bits; and for each of `words` 1 or 0. Images are measured at `SIDE` and averaged.
    """
    said, opened = words_in(question), list(images)
    measured = [_complexity(image) for image in opened] or [(0.0, 0.0)]
    gradient, entropy = np.mean(measured, axis=0).tolist()
    pixels = sum(image.width * image.height for image in opened)
    first = [math.log1p(len(said)), len(opened), math.log1p(pixels), gradient, entropy]
    return [*map(float, first), *(float(word in said) for word in words)]


def _complexity(image: Image.Image) -> tuple[float, float]:
    """Mean gradient and entropy of an image's grey levels."""
    grey = image.convert("L")
    grey.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    levels = np.asarray(grey)
    values = levels.astype(np.float64) / 255
    steps = [np.abs(np.diff(values, axis=axis)) for axis in (0, 1)]
    shares = np.bincount(levels.ravel(), minlength=256) / levels.size
    shares = shares[shares > 0]
    gradient = sum(float(step.mean()) for step in steps if step.size)
    return gradient, float(-(shares * np.log2(shares)).sum())


@dataclass(frozen=True)
class Option:
    """A recipe that a policy may choose.

    Args:
        methods: in stream order.
        flops: share of the unpruned model's FLOPs that it took on the questions of the fit.
        bias: how good its answer is where all signals are 0.
        weights: what each signal adds.
    """

    methods: tuple[Method, ...]
    flops: float
    bias: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Policy:
    """Chooses a recipe for each question.

    Args:
        options: recipes to choose from.
        price: quality that a whole prompt's FLOPs must be worth.
        words: words that signals look for.
        low: of each signal the least that was seen in the fit; a smaller one counts as this.
        high: the same for the largest.

    Raises:
        InputError: there is no option, or numbers are missing or not finite.
    """

    options: tuple[Option, ...]
    price: float
    words: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        size = len(SIGNALS) + len(self.words)
        rows = [self.low, self.high, *(option.weights for option in self.options)]
        if not self.options:
            raise InputError("a policy needs recipes to choose from")
        if any(len(row) != size for row in rows):
            raise InputError(f"a policy of {len(self.words)} words needs {size} numbers a row")
        alone = [self.price, *(x for o in self.options for x in (o.flops, o.bias))]
        if not all(math.isfinite(x) for row in (alone, *rows) for x in row):
            raise InputError("the numbers of a policy must be finite")

    def choose(self, question: str, images: Iterable[Image.Image]) -> tuple[Method, ...]:
        """The recipe for a question.

        Args:
            question: its text, without the chat template.
            images: its images; of videos, the frames.

        Returns:
            Methods, as `foveate.use` takes them.
        """
        return self.options[self.pick(signals(question, images, self.words))].methods

    def pick(self, seen: Sequence[float]) -> int:
        """Which of the options `signals` lead to; of equals the cheapest."""
        x = np.clip(seen, self.low, self.high)
        values = [o.bias + float(np.dot(o.weights, x)) - self.price * o.flops for o in self.options]
        order = sorted(range(len(values)), key=lambda n: (-values[n], self.options[n].flops))
        return order[0]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON.

        Raises:
            InputError: the file cannot be written, or a method cannot be read back.
        """
        for method in (method for option in self.options for method in option.methods):
            check_registered(method)
            check_readable(method)
        options = [
            {"methods": [m.to_dict() for m in o.methods], "flops": o.flops, "bias": o.bias,
             "weights": list(o.weights)}
            for o in self.options
        ]  # fmt: skip
        write_json(Path(path), {
            "policy": FORMAT, "price": self.price, "signals": [*SIGNALS, *self.words],
            "low": list(self.low), "high": list(self.high), "options": options,
        })  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> Policy:
        """What the file holds, as `json.loads` gives it.

        Raises:
            FoveateError: it is something else, or a method is refused.
        """
        if not isinstance(data, dict) or data.get("policy") != FORMAT:
            raise InputError(f"this is no policy: no `policy` of {FORMAT}; see foveate tune")
        names, options = data.get("signals"), data.get("options")
        if not isinstance(names, list) or tuple(names[: len(SIGNALS)]) != SIGNALS:
            raise InputError(f"`signals` of a policy begin with {', '.join(SIGNALS)}")
        if not isinstance(options, list) or not all(isinstance(o, dict) for o in options):
            raise InputError(f"`options` of a policy is a list of objects, got {quoted(options)}")
        made = tuple(
            Option(
                tuple(map(from_dict, _list(option, "methods"))), _number(option, "flops"),
                _number(option, "bias"), _row(option, "weights"),
            )
            for option in options
        )  # fmt: skip
        words = tuple(str(name) for name in names[len(SIGNALS) :])
        return cls(made, _number(data, "price"), words, _row(data, "low"), _row(data, "high"))


def adaptive(policy: Policy | str | os.PathLike[str]) -> Policy:
    """A policy that chooses a recipe for each question.

    Args:
        policy: the file that `foveate tune --adaptive` has written, or what was read from one.

    Raises:
        FoveateError: it cannot be read, is no policy, or names a method that is not known here.

    Examples:
        >>> policy = foveate.adaptive("tuned/policy.json")  # doctest: +SKIP
        >>> recipe = policy.choose("How many cats?", [image])  # doctest: +SKIP
        >>> with foveate.use(model, recipe):  # doctest: +SKIP
        ...     out = model.generate(**inputs)
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str | os.PathLike):
        raise InputError(
            f"a policy is a file of foveate tune --adaptive, got {shown(type(policy).__name__)}"
        )
    data = read_json(Path(policy))
    try:
        return Policy.from_dict(data)
    except FoveateError as error:
        raise type(error)(within(policy, error)) from None


def _list(data: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(found := data.get(name), list) or not found:
        raise InputError(f"`{name}` of a policy is a list with entries, got {quoted(found)}")
    return found


def _number(data: dict[str, Any], name: str) -> float:
    found = data.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise InputError(f"`{name}` of a policy is a number, got {quoted(found)}")
    return float(found)


def _row(data: dict[str, Any], name: str) -> tuple[float, ...]:
    return tuple(_number({name: value}, name) for value in _list(data, name))
