"""Which models, sessions and numbers serve a stream."""

from __future__ import annotations

from typing import Any

from foveate.engine.session import BaseSession
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import Family
from foveate.io.quoting import each_of, quoted
from foveate.measure.flops import kv_bytes
from foveate.streaming.infinipot import InfiniPotV
from foveate.streaming.positions import most_positions

TESTED = (
    "glm4v", "internvl", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3",
    "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "video_llava", "vipllava",
)  # fmt: skip
"""Model types whose streams equal the oracle in `tests/streaming`."""


def check_session(run: Any, cap: int, reserve: int, rule: Any, positions: str) -> None:
    """Refuse what cannot serve a stream; arguments as in `Stream`.

    Raises:
        UnsupportedModelError: the model cannot.
        InputError: a method or a number cannot.
    """
    if not isinstance(run, BaseSession):
        raise InputError(
            f"a stream is given a session, with foveate.use(...) as run: Stream(run, ...); got "
            f"{quoted(run)}"
        )
    _check_model(run.family)
    if run.plan.total is not None:
        raise InputError(
            "keep_total is for conversations; a stream has a cap on all tokens of its own: leave "
            "keep_total out of the session"
        )
    if unfit := _unfit(run):
        raise InputError(
            f"{each_of(unfit)} reads the question or acts between decoder layers, but frames of a "
            "stream come before any question, and every layer holds equally many; use a method "
            "that acts before the language model and does not read the prompt, such as 'divprune'"
        )
    for name, value, low in (("cap", cap, 1), ("reserve", reserve, 0)):
        if type(value) is not int or value < low:
            raise InputError(f"{name} must be an integer of at least {low}, got {quoted(value)}")
    if reserve >= cap:
        raise InputError(f"a reserve of {reserve} leaves no room for frames in a cap of {cap}")
    if not isinstance(rule, InfiniPotV):
        raise InputError(f"rule must be an InfiniPotV, got {quoted(rule)}")
    if positions not in ("original", "renumbered"):
        raise InputError(f"positions must be original or renumbered, got {quoted(positions)}")
    _check_positions(run.family, cap, positions)


def _unfit(run: BaseSession) -> list[str]:
    """Methods that frames cannot pass before there is a question."""
    plan = run.plan
    steps = [*plan.llm, *filter(None, [plan.decode_step])]
    names = {*plan.asks_text, *(step.method.slug for step in steps)}
    names |= {method.slug for method in run.methods if method.partial_compute(run.family)}
    return [method.slug for method in run.methods if method.slug in names]


def _check_model(family: Family) -> None:
    why = _why_not(family)
    if why:
        raise UnsupportedModelError(
            f"a stream cannot run on this {family.model_type}: {why}; models that work: "
            f"{', '.join(TESTED)}"
        )


def _why_not(family: Family) -> str:
    """Why a model cannot serve streams; nothing if it can."""
    if not family.generates or not family.text_layers:
        return "it does not generate text"
    if family.keyless_layers:
        return "some of its layers keep a running state, from which nothing can be evicted"
    if any(donor != number for number, donor in enumerate(family.donors)):
        return "some of its layers read the keys of others"
    if set(family.layer_kinds) != {"full_attention"} or family.window is not None:
        return "some of its layers see a window, and hold fewer tokens than others"
    if not family.causal:
        return "its tokens see what comes after them"
    if family.rotary_by_length:
        return "its rotary embeddings change with the length of the sequence"
    return "" if family.model_type in TESTED else "streams of it have not been tested"


def _check_positions(family: Family, cap: int, positions: str) -> None:
    if positions == "renumbered" and not family.one_dimensional:
        raise InputError(
            f"{family.model_type} places tokens in time, height and width, where closing gaps has "
            "no meaning; leave positions='original'"
        )
    limit = most_positions(family.text.config)
    if limit is not None and cap > limit:
        raise InputError(
            f"a cap of {cap} is more than the {limit} positions that this {family.model_type} was "
            "made for"
        )


def tokens_in(run: BaseSession, size: int) -> int:
    """A cap for `Stream`: how many tokens a cache of some bytes holds.

    Args:
        run: the session.
        size: bytes of keys and values, in all layers.

    Raises:
        InputError: not even one fits.
    """
    family = run.family
    one = kv_bytes(family, [1] * family.text_layers, 1, family.text.dtype)
    if size < one:
        raise InputError(f"the cache of one token takes {one} bytes, which is more than {size}")
    return size // one
