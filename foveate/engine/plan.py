"""Plan: which step of which method acts where on a model, checked before anything is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.budget import PerRequest
from foveate.errors import BudgetError, FoveateError, LayerError, UnsupportedModelError
from foveate.method import STAGES, Method, Need, Step, get_method, list_methods
from foveate.models import Family
from foveate.signals import SIGNALS


@dataclass(frozen=True)
class PlannedStep:
    """One step of one method.

    Args:
        method: the method.
        method_number: which of the session's methods it is.
        number: which of the method's steps it is.
        step: where it acts and what it needs.
        renumber: whether survivors get consecutive positions.
    """

    method: Method
    method_number: int
    number: int
    step: Step
    renumber: bool


@dataclass(frozen=True)
class Plan:
    """All steps of a session in stream order.

    Args:
        methods: the methods, in stream order.
        vision: steps inside the encoder, by layer.
        pre_llm: steps on image features.
        llm: steps between decoder layers, by layer.
    """

    methods: tuple[Method, ...]
    vision: tuple[PlannedStep, ...]
    pre_llm: tuple[PlannedStep, ...]
    llm: tuple[PlannedStep, ...]

    @classmethod
    def of(cls, family: Family, methods: Sequence[Method]) -> Plan:
        """Plan methods on a model.

        Raises:
            LayerError: a layer lies outside the model, or the methods are not in stream order.
            UnsupportedModelError: the model cannot serve what a method needs; the message lists
            methods that work.
            BudgetError: a schedule does not have one entry for each step.
        """
        steps: list[PlannedStep] = []
        for method_number, method in enumerate(methods):
            # Before its steps: where a stage is missing, a method may find nothing to do there.
            _check_stage(family, method, method.stage)
            of_method = method.steps(family)
            method.check_budget(len(of_method))
            renumber = method.positions_on(family) == "renumbered"
            planned = [
                PlannedStep(method, method_number, i, step, renumber)
                for i, step in enumerate(of_method)
            ]
            for item in planned:
                _check_stage(family, method, item.step.stage)
                _check_encoder(family, item)
                _check_layers(family, item)
                _check_needs(family, item)
            if steps and planned:
                previous = next(s for s in reversed(steps) if s.number == 0)
                if _order(planned[0].step) < _order(previous.step):
                    raise LayerError(
                        f"{method.slug} begins at {planned[0].step.place}, before "
                        f"{previous.method.slug} at "
                        f"{previous.step.place}; list methods in stream order"
                    )
            steps += planned
        _check_signals(steps)

        def at(stage: str) -> tuple[PlannedStep, ...]:
            chosen = (s for s in steps if s.step.stage == stage)
            return tuple(sorted(chosen, key=lambda s: (s.step.layer, s.step.inside)))

        return cls(tuple(methods), at("vision"), at("pre_llm"), at("llm"))

    @property
    def marks(self) -> bool:
        """Whether image features may come with removed rows marked."""
        return bool(self.vision or self.pre_llm)

    @property
    def class_attention_layers(self) -> tuple[int, ...]:
        """Encoder layers whose class-token attention some step needs."""
        return tuple(
            sorted(
                {
                    i
                    for s in self.pre_llm
                    for n in s.step.needs
                    if n.name == "cls_attention"
                    for i in n.layers
                }
            )
        )

    @property
    def text_attention_layers(self) -> frozenset[int]:
        """Decoder layers whose text attention some step needs."""
        return frozenset(
            i
            for s in self.llm
            for n in s.step.needs
            if n.name == "text_attention"
            for i in n.layers
        )

    @property
    def first_layer(self) -> int:
        """First decoder layer that the session touches."""
        if self.marks:
            return 0
        return min({s.step.layer for s in self.llm} | self.text_attention_layers, default=0)

    @property
    def renumber_features(self) -> bool:
        """Whether survivors of the steps before the language model get consecutive positions: if
        all methods there want it.
        """
        return all(s.renumber for s in (*self.vision, *self.pre_llm))

    @property
    def per_request(self) -> tuple[PerRequest, ...]:
        """Budgets given for each row of the batch."""
        return tuple(m.keep for m in self.methods if isinstance(m.keep, PerRequest))


def _order(step: Step) -> tuple[int, int]:
    return STAGES.index(step.stage), step.layer


def _check_stage(family: Family, method: Method, stage: str) -> None:
    if stage != "vision" and not family.text_layers:
        raise UnsupportedModelError(
            f"{method.slug!r} acts in or before a language model, but {family.model_type!r} is an "
            f"encoder alone. Methods that work here: {', '.join(working_methods(family))}."
        )
    if stage == "vision":
        check_mixing(family, [method], "image", {})
        if family.encoder is None or family.encoder.block is None:
            raise UnsupportedModelError(
                f"{method.slug!r} acts inside the encoder, which is not supported on this "
                f"{family.model_type!r}. Methods that work here: "
                f"{', '.join(working_methods(family))}."
            )


def check_mixing(
    family: Family, methods: Sequence[Method], modality: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse to act inside the encoder where patches do not belong to one visual token each.

    Raises:
        UnsupportedModelError: so it is for this modality, or for what is to be encoded.
    """
    if methods and (why := family.mixing(modality, arguments)):
        names = ", ".join(dict.fromkeys(method.slug for method in methods))
        raise UnsupportedModelError(
            f"{names!r} acts inside the encoder, which is not supported for the {modality}s of "
            f"this {family.model_type!r}: {why}. Methods that work here: "
            f"{', '.join(working_methods(family, vision=False))}."
        )


