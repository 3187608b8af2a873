"""Signals of the vision encoder, from the projections that it computes anyway.

One query row costs O(N C) per layer where an attention map costs O(N^2 C). Where all queries are
needed, their rows are summed up in chunks and never held together. Shapes as in `signal`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from foveate.signals import flow
from foveate.signals.cls_attention import class_row
from foveate.signals.projections import Projections
from foveate.signals.signal import (
    EncoderInput,
    EncoderSignal,
    EncoderSizes,
    InputSignal,
    define,
)

if TYPE_CHECKING:
    from foveate.signals.clip import ClipQuestions


def _query_row(sizes: EncoderSizes) -> int:
    """Scores of one query."""
    return 2 * sizes.width * sizes.rows


def _map(sizes: EncoderSizes) -> int:
    """Scores of all queries."""
    return 2 * sizes.width * sizes.pairs


def _one_per_token(values: Tensor, heads: int) -> Tensor:
    return values[:, :, 0]


def _by_head(values: Tensor, heads: int) -> Tensor:
    return values.unflatten(2, (heads, -1)).transpose(-1, -2)


def _channels_last(values: Tensor, heads: int) -> Tensor:
    return values.transpose(-1, -2)


@define(InputSignal, "of_images")
def pixels(encoder: EncoderInput, images: Any) -> Tensor:
    """(G, V, P): pixels of each visual token, as the encoder receives them."""
    return encoder.pixels_of(images)


_CLASS: dict[str, Any] = {"class_token": True, "varlen": False}
_RANKING: dict[str, Any] = {"shape": _one_per_token, "newline": float("-inf")}


@define(
    EncoderSignal,
    "of_projections",
    **_CLASS,
    newline=float("-inf"),
    inside=lambda layer, images: layer.class_attention(images),
    ahead=True,
    flops=_query_row,
)
def cls_attention(layer: Projections) -> Tensor:
    """(G, L, H, V): attention of the encoder's class token to the patches."""
    return class_row(layer.query, layer.key, layer.heads, layer.special, layer.bias)


@define(EncoderSignal, "of_projections", **_RANKING, **_CLASS, flops=_query_row)
def joint_cls_attention(layer: Projections) -> Tensor:
    """(G, L, V): attention of the class token with the heads taken as one."""
    return class_row(layer.query, layer.key, 1, layer.special, layer.bias)


@define(EncoderSignal, "of_projections", **_RANKING, summed=True, shares=(_map,))
def received_attention(layer: Projections) -> Tensor:
    """(G, L, V): attention that a patch receives, mean over heads and all queries."""
    return layer.received


@define(
    EncoderSignal,
    "of_projections",
    **_RANKING,
    global_threshold=True,
    flops=lambda sizes: 2 * _map(sizes) + 2 * sizes.pairs,
)
def global_attention(layer: Projections) -> Tensor:
    """(G, L, V): attention that a patch receives from global patches, which receive more than
    `Need.global_threshold` times the mean themselves; where there are none, from all. Frames and
    windows that do not see each other have global patches each.
    """
    return layer.from_global


@define(EncoderSignal, "of_projections", **_RANKING, shares=(_map,))
def given_attention(layer: Projections) -> Tensor:
    """(G, L, V): share of its attention that a patch gives to patches, mean over heads."""
    return layer.given


@define(
    EncoderSignal,
    "of_projections",
    **_CLASS,
    values=True,
    shape=_one_per_token,
    flops=lambda sizes: 2 * _query_row(sizes),
)
def information_flow(layer: Projections) -> Tensor:
    """(G, L, V): how much a patch tells the class token, by attention and values (FlowCut)."""
    assert layer.value is not None  # as it asks for
    row = class_row(layer.query, layer.key, layer.heads, layer.special, layer.bias)
    return flow.information_flow(row, layer.value, layer.special, layer.bias)[:, None]


@define(
    EncoderSignal, "of_projections", shape=_by_head, inside=lambda layer, images: layer.keys(images)
)
def encoder_keys(layer: Projections) -> Tensor:
    """(G, L, H, V, d): keys of the patches, without rotary positions."""
    return layer.patch_keys


@define(EncoderSignal, "of_states", shape=_channels_last)
def encoder_features(states: Tensor, clip: ClipQuestions | None) -> Tensor:
    """(G, L, V, C): output states of encoder layers."""
    return states


@define(EncoderSignal, "of_states", varlen=False, shape=_channels_last, clip=True)
def clip_patches(states: Tensor, clip: ClipQuestions | None) -> Tensor:
    """(G, L, V, E): output states of encoder layers in CLIP's space, under CLIP's last norm."""
    assert clip is not None  # the session has checked it
    return clip.patches(states, normed=True)


@define(EncoderSignal, "of_states", varlen=False, shape=_channels_last, clip=True)
def clip_plain_patches(states: Tensor, clip: ClipQuestions | None) -> Tensor:
    """(G, L, V, E): output states of encoder layers in CLIP's space, without its last norm."""
    assert clip is not None  # the session has checked it
    return clip.patches(states, normed=False)
