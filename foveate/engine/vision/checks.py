"""Checks of steps inside an encoder, when they are planned."""

from __future__ import annotations

import inspect

from foveate.core import Need, PerRequest
from foveate.engine.plan import PlannedStep
from foveate.engine.vision.attending import takes_over
from foveate.errors import BudgetError, UnsupportedModelError
from foveate.families import Encoder, Family


def check_in_encoder(family: Family, planned: PlannedStep) -> None:
    """Refuse a step inside the encoder that this encoder cannot serve.

    Raises:
        BudgetError: images are to have budgets of their own.
        UnsupportedModelError: the kernel, the layers or the grid are such that it cannot be done.
    """
    method, encoder = planned.method, family.encoder
    assert encoder is not None  # as checked before
    if isinstance(method.keep, PerRequest):
        raise BudgetError(
            f"{method.slug} acts inside the encoder, where all images are reduced together; "
            "give one keep for all instead of per_request"
        )
    _check_whole(family, encoder, planned)
    _check_attend(family, encoder, planned)
    _check_exit(family, encoder, planned)
    kernel = encoder.tower.config._attn_implementation or "eager"
    ragged = "ragged" in planned.step.effects
    # Images in one sequence may differ in length, so before layer 0 they need no padding.
    first = (planned.step.layer, planned.step.inside) == (0, False)
    ragged = ragged and not (encoder.packed is not None and first)
    if ragged and kernel not in ("sdpa", "eager"):
        released = ", or give as_released=True" if hasattr(method, "as_released") else ""
        raise UnsupportedModelError(
            f"{method.slug} leaves images that are encoded together different numbers of tokens, "
            f"which needs a mask that {kernel!r} attention does not take; set the encoder's "
            f"attention to 'sdpa'{released}"
        )
    if "proportional" in planned.step.effects and kernel not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"proportional attention of {method.slug} adds a bias to the scores, which "
            f"{kernel!r} attention cannot; set the encoder's attention to 'sdpa', or turn "
            "proportional attention off"
        )


def check_input_signal(family: Family, planned: PlannedStep, need: Need) -> None:
    """Refuse a signal of the encoder's input where foveate cannot tell which part is a token's.

    Raises:
        UnsupportedModelError: the encoder has no such rule.
    """
    assert family.encoder is not None  # as checked before
    if family.encoder.pixels is None and family.encoder.cuts is None:
        raise UnsupportedModelError(
            f"{planned.method.slug!r} needs the {need.name} of each visual token, but foveate does "
            f"not know them for the encoder of this {family.model_type!r}"
        )


def _check_whole(family: Family, encoder: Encoder, planned: PlannedStep) -> None:
    if not (planned.step.whole and planned.method.removes):
        return
    if encoder.films or not family.planar:
        films = "encodes the frames of a video together"
        other = "may see other patches of each image, with padding or gaps"
        raise UnsupportedModelError(
            f"{planned.method.slug!r} reads the whole grid of one image inside the encoder, but "
            f"{family.model_type!r} {films if encoder.films else other}"
        )


def _check_attend(family: Family, encoder: Encoder, planned: PlannedStep) -> None:
    effects = set(planned.step.effects) & {"attend", "around"}
    if not effects:
        return
    method = planned.method
    does = f"{method.slug} computes {'the attention of ' * ('attend' in effects)}encoder layers"
    if encoder.packed is not None:
        raise UnsupportedModelError(
            f"{does} itself, which is not supported where images lie in one sequence or are "
            f"padded, as in {family.model_type!r}"
        )
    if planned.step.whole and not encoder.gridded:
        raise UnsupportedModelError(
            f"{does} by the grid of patches, which in {family.model_type!r} may differ from image "
            "to image, with padding or gaps"
        )
    layer = encoder.layers[planned.step.layer]
    told = inspect.signature(type(layer).forward).parameters
    if "around" in effects and (encoder.places or "position_embeddings" in told):
        raise UnsupportedModelError(
            f"{method.slug} lets some rows go through encoder layers, but those of this "
            f"{family.model_type!r} are told the position of every row"
        )
    if encoder.relative and (planned.step.whole or "around" in effects):
        raise UnsupportedModelError(
            f"{does} itself, and knows nothing of the bias by relative position that this "
            f"{family.model_type} adds to its scores"
        )
    if "attend" in effects and not takes_over(encoder.attention(layer)):
        raise UnsupportedModelError(
            f"{does} itself, but those of this {family.model_type!r} do not call the kernels of "
            "transformers"
        )


def _check_exit(family: Family, encoder: Encoder, planned: PlannedStep) -> None:
    if "exit" not in planned.step.effects:
        return
    slug = planned.method.slug
    if family.text_layers:
        raise UnsupportedModelError(
            f"{slug!r} lets tokens leave the encoder early and come back after its last layer, for "
            f"heads that read all of them; it works in encoders alone, and {family.model_type!r} "
            "has a language model"
        )
    if encoder.packed is not None:
        raise UnsupportedModelError(
            f"{slug!r} lets tokens leave the encoder early, which is not supported where images "
            f"lie in one sequence or are padded, as in {family.model_type!r}"
        )
