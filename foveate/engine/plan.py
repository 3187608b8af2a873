"""Plan: which step of which method acts where on a model, checked before anything is attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.budget import PerRequest, check_keep
from foveate.errors import FoveateError, LayerError, UnsupportedModelError
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
        pre_llm: steps on image features.
        llm: steps between decoder layers, by layer.
    """

    methods: tuple[Method, ...]
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
            check_keep(method.keep, len(of_method))
            renumber = method.positions_on(family) == "renumbered"
            planned = [
                PlannedStep(method, method_number, i, step, renumber)
                for i, step in enumerate(of_method)
            ]
            for item in planned:
                _check_layers(family, item)
                _check_needs(family, item)
            if method_number and planned:
                previous = next(s for s in reversed(steps) if s.number == 0)
                if _order(planned[0].step) < _order(previous.step):
                    raise LayerError(
                        f"{method.slug} begins at {planned[0].step.place}, before "
                        f"{previous.method.slug} at "
                        f"{previous.step.place}; list methods in stream order"
                    )
            steps += planned
        llm = sorted((s for s in steps if s.step.stage == "llm"), key=lambda s: s.step.layer)
        return cls(tuple(methods), tuple(s for s in steps if s.step.stage == "pre_llm"), tuple(llm))

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
        if self.pre_llm:
            return 0
        return min({s.step.layer for s in self.llm} | self.text_attention_layers, default=0)

    @property
    def renumber_features(self) -> bool:
        """Whether survivors of the pre_llm steps get consecutive positions: if all methods
        there want it.
        """
        return all(s.renumber for s in self.pre_llm)

    @property
    def per_request(self) -> tuple[PerRequest, ...]:
        """Budgets given for each row of the batch."""
        return tuple(m.keep for m in self.methods if isinstance(m.keep, PerRequest))


def _order(step: Step) -> tuple[int, int]:
    return STAGES.index(step.stage), step.layer


def _check_layers(family: Family, planned: PlannedStep) -> None:
    step, slug = planned.step, planned.method.slug
    if step.stage == "vision":
        raise UnsupportedModelError(
            f"steps inside the encoder are not supported on {family.model_type!r}"
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
        if need.name == "cls_attention":
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


def why_not(family: Family, name: str) -> str | None:
    """Why a method with default settings does not work on a model, or `None` if it does."""
    try:
        Plan.of(family, [get_method(name)()])
    except FoveateError as error:
        return str(error)
    return None


def working_methods(family: Family, *, class_token: bool = True) -> list[str]:
    """Registered methods that need no signal the model lacks.

    Args:
        family: the model.
        class_token: whether the encoder's class token, if there is one, may be read.
    """
    encoder = family.encoder
    reads_class_token = class_token and encoder is not None and encoder.class_token
    return [
        name
        for name in list_methods()
        if reads_class_token or "cls_attention" not in get_method(name).needs
    ]
