"""Signals of decoder layers: what steps between them can ask for.

Shapes as in `signal`; `Hkv` key heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.signals.signal import (
    DecoderSignal,
    DecoderSizes,
    ImageTokens,
    LayerInput,
    define,
)

# -- costs


def _keys(sizes: DecoderSizes) -> int:
    """The keys of all tokens."""
    return 2 * sizes.tokens * sizes.keys


def _values(sizes: DecoderSizes) -> int:
    """The values of all tokens."""
    return 2 * sizes.tokens * sizes.values


def _both(sizes: DecoderSizes) -> int:
    """What makes keys and values of all tokens together."""
    return 2 * sizes.tokens * sizes.both


def _query(sizes: DecoderSizes) -> int:
    """A query, and its scores of all keys."""
    return 2 * sizes.query + 2 * sizes.queries * sizes.tokens


# -- aggregation


def _query_mean(values: Tensor, images: ImageTokens) -> Tensor:
    return images.query_mean(values)


def _query_mean_of_shares(values: Tensor, images: ImageTokens) -> Tensor:
    """Softmax over the image's tokens alone, then the mean over query tokens."""
    return images.query_mean(values.softmax(-1).nan_to_num())


def _without_padding(values: Tensor, images: ImageTokens) -> Tensor:
    """Zeros in rows (G, ..., Q, n) of text that is padding."""
    mask = images.text_mask.to(values.device)
    mask = mask[:, None] if values.dim() == 4 else mask
    return values.masked_fill(~mask[..., None], 0.0)


# -- facts that several have in common

_QUERY: dict[str, Any] = {"column_axis": 3, "query": True, "depends_on_prompt": True}
_TEXT: dict[str, Any] = {"text": True, "depends_on_prompt": True}
_ALONE: dict[str, Any] = {"finish": _query_mean_of_shares, "hidden_value": -torch.inf}

# -- signals


@define(
    DecoderSignal,
    "before_layer",
    **_QUERY,
    finish=_query_mean,
    full_attention=True,
    keyed=True,
    flops=_query,
    shares=(_keys, _both),
)
def text_attention(layer: LayerInput) -> Tensor:
    """(G, L, H, V): attention of the last prompt token to the visual tokens."""
    return layer.query_attention()


@define(
    DecoderSignal,
    "before_layer",
    **_QUERY,
    **_ALONE,
    full_attention=True,
    keyed=True,
    flops=_query,
    shares=(_keys, _both),
)
def content_attention(layer: LayerInput) -> Tensor:
    """(G, L, H, V): the same without rotary positions, over the image's tokens alone."""
    return layer.view.content_logits(layer.query_columns)


@define(
    DecoderSignal,
    "before_layer",
    **_TEXT,
    column_axis=3,
    finish=_without_padding,
    full_attention=True,
    keyed=True,
    flops=lambda sizes: sizes.text * _query(sizes),
    shares=(_keys, _both),
)
def question_attention(layer: LayerInput) -> Tensor:
    """(G, L, H, Q, V), and (G, Q) `question_mask`: attention of the text after the image to
    the visual tokens.
    """
    return layer.text_attention()


@define(
    DecoderSignal,
    "before_layer",
    **_TEXT,
    column_axis=2,
    keyed=True,
    flops=lambda sizes: 2 * sizes.text * sizes.tokens * sizes.head,
)
def question_closeness(layer: LayerInput) -> Tensor:
    """(G, L, Q, V), and (G, Q) `question_mask`: how close the rotary positions of the text
    after the image are to those of the visual tokens, at most 1.
    """
    return layer.view.closeness(layer.text_columns)


@define(DecoderSignal, "before_layer", column_axis=1)
def llm_states(layer: LayerInput) -> Tensor:
    """(G, L, V, D): input states of decoder layers."""
    return layer.view.hidden


@define(DecoderSignal, "before_layer", column_axis=2, keyed=True, shares=(_keys, _both))
def llm_keys(layer: LayerInput) -> Tensor:
    """(G, L, Hkv, V, d): keys of decoder layers, rotated."""
    return layer.counted_view.keys


@define(DecoderSignal, "before_layer", column_axis=2, keyed=True, shares=(_values, _both))
def llm_values(layer: LayerInput) -> Tensor:
    """(G, L, Hkv, V, d): values of decoder layers."""
    return layer.view.values


@define(
    DecoderSignal,
    "before_layer",
    **_QUERY,
    **_ALONE,
    keyed=True,
    flops=lambda sizes: 2 * sizes.tokens * sizes.held,
    shares=(_values, _both),
)
def value_attention(layer: LayerInput) -> Tensor:
    """(G, L, Hkv, V): softmax, over the image's tokens alone, of the products of the last
    prompt token's values with theirs.
    """
    return layer.view.value_logits(layer.query_columns)


@define(DecoderSignal, "before_layer", column_axis=1)
def normed_states(layer: LayerInput) -> Tensor:
    """(G, L, V, D): input states of decoder layers under the language model's final norm."""
    return layer.final_norm(layer.view.hidden)


@define(DecoderSignal, "before_layer", **_TEXT, finish=_without_padding)
def question_states(layer: LayerInput) -> Tensor:
    """(G, L, Q, D), and (G, Q) `question_mask`: input states of the text after the image."""
    return layer.at_text(layer.view.hidden)


@define(
    DecoderSignal,
    "before_layer",
    **_TEXT,
    finish=_without_padding,
    keyed=True,
    shares=(_keys, _both),
)
def question_keys(layer: LayerInput) -> Tensor:
    """(G, L, Hkv, Q, d), and (G, Q) `question_mask`: its keys, rotated."""
    return layer.at_text(layer.counted_view.keys.transpose(1, 2)).transpose(1, 2)


@define(DecoderSignal, "before_layer", **_TEXT, finish=_without_padding)
def question_normed_states(layer: LayerInput) -> Tensor:
    """(G, L, Q, D), and (G, Q) `question_mask`: its states under the final norm."""
    return layer.final_norm(layer.at_text(layer.view.hidden))


@define(
    DecoderSignal,
    "of_input",
    **_TEXT,
    layered=False,
    flops=lambda sizes: 2 * sizes.tokens * sizes.hidden * sizes.text,
)
def question_relevance(visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """(G, Q), and (G, Q) `question_mask`: how much the image's input embeddings attend to each
    text token, mean over visual tokens.
    """
    scores = torch.matmul(visual.float(), text.float().transpose(1, 2))
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1).nan_to_num()


@define(DecoderSignal, "of_positions", layered=False)
def prompt_positions(images: ImageTokens) -> Tensor:
    """(G, V): position of each visual token in its prompt, padding not counted."""
    return images.positions(images.columns)


@define(DecoderSignal, "of_positions", **_TEXT, layered=False)
def question_positions(images: ImageTokens) -> Tensor:
    """(G, Q), and (G, Q) `question_mask`: position in the prompt of the text after the image."""
    return images.positions(images.text_columns)


@define(DecoderSignal, "of_module", column_axis=1, depends_on_prompt=True, after_layer=True)
@torch.no_grad()
def transition(given: Tensor, made: Tensor, real: Tensor) -> Tensor:
    """(G, L, V): how much attention and MLP of a decoder layer change a token (TransPrune)."""
    # The relative size of what a module makes, times a softmax over the row of how far that points
    # away: arXiv:2507.20630, the transition variation of one module.
    given, made = given.detach().float(), made.detach().float()
    size = made.norm(dim=-1) / given.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    turned = 1 - torch.nn.functional.cosine_similarity(given, made, dim=-1)
    return size * turned.masked_fill(~real, -torch.inf).softmax(-1)
