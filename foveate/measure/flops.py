"""FLOPs and cache bytes from a config and token counts; no model is run.

A multiply-add counts as 2. Norms, activations, softmax, biases, rotary embeddings and the embedding
lookup are left out: they are below one percent of a decoder layer.

Symbols: `T` tokens of a row in this forward, `S` keys it may see, `D` hidden, `L` layers, `B` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate.measure.mixers import Attention
from foveate.measure.shapes import TextShape


def layer_flops(
    shape: TextShape, tokens: int, keys: int | None = None, *, causal: bool = True
) -> int:
    """One decoder layer on T tokens of one row.

    Args:
        shape: the layer.
        tokens: T.
        keys: S; `None` for a prompt without a past.
        causal: see `mixers`.
    """
    mixing = shape.mixer.mixing(tokens, keys, causal=causal)
    return shape.mixer.projections(tokens) + mixing + shape.mlp_flops(tokens)


def layers_flops(
    shapes: Sequence[TextShape], layer_tokens: Sequence[Sequence[int]], *, causal: bool = True
) -> tuple[int, ...]:
    """Each decoder layer on a prompt.

    Args:
        shapes: of all layers.
        layer_tokens: tokens of each row at each layer, [layers][rows].
        causal: see `mixers`.
    """
    return tuple(
        sum(layer_flops(shape, tokens, causal=causal) for tokens in row)
        for shape, row in zip(shapes, layer_tokens, strict=True)
    )


def head_flops(shape: TextShape, positions: int = 1) -> int:
    """The language-model head: 2 D times the vocabulary for each position that needs logits."""
    return 2 * positions * shape.hidden * shape.vocabulary


def prefill_flops(
    config: Any, layer_tokens: Sequence[Sequence[int]], *, causal: bool = True
) -> int:
    """The text model on a prompt, with the head at one position of each row.

    Args:
        config: text config, or a multimodal one.
        layer_tokens: tokens of each row at each layer, [layers][rows].
        causal: count visible query-key pairs only (what the arithmetic needs); `False` counts all T
            x T (what dense kernels do).
    """
    shapes = TextShape.all(config)
    body = sum(layers_flops(shapes, layer_tokens, causal=causal))
    return body + head_flops(shapes[0], len(layer_tokens[0]))


def decode_flops(config: Any, slots_per_layer: Sequence[int]) -> int:
    """The text model on one new token of one row.

    Args:
        config: text config, or a multimodal one.
        slots_per_layer: keys that the token sees in each layer, itself included.
    """
    shapes = TextShape.all(config)
    layers = zip(shapes, slots_per_layer, strict=True)
    return sum(layer_flops(shape, 1, keys) for shape, keys in layers) + head_flops(shapes[0])


def kv_bytes(config: Any, slots_per_layer: Sequence[int], batch: int, dtype: torch.dtype) -> int:
    """Bytes of the key-value cache: what a slot of a layer holds times its slots, the rows and the
    item size.

    Args:
        config: text config, or a multimodal one.
        slots_per_layer: tokens that each layer was given, padding included; a layer with a window
            holds the last of them only.
        batch: B, rows.
        dtype: what the cache holds.
    """
    layers = zip(TextShape.all(config), slots_per_layer, strict=True)
    values = sum(shape.mixer.slot * shape.mixer.held(slots) for shape, slots in layers)
    return batch * values * dtype.itemsize


def text_attention_flops(config: Any, tokens: int) -> int:
    """The signal `text_attention` for one row: keys of all tokens, one query, one row of scores.

    2 T D g d for the keys, 2 D h d for the query and 2 h d T for the scores.
    """
    one = TextShape.of(config).mixer
    assert isinstance(one, Attention)
    queries = one.heads * one.head_dim
    keys = 2 * tokens * one.hidden * one.kv_heads * one.head_dim
    return keys + 2 * one.hidden * queries + 2 * queries * tokens
