"""Planning: steps of methods on a model, checked before anything is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from foveate.core import (
    Method,
    PartialCompute,
    Step,
    get_method,
    list_methods,
)
from foveate.core.budget import Total
from foveate.core.step import budgeted, entries
from foveate.engine.audio import Audio, check_audio, sharing
from foveate.engine.composition import check_order, check_together
from foveate.engine.extensions import extensions_of
from foveate.engine.extensions.partial.prefill import why_unsupported
from foveate.engine.needs import check_needs
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.total import check_total
from foveate.engine.vision.checks import check_in_encoder
from foveate.errors import FoveateError, LayerError, UnsupportedModelError
from foveate.families import Family
from foveate.io.quoting import each_of
from foveate.signals import SIGNALS


def make_plan(
    family: Family, methods: Sequence[Method], total: Total | None = None, audio: Audio = False
) -> Plan:
    """Plan methods on a model.

    Args:
        family: the model.
        methods: the methods, in stream order.
        total: as in `Plan`.
        audio: what acts on audio.

    Raises:
        LayerError: a layer lies outside the model, or the methods are not in stream order.
        UnsupportedModelError: the model cannot serve what a method needs, and the message lists
            methods that work; or audio cannot.
        BudgetError: a schedule does not have one entry for each step, or the methods cannot keep
            to the total.
    """
    try:
        plan = plain_plan(family, methods, total, audio)
    except UnsupportedModelError as error:
        raise offering(error, working_methods(family)) from None
    check_audio(family, plan, audio)
    return plan


def plain_plan(
    family: Family, methods: Sequence[Method], total: Total | None = None, audio: Audio = False
) -> Plan:
    """As `make_plan`, whose refusals do not list methods that work, nor concern audio."""
    own = audio if isinstance(audio, tuple) else ()
    steps: list[PlannedStep] = []
    for number, method in enumerate((*methods, *own)):
        planned = sharing(_steps(family, number, method), audio, own=number >= len(methods))
        before = [s for s in steps if planned and s.audio == planned[0].audio]
        if before:
            check_order(before, planned[0])
        steps += planned
    methods = (*methods, *own)

    def at(stage: str) -> tuple[PlannedStep, ...]:
        chosen = [s for s in steps if s.step.stage == stage and "decode" not in s.step.effects]
        chosen.sort(key=lambda s: s.step.in_stream)
        names = entries([s.step for s in chosen])
        return tuple(replace(s, entry=name) for s, name in zip(chosen, names, strict=True))

    decoding = [s for s in steps if "decode" in s.step.effects]
    if len(decoding) > 1:
        raise LayerError(
            f"{decoding[0].method.slug} and {decoding[1].method.slug} both choose what decoding "
            "steps attend to; use one of them"
        )
    work = _work(family, methods)
    check_together(family, methods, steps)
    decode = next(iter(decoding), None)
    plan = Plan(methods, at("vision"), at("pre_llm"), at("llm"), work, decode, total=total)
    check_total(plan)
    extensions, cached = extensions_of(plan)
    return replace(plan, extensions=extensions, cached_extensions=cached)


def _steps(family: Family, number: int, method: Method) -> list[PlannedStep]:
    """The steps of one method, each checked by itself."""
    # Before its steps: where a stage is missing, a method may find nothing to do there.
    _check_stage(family, method, method.stage)
    steps = method.steps(family)
    method.check_budget(budgeted(steps))
    renumber = method.positions_on(family) == "renumbered"
    learned = method.learned(family)
    planned = [
        PlannedStep(
            method,
            number,
            i,
            step,
            renumber and "keep_positions" not in step.effects,
            suspends,
            learned,
        )
        for i, (step, suspends) in enumerate(zip(steps, _suspending(steps), strict=True))
    ]
    for item in planned:
        _check_stage(family, method, item.step.stage)
        _check_layers(family, item)
        if item.step.stage == "vision":
            check_in_encoder(family, item)
        check_needs(family, item)
    return planned


def _check_stage(family: Family, method: Method, stage: str) -> None:
    if method.encoders_alone and family.text_layers:
        raise UnsupportedModelError(
            f"{method.slug!r} is for encoders alone, but {family.model_type!r} has a language model"
        )
    if stage != "vision" and not family.text_layers:
        raise UnsupportedModelError(
            f"{method.slug!r} acts in or before a language model, but {family.model_type!r} is an "
            "encoder alone"
        )
    if stage == "vision":
        _check_mixing(family, [method], "image", {})
        if family.encoder is None or family.encoder.block is None:
            raise UnsupportedModelError(
                f"{method.slug!r} acts inside the encoder, which is not supported on this "
                f"{family.model_type!r}"
            )


def check_mixing(
    family: Family, methods: Sequence[Method], modality: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse to act inside the encoder where patches do not belong to one visual token each.

    Raises:
        UnsupportedModelError: so it is for this modality, or for what is to be encoded.
    """
    try:
        _check_mixing(family, methods, modality, arguments)
    except UnsupportedModelError as error:
        raise offering(error, working_methods(family, vision=False)) from None


