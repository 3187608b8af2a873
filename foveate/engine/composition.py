"""Composition: which steps of a session go together, and which are refused when it is planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from foveate.core import STAGES, Adaptive, Method, PerRequest, Step
from foveate.core.video import VideoMethod
from foveate.engine.plan import PlannedStep
from foveate.errors import BudgetError, LayerError
from foveate.families import Family
from foveate.families.family import AUDIO
from foveate.signals import SIGNALS, EncoderSignal


def check_together(family: Family, methods: Sequence[Method], steps: Sequence[PlannedStep]) -> None:
    """Refuse steps that cannot be served in one session.

    Args:
        family: the model.
        methods: the methods, in stream order.
        steps: all their steps, method by method.

    Raises:
        LayerError: some steps exclude others.
    """
    _check_signals(steps)
    _check_grids(family, steps)
    _check_projector(family, steps)
    _check_transitions(family, methods, steps)
    _check_parking(family, steps)
    _check_exits(steps)
    _check_ragged(family, steps)
    _check_thresholds(steps)
    _check_attending(steps)
    _check_looks(steps)
    _check_around(steps)


def check_order(steps: Sequence[PlannedStep], first: PlannedStep) -> None:
    """Refuse a method that begins before the one that precedes it in the list does.

    Raises:
        LayerError: it does.
    """
    previous = next(s for s in reversed(steps) if s.number == 0)
    if _order(first.step) < _order(previous.step):
        raise LayerError(
            f"{first.method.slug} begins at {first.step.site}, before {previous.method.slug} at "
            f"{previous.step.site}; list methods in stream order"
        )


def _order(step: Step) -> tuple[int, int]:
    return STAGES.index(step.stage), step.layer


def _check_grids(family: Family, steps: Sequence[PlannedStep]) -> None:
    """Refuse to read whole grids of what an earlier method has removed tokens of."""
    pairs = [*_before_others(family, steps), *_before_in_encoder(steps)]
    for first, second in pairs:
        if second.step.whole and _removes(first) and _acts(second):
            raise LayerError(
                f"{second.method.slug} reads whole grids of visual tokens, but "
                f"{first.method.slug} removes tokens at {first.step.site} before it; use one of "
                "them alone"
            )


def _check_projector(family: Family, steps: Sequence[PlannedStep]) -> None:
    """Refuse to merge what the projector is given after others have merged what it makes."""
    for first, second in _before_others(family, steps):
        if not (first.step.merges and second.step.before_projector and _removes(first)):
            continue
        shared = _modalities(family, first) & _modalities(family, second)
        if any(family.projector(modality) is not None for modality in shared):
            first_whole = first.step.whole  # which could not come second either
            do = "use one of them alone" if first_whole else f"put {second.method.slug} first"
            raise LayerError(
                f"{second.method.slug} merges what the projector is given, but "
                f"{first.method.slug} before it merges tokens after the projector; {do}"
            )


def _before_others(
    family: Family, steps: Sequence[PlannedStep]
) -> Iterator[tuple[PlannedStep, PlannedStep]]:
    """Pairs of a step and a later one of another method, before the language model, that both see
    the same images or videos.
    """
    early = sorted((s for s in steps if s.step.stage != "llm"), key=lambda s: _order(s.step))
    for number, second in enumerate(early):
        for first in early[:number]:
            shared = _modalities(family, first) & _modalities(family, second)
            if shared and first.method_number != second.method_number:
                yield first, second


def _before_in_encoder(
    steps: Sequence[PlannedStep],
) -> Iterator[tuple[PlannedStep, PlannedStep]]:
    """Pairs of a step inside the encoder, and a later one that computes a layer of it."""
    inside = [s for s in steps if s.step.stage == "vision"]
    for second in (s for s in inside if {"attend", "around"} & set(s.step.effects)):
        for first in inside:
            if (first.step.layer, first.step.inside) < (second.step.layer, True):
                yield first, second


def _modalities(family: Family, planned: PlannedStep) -> set[str]:
    """What a step acts on, of what the model takes."""
    known = set(family.placeholder_ids) or {"image"}  # of an encoder alone
    known = {modality for modality in known if planned.sees(modality == AUDIO)}
    return known & {"video"} if isinstance(planned.method, VideoMethod) else known


def _removes(planned: PlannedStep) -> bool:
    """Whether a step removes tokens of images of some size."""
    method = planned.method
    if isinstance(method, Adaptive):
        return not (isinstance(method.keep, float) and method.keep == 1.0)
    if isinstance(method.keep, PerRequest):
        return True
    try:
        sizes = (2**power for power in range(16))
        return any(planned.count(n, n) < n for n in sizes)
    except BudgetError:  # too few tokens for it
        return True


def _acts(planned: PlannedStep) -> bool:
    """Whether a step does anything to images of some size."""
    return not planned.method.removes or _removes(planned)


def _check_transitions(
    family: Family, methods: Sequence[Method], steps: Sequence[PlannedStep]
) -> None:
    """Refuse to ask how much a layer changes tokens that it computes in parts."""
    partial = {
        work.layer: method.slug for method in methods for work in method.partial_compute(family)
    }
    for planned in steps:
        for need in planned.step.needs:
            layers = [layer for layer in need.layers if layer in partial]
            if SIGNALS[need.name].after_layer and layers:
                raise LayerError(
                    f"{planned.method.slug} asks how much decoder layer {layers[0]} changes "
                    f"tokens, but {partial[layers[0]]} has that layer computed in parts; give "
                    "them other layers, or use one of them alone"
                )


def _check_parking(family: Family, steps: Sequence[PlannedStep]) -> None:
    """Refuse other steps, and renumbering, while tokens are suspended."""
    llm = [s for s in steps if s.step.stage == "llm"]
    for planned in (s for s in llm if s.suspends):
        own = [s for s in llm if s.method_number == planned.method_number]
        back = next(s for s in own if s.number == planned.number + 1)
        span = range(planned.step.layer, back.step.layer + 1)
        others = (s for s in llm if s.method_number != planned.method_number)
        between = [s for s in others if s.step.layer in span]
        if between:
            raise LayerError(
                f"{between[0].method.slug} acts at {between[0].step.site}, where tokens that "
                f"{planned.method.slug} brings back at {back.step.site} are suspended; "
                f"{_outside(family, span)}"
            )
        if planned.renumber:
            raise LayerError(
                f"{planned.method.slug} brings tokens back, so positions cannot be renumbered; "
                "use positions='original'"
            )


def _outside(family: Family, span: range) -> str:
    """What to do about a step within a span of decoder layers."""
    ways = []
    if span.start > family.first_llm_layer:
        ways.append(f"before {span.start}")
    if span.stop < family.text_layers:
        ways.append(f"after {span[-1]}")
    return f"give it a layer {' or '.join(ways)}" if ways else "use one of them alone"


def _check_ragged(family: Family, steps: Sequence[PlannedStep]) -> None:
    """Refuse other steps in the encoder while images have different numbers of tokens."""
    vision = [(s, (s.step.layer, s.step.inside)) for s in steps if s.step.stage == "vision"]
    for planned in (s for s, _ in vision if "ragged" in s.step.effects):
        own = [(s, site) for s, site in vision if s.method_number == planned.method_number]
        (_, first), (end, last) = own[0], own[-1]
        assert family.encoder is not None  # as checked of the stage
        lasts = "ragged" in end.step.effects and family.encoder.packed is None
        between = [
            s
            for s, site in vision
            if s.method_number != planned.method_number
            and first <= site
            and (lasts or site <= last)
        ]
        if between:
            places = [f"before {first[0]}"] * (first[0] > 0) + [f"after {last[0]}"] * (not lasts)
            ways = [f"give it a layer {' or '.join(places)}"] if places else []
            if hasattr(planned.method, "as_released"):
                ways.append(f"give {planned.method.slug} as_released=True")
            raise LayerError(
                f"{between[0].method.slug} acts at {between[0].step.site}, where "
                f"{planned.method.slug} leaves images different numbers of tokens; "
                f"{', or '.join(ways) or 'use one of them alone'}"
            )


def _check_exits(steps: Sequence[PlannedStep]) -> None:
    """Refuse other steps in an encoder that tokens leave early."""
    vision = [s for s in steps if s.step.stage == "vision"]
    for planned in (s for s in vision if "exit" in s.step.effects):
        for other in vision:
            if other.method_number != planned.method_number:
                raise LayerError(
                    f"{other.method.slug} acts at {other.step.site} of an encoder that "
                    f"{planned.method.slug} lets tokens leave early and come back to; use one of "
                    "them alone"
                )


def _check_attending(steps: Sequence[PlannedStep]) -> None:
    """Refuse two steps that compute the same encoder layer."""
    first: dict[int, PlannedStep] = {}
    for planned in (s for s in steps if {"attend", "around"} & set(s.step.effects)):
        if (other := first.setdefault(planned.step.layer, planned)) is not planned:
            raise LayerError(
                f"{other.method.slug} and {planned.method.slug} both compute the attention of "
                f"encoder layer {planned.step.layer}; give them different layers"
            )


def _check_looks(steps: Sequence[PlannedStep]) -> None:
    """Refuse other steps between a look at a layer and what its method does next: what the look saw
    is of all tokens that are shown then.
    """
    vision = [s for s in steps if s.step.stage == "vision"]
    for look in (s for s in vision if "look" in s.step.effects):
        for other in (s for s in vision if s.method_number != look.method_number):
            if look.step.layer <= other.step.layer <= look.step.layer + 1:
                raise LayerError(
                    f"{look.method.slug} looks at encoder layer {look.step.layer} for what it "
                    f"drops before the next, and {other.method.slug} acts at {other.step.site}; "
                    "give it another layer"
                )


def _check_around(steps: Sequence[PlannedStep]) -> None:
    """Refuse to act within, or to read, a layer that only some tokens go through."""
    around = {s.step.layer: s for s in steps if "around" in s.step.effects}
    for planned in steps:
        step, slug = planned.step, planned.method.slug
        if step.stage == "vision":
            met = [around[step.layer]] if step.inside and step.layer in around else []
            does = f"acts within encoder layer {step.layer}"
        else:
            read = [
                (need.name, layer)
                for need in step.needs
                if isinstance(SIGNALS[need.name], EncoderSignal)
                for layer in need.layers
                if layer in around
            ]
            met = [around[layer] for _, layer in read]
            does = "".join(f"reads {name} of encoder layer {layer}" for name, layer in read[:1])
        if met:
            other = met[0].method.slug
            raise LayerError(
                f"{slug} {does}, which only some tokens go through with {other}; give {other} "
                "other layers"
            )


def _check_thresholds(steps: Sequence[PlannedStep]) -> None:
    """Refuse two steps that mean different things by global patches."""
    needs = [n for s in steps for n in s.step.needs if SIGNALS[n.name].global_threshold]
    if len({need.global_threshold for need in needs}) > 1:
        raise LayerError(
            f"methods of one session ask for {needs[0].name} above different thresholds: "
            f"{', '.join(str(need.global_threshold) for need in needs)}; give them the same"
        )


def _check_signals(steps: Sequence[PlannedStep]) -> None:
    """Refuse a step in the encoder whose signals an earlier step at the same site outdates."""
    first: dict[tuple[int, bool], PlannedStep] = {}
    for planned in (s for s in steps if s.step.stage == "vision"):
        site = planned.step.layer, planned.step.inside
        reads = planned.step.inside and "attend" in planned.step.effects
        if site in first and (planned.step.needs or reads):
            raise LayerError(
                f"{first[site].method.slug} and {planned.method.slug} act at the same site, "
                f"{planned.step.site}, so that signals for the second would be out of date; give "
                "them different layers"
            )
        first.setdefault(site, planned)
