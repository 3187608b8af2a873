"""Plan: which step of which method acts where on a model, checked before anything is attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.budget import PerRequest
from foveate.errors import BudgetError, FoveateError, LayerError, UnsupportedModelError
from foveate.method import STAGES, Method, Step, get_method, list_methods
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
    """

    method: Method
    method_number: int
    number: int
    step: Step


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
            of_method = method.steps(family)
            method.check_budget(len(of_method))
            planned = [
                PlannedStep(method, method_number, i, step) for i, step in enumerate(of_method)
            ]
            for item in planned:
                _check_stage(family, item)
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
        steps = (*self.vision, *self.pre_llm)
        return all(s.method.positions == "renumbered" for s in steps)

    @property
    def per_request(self) -> tuple[PerRequest, ...]:
        """Budgets given for each row of the batch."""
        return tuple(m.keep for m in self.methods if isinstance(m.keep, PerRequest))


def _order(step: Step) -> tuple[int, int]:
    return STAGES.index(step.stage), step.layer


def _check_stage(family: Family, planned: PlannedStep) -> None:
    stage, method = planned.step.stage, planned.method
    if stage != "vision" and not family.text_layers:
        raise UnsupportedModelError(
            f"{method.slug!r} acts in or before a language model, but {family.model_type!r} is an "
            f"encoder alone. Methods that work here: {', '.join(working_methods(family))}."
        )
    if stage != "vision":
        return
    encoder = family.encoder
    if encoder.block is None or encoder.tower is None:
        raise UnsupportedModelError(
            f"{method.slug!r} acts inside the encoder, which is not supported on "
            f"{family.model_type!r}"
        )
    if isinstance(method.keep, PerRequest):
        raise BudgetError(
            f"{method.slug} acts inside the encoder, where all images are reduced together; "
            "give one keep for all instead of per_request"
        )
    kernel = encoder.tower.config._attn_implementation
    if planned.step.proportional and kernel not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"proportional attention of {method.slug} adds a bias to the scores, which "
            f"{kernel!r} attention cannot; set the encoder's attention to 'sdpa', or turn "
            "proportional attention off"
        )


def _check_layers(family: Family, planned: PlannedStep) -> None:
    step = planned.step
    if step.stage == "llm" and not 0 <= step.layer < family.text_layers:
        raise LayerError(
            f"{planned.method.slug} acts before decoder layer {step.layer}, but this "
            f"{family.model_type} has layers "
            f"0 to {family.text_layers - 1}"
        )
    if step.stage == "vision" and not 0 <= step.layer <= family.feature_layer:
        raise LayerError(
            f"{planned.method.slug} acts in encoder layer {step.layer}, but what reads the encoder "
            f"of this {family.model_type} sees layers 0 to {family.feature_layer}"
        )


def _check_needs(family: Family, planned: PlannedStep) -> None:
    for need in planned.step.needs:
        if need.name not in SIGNALS:
            raise FoveateError(
                f"{planned.method.slug} needs an unknown signal {need.name!r}; known: "
                f"{', '.join(SIGNALS)}"
            )
        own = planned.step.stage == "vision" and need.layers == (planned.step.layer,)
        if need.name == "keys" and not (own and planned.step.inside):
            raise LayerError(
                f"{planned.method.slug} needs keys, which a step inside an encoder layer has of "
                f"that layer; got layers {need.layers} for a step at {planned.step.place}"
            )
        if need.name != "cls_attention":
            continue
        if planned.step.stage == "vision" and not own:
            raise LayerError(
                f"{planned.method.slug} acts at {planned.step.place} and can have class-token "
                f"attention of that layer only, got layers {need.layers}"
            )
        if not family.encoder.class_token:
            raise UnsupportedModelError(
                f"{planned.method.slug!r} needs class-token attention, but the encoder of "
                f"{family.model_type!r} has "
                f"no class token. Methods that work here: {', '.join(working_methods(family))}."
            )
        outside = [i for i in need.layers if not 0 <= i < family.vision_layers]
        if outside or not need.layers:
            raise LayerError(
                f"{planned.method.slug} needs encoder layers {need.layers}, but this encoder has "
                "layers 0 to "
                f"{family.vision_layers - 1}"
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


def working_methods(family: Family) -> list[str]:
    """Registered methods that need no signal the model lacks."""
    return [
        name
        for name in list_methods()
        if (family.text_layers or get_method(name).stage == "vision")
        and (family.encoder.class_token or "cls_attention" not in get_method(name).needs)
    ]
