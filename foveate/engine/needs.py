"""Whether a model can give the signals that a step reads, where it reads them."""

from __future__ import annotations

from foveate.core import Need
from foveate.core.schedule import why_not_ranked
from foveate.engine.plan import PlannedStep
from foveate.engine.vision.checks import check_input_signal
from foveate.errors import FoveateError, LayerError, UnsupportedModelError
from foveate.families import Encoder, Family
from foveate.families.decoder_layer import has_mlp
from foveate.signals import SIGNALS, DecoderSignal, EncoderSignal, InputSignal, Signal
from foveate.signals.signal import free


def check_needs(family: Family, planned: PlannedStep) -> None:
    """Refuse a step whose signals the model cannot give, or not there.

    Raises:
        FoveateError: there is no such signal.
        LayerError: the step comes too early or too late for it, or a layer lies outside the model.
        UnsupportedModelError: the model cannot give it.
    """
    for need in planned.step.needs:
        if need.name not in SIGNALS:
            raise FoveateError(
                f"{planned.method.slug} needs an unknown signal {need.name!r}; known: "
                f"{', '.join(SIGNALS)}"
            )
        signal = SIGNALS[need.name]
        stages = {
            "input": ("vision",),
            "encoder": ("vision", "pre_llm"),
            "prompt": ("pre_llm",),
            "decoder": ("llm",),
        }
        legal = ("pre_llm",) if signal.clip else stages[signal.source]
        if planned.step.stage not in legal:
            raise LayerError(
                f"{planned.method.slug} needs {need.name} at {planned.step.site}, but only "
                f"{' and '.join(legal)} steps can have it"
            )
        if signal.layered and not need.layers:
            raise LayerError(f"{planned.method.slug} needs {need.name}, but names no layer")
        if isinstance(signal, EncoderSignal):
            _check_encoder_signal(family, planned, need, signal)
        elif isinstance(signal, InputSignal):
            check_input_signal(family, planned, need)
        elif isinstance(signal, DecoderSignal):
            _check_decoder_signal(family, planned, need, signal)


def _check_encoder_signal(
    family: Family, planned: PlannedStep, need: Need, signal: EncoderSignal
) -> None:
    slug, step = planned.method.slug, planned.step
    encoder = family.encoder
    if signal.class_token and (encoder is None or not encoder.class_token):
        raise UnsupportedModelError(
            f"{slug!r} needs class-token attention, but the encoder of this {family.model_type} "
            "has no class token that methods can read"
        )
    if encoder is None or (encoder.packed is not None and not signal.varlen):
        why = family.unread if encoder is None else ""
        raise UnsupportedModelError(
            f"{slug!r} needs {need.name}, which the encoder of this {family.model_type} cannot give"
            + (f": {why}" if why else "")
        )
    if signal.shares or signal.flops is not free:
        _check_scores(family, encoder, planned, need)
    if step.stage == "vision":
        _check_inside_encoder(family, encoder, planned, need, signal)
    if any(not 0 <= i < family.vision_layers for i in need.layers):
        raise LayerError(
            f"{slug} needs encoder layers {need.layers}, but this encoder has layers 0 to "
            f"{family.vision_layers - 1}"
        )


def _check_scores(family: Family, encoder: Encoder, planned: PlannedStep, need: Need) -> None:
    """Refuse signals of what queries and keys make, where they are not all that makes it."""
    slug, step = planned.method.slug, planned.step
    if encoder.relative and not (step.inside and need.layers == (step.layer,)):
        raise UnsupportedModelError(
            f"{slug!r} needs {need.name}, but the encoder of this {family.model_type} adds a bias "
            "by relative position to its scores, which only steps inside a layer see, of that layer"
        )
    if encoder.places:
        raise UnsupportedModelError(
            f"{slug!r} needs {need.name}, but the encoder of this {family.model_type} turns "
            "queries and keys by position within its attention, where they cannot be read"
        )


def _check_inside_encoder(
    family: Family, encoder: Encoder, planned: PlannedStep, need: Need, signal: EncoderSignal
) -> None:
    """Refuse signals that a step inside the encoder comes too early or too late for."""
    slug, step = planned.method.slug, planned.step
    earlier = not step.inside and all(i < step.layer for i in need.layers)
    own = need.layers == (step.layer,) and signal.inside is not None
    if earlier and not own and encoder.packed is not None:
        raise UnsupportedModelError(
            f"{slug!r} needs {need.name} of earlier layers inside the encoder, which is not "
            f"supported where images lie in one sequence or are padded, as in this "
            f"{family.model_type}"
        )
    if not (own or earlier):
        inside = ", ".join(name for name, of in SIGNALS.items() if _is_inside(of))
        raise LayerError(
            f"{slug} acts at {step.site} and can have signals of that layer only ({inside}), or "
            f"before it of earlier ones, but needs {need.name} of layers {need.layers}"
        )
    if signal.inside is not None and not signal.ahead and not step.inside:
        raise LayerError(
            f"{slug} needs {need.name}, which only a step inside an encoder layer has; it acts at "
            f"{step.site}"
        )


def _is_inside(signal: Signal) -> bool:
    """Whether a step inside an encoder layer can have a signal of that layer."""
    return isinstance(signal, EncoderSignal) and signal.inside is not None


def _check_decoder_signal(
    family: Family, planned: PlannedStep, need: Need, signal: DecoderSignal
) -> None:
    slug, step = planned.method.slug, planned.step
    # What a layer does to a token is known after it; all else, before it.
    last = step.layer - signal.after_layer
    outside = [i for i in need.layers if not 0 <= i <= last]
    if outside:
        raise LayerError(
            f"{slug} acts at {step.site} and needs {need.name} of layer {outside[0]}, but there "
            f"it is known of layers 0 to {last}"
        )
    if signal.of_module is not None and not all(has_mlp(family.layers[i]) for i in need.layers):
        raise UnsupportedModelError(
            f"{slug!r} compares what attention and MLP make of a token in one decoder layer, but "
            f"layers of this {family.model_type} are one or the other"
        )
    if not signal.keyed:
        return
    legal = family.attention_layers if signal.full_attention else family.keyed_layers
    unable = [i for i in need.layers if i not in legal]
    if unable:
        can = "no layer of this model can give it"
        if legal:
            nearest = min(legal, key=lambda layer: abs(layer - unable[0]))
            can = (
                f"the nearest layer that can give it is {nearest}, of {', '.join(map(str, legal))}"
            )
        raise LayerError(
            f"{slug} needs {need.name} of layer {unable[0]}, which "
            f"{why_not_ranked(family, unable[0])}; {can}"
        )