def _check_mixing(
    family: Family, methods: Sequence[Method], modality: str, arguments: Mapping[str, Any]
) -> None:
    if methods and (why := family.mixing(modality, arguments)):
        who = each_of(repr(method.slug) for method in methods)
        raise UnsupportedModelError(
            f"{who} acts inside the encoder, which is not supported for the {modality}s of "
            f"this {family.model_type!r}: {why}"
        )


def _check_layers(family: Family, planned: PlannedStep) -> None:
    step, slug = planned.step, planned.method.slug
    if step.stage == "vision" and not 0 <= step.layer <= family.feature_layer:
        raise LayerError(
            f"{slug} acts in encoder layer {step.layer}, but {family.beyond} layers 0 to "
            f"{family.feature_layer}"
        )
    if step.stage == "llm":
        _check_llm_layer(family, step, slug)


def _check_llm_layer(family: Family, step: Step, slug: str) -> None:
    if not 0 <= step.layer < family.text_layers:
        raise LayerError(
            f"{slug} acts before decoder layer {step.layer}, but this {family.model_type} has "
            f"layers 0 to {family.text_layers - 1}"
        )
    if "evict_cache" in step.effects and any(i < step.layer for i in family.recurrent_layers):
        raise UnsupportedModelError(
            f"{slug!r} takes tokens out of what the layers before {step.layer} have cached, but "
            f"recurrent layers of this {family.model_type} have mixed them into a running state, "
            "from which no token can be taken"
        )
    if "decode" in step.effects:
        if family.expert is not None:
            raise UnsupportedModelError(
                f"{slug!r} chooses what each new token attends to in the cache, but this "
                f"{family.model_type!r} makes no new tokens: an expert reads the cache"
            )
        if step.layer < 1 or step.layer - 1 not in family.attention_layers:
            raise LayerError(
                f"{slug} chooses what layers from {step.layer} on attend to by the layer before, "
                "which must see the whole sequence; layers that do are "
                f"{', '.join(map(str, family.attention_layers))}"
            )
        return
    if step.layer < family.first_llm_layer:
        raise LayerError(
            f"{slug} acts before decoder layer {step.layer}, but {family.model_type} adds encoder "
            f"features to the visual tokens after its first {family.first_llm_layer} layers "
            f"(DeepStack); the first layer before which tokens may be removed is "
            f"{family.first_llm_layer}"
        )
    if step.layer > family.last_llm_layer:
        raise LayerError(
            f"{slug} acts before decoder layer {step.layer}, but layers from "
            f"{family.last_llm_layer + 1} on of this {family.model_type} read the keys and values "
            "of earlier layers and compute only the last token of a prompt, so that nothing would "
            f"be saved; the last layer before which removing tokens saves anything is "
            f"{family.last_llm_layer}"
        )


def _work(family: Family, methods: Sequence[Method]) -> dict[int, PartialCompute]:
    """What decoder layers compute of visual tokens.

    Raises:
        UnsupportedModelError: the layers cannot be computed in parts.
        LayerError: two methods want different things of a layer.
    """
    found: dict[int, PartialCompute] = {}
    for method in methods:
        for work in method.partial_compute(family):
            if why := why_unsupported(family, work):
                raise UnsupportedModelError(
                    f"{method.slug!r} computes decoder layers of this {family.model_type} in "
                    f"parts, but {why}"
                )
            if work.layer in found:
                raise LayerError(
                    f"{method.slug} and another method both say what layer {work.layer} computes "
                    "of visual tokens; use one of them"
                )
            found[work.layer] = work
    return found


def _suspending(steps: Sequence[Step]) -> list[bool]:
    """Whether what each step of a method takes out comes back at the next."""
    return ["reinsert" in step.effects for step in (*steps[1:], Step("llm"))][: len(steps)]


def why_not(family: Family, name: str) -> str | None:
    """Why a method with default settings does not work on a model, or `None` if it does."""
    try:
        plain_plan(family, [get_method(name)()])
    except FoveateError as error:
        return str(error)
    return None


def working_methods(family: Family, *, encoder: bool = True, vision: bool = True) -> list[str]:
    """Registered methods that work on a model with default settings.

    Args:
        family: the model.
        encoder: whether signals of the encoder may be read after it.
        vision: whether methods may act inside the encoder, if they can.
    """

    def wanted(method: type[Method]) -> bool:
        if method.stage == "vision":
            return vision
        return encoder or all(SIGNALS[need].source != "encoder" for need in method.needs)

    names = (name for name in list_methods() if wanted(get_method(name)))
    return [name for name in names if why_not(family, name) is None]


def offering(error: UnsupportedModelError, methods: Sequence[str]) -> UnsupportedModelError:
    """A refusal that says what works instead, as `working_methods` has it."""
    if not methods:
        return UnsupportedModelError(f"{error}. No method works here with its default settings.")
    return UnsupportedModelError(f"{error}. Methods that work here: {', '.join(methods)}.")