def _check_encoder(family: Family, planned: PlannedStep) -> None:
    method = planned.method
    if planned.step.stage != "vision":
        return
    if isinstance(method.keep, PerRequest):
        raise BudgetError(
            f"{method.slug} acts inside the encoder, where all images are reduced together; "
            "give one keep for all instead of per_request"
        )
    assert family.encoder is not None  # as checked before
    kernel = family.encoder.tower.config._attn_implementation or "eager"
    if planned.step.proportional and kernel not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"proportional attention of {method.slug} adds a bias to the scores, which "
            f"{kernel!r} attention cannot; set the encoder's attention to 'sdpa', or turn "
            "proportional attention off"
        )


def _check_layers(family: Family, planned: PlannedStep) -> None:
    step, slug = planned.step, planned.method.slug
    if step.stage == "vision" and not 0 <= step.layer <= family.feature_layer:
        raise LayerError(
            f"{slug} acts in encoder layer {step.layer}, but what reads the encoder of this "
            f"{family.model_type} sees layers 0 to {family.feature_layer}"
        )
    if step.stage != "llm":
        return
    if not 0 <= step.layer < family.text_layers:
        raise LayerError(
            f"{slug} acts before decoder layer {step.layer}, but this {family.model_type} has "
            f"layers 0 to {family.text_layers - 1}"
        )
    if step.layer < family.first_llm_layer:
        raise LayerError(
            f"{slug} acts before decoder layer {step.layer}, but {family.model_type} adds encoder "
            f"features to the visual tokens after its first {family.first_llm_layer} layers "
            f"(DeepStack); the first layer before which tokens may be removed is "
            f"{family.first_llm_layer}"
        )


def _check_needs(family: Family, planned: PlannedStep) -> None:
    for need in planned.step.needs:
        own = planned.step.stage == "vision" and need.layers == (planned.step.layer,)
        if planned.step.stage == "vision" and not own:
            raise LayerError(
                f"{planned.method.slug} acts at {planned.step.place} and can have signals of that "
                f"layer only, but needs {need.name} of layers {need.layers}"
            )
        if need.name == "keys":
            if not (own and planned.step.inside):
                raise LayerError(
                    f"{planned.method.slug} needs keys, which only a step inside an encoder layer "
                    f"has; it acts at {planned.step.place}"
                )
        elif need.name == "cls_attention":
            _check_class_attention(family, planned, need)
        elif need.name == "text_attention":
            windowed = [i for i in need.layers if i not in family.attention_layers]
            if windowed:
                legal = ", ".join(map(str, family.attention_layers))
                raise LayerError(
                    f"{planned.method.slug} ranks tokens by the attention of layer {windowed[0]}, "
                    f"which sees only a window of the sequence; layers that see all of it are "
                    f"{legal}"
                )
        else:
            raise FoveateError(
                f"{planned.method.slug} needs an unknown signal {need.name!r}; known: "
                f"{', '.join(SIGNALS)}"
            )


def _check_class_attention(family: Family, planned: PlannedStep, need: Need) -> None:
    if family.encoder is None or not family.encoder.class_token:
        raise UnsupportedModelError(
            f"{planned.method.slug!r} needs class-token attention, but the encoder of this "
            f"{family.model_type} has no class token that methods can read. Methods that work "
            f"here: {', '.join(working_methods(family))}."
        )
    outside = [i for i in need.layers if not 0 <= i < family.vision_layers]
    if outside or not need.layers:
        raise LayerError(
            f"{planned.method.slug} needs encoder layers {need.layers}, but this encoder has "
            f"layers 0 to {family.vision_layers - 1}"
        )


def _check_signals(steps: Sequence[PlannedStep]) -> None:
    """Refuse a step in the encoder whose signals an earlier step at the same place outdates."""
    first: dict[tuple[int, bool], PlannedStep] = {}
    for planned in (s for s in steps if s.step.stage == "vision"):
        place = planned.step.layer, planned.step.inside
        if place in first and planned.step.needs:
            raise LayerError(
                f"{first[place].method.slug} and {planned.method.slug} act at the same place, "
                f"{planned.step.place}, so that signals for the second would be out of date; give "
                "them different layers"
            )
        first.setdefault(place, planned)


def why_not(family: Family, name: str) -> str | None:
    """Why a method with default settings does not work on a model, or `None` if it does."""
    try:
        Plan.of(family, [get_method(name)()])
    except FoveateError as error:
        return str(error)
    return None


def working_methods(family: Family, *, class_token: bool = True, vision: bool = True) -> list[str]:
    """Registered methods that need no stage and no signal the model lacks.

    Args:
        family: the model.
        class_token: whether the encoder's class token, if there is one, may be read.
        vision: whether methods may act inside the encoder, if they can.
    """
    encoder = family.encoder
    reads_class_token = class_token and encoder is not None and encoder.class_token
    stages = set(STAGES if family.text_layers else STAGES[:1])
    if encoder is None or encoder.block is None or not vision:
        stages.discard("vision")
    return [
        name
        for name in list_methods()
        if get_method(name).stage in stages
        and (reads_class_token or "cls_attention" not in get_method(name).needs)
    ]
