"""FLOPs and cache bytes from the sizes of layers and token counts; no model is run. Sizes are those
that a config says, or those that the layers of a model family have.

A multiply-add counts as 2. Norms, activations, softmax, biases, rotary embeddings and the embedding
lookup are left out: they are below one percent of a decoder layer. Where visual tokens have experts
of their own (ERNIE 4.5 VL), those that open and close an image count as text, though the model has
them pass the experts of images: two tokens of an image.

Symbols: `T` tokens of a row in this forward, `S` keys it may see, `D` hidden, `L` layers, `B` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate.families.text_facts import Expert
from foveate.measure.mixers import Attention
from foveate.measure.shapes import TextShape


def layer_flops(
    shape: TextShape,
    tokens: int,
    keys: int | None = None,
    *,
    visual: int = 0,
    causal: bool = True,
) -> int:
    """One decoder layer on T tokens of one row.

    Args:
        shape: the layer.
        tokens: T.
        keys: S; `None` for a prompt without a past.
        visual: how many of the T are visual tokens.
        causal: see `mixers`.
    """
    mixing = shape.mixer.mixing(tokens, keys, causal=causal)
    made = shape.mixer.projections(tokens) + shape.mlp_flops(tokens, visual)
    return made + mixing + shape.streams.in_layer(tokens)


def layers_flops(
    shapes: Sequence[TextShape],
    layer_tokens: Sequence[Sequence[int]],
    visual: Sequence[Sequence[int]] | None = None,
    *,
    causal: bool = True,
) -> tuple[int, ...]:
    """Each decoder layer on a prompt. One that shares keys sees those of its donor, however many
    tokens it was given itself; keys of tokens that it no longer has count as before them. What the
    text model makes of several streams of states after its last layer counts with that.

    Args:
        shapes: of all layers.
        layer_tokens: tokens of each row at each layer, [layers][rows].
        visual: how many of them are visual tokens; none by default.
        causal: see `mixers`.
    """
    seen = [[0] * len(row) for row in layer_tokens] if visual is None else visual
    *others, last = (
        sum(
            layer_flops(shape, t, None if shape.donor is None else s, visual=v, causal=causal)
            for t, s, v in zip(row, layer_tokens[shape.donor or 0], own, strict=True)
        )
        for shape, row, own in zip(shapes, layer_tokens, seen, strict=True)
    )
    return *others, last + shapes[-1].streams.joined(sum(layer_tokens[-1]))


def entry_flops(shapes: Sequence[TextShape], tokens: int) -> int:
    """What the text model computes of T tokens before its first layer: with inputs of each layer
    for each token, as in Gemma 4, 2 T D times their width in all layers; and what `Streams` says.
    """
    inputs = sum(2 * tokens * shape.hidden * shape.per_layer for shape in shapes)
    return inputs + sum(shape.streams.at_entry(tokens) for shape in shapes[:1])


def head_flops(shape: TextShape, positions: int = 1) -> int:
    """The language-model head: 2 D times the vocabulary for each position that needs logits."""
    return 2 * positions * shape.hidden * shape.vocabulary


def embedding_flops(shape: TextShape, width: int, tokens: int) -> int:
    """The projection of states to embeddings: 2 D times their width for each token of the prompt,
    removed ones too, since the model makes all and what survives is picked from them.
    """
    return 2 * tokens * shape.hidden * width


def prefill_flops(
    source: Any,
    layer_tokens: Sequence[Sequence[int]],
    visual: Sequence[Sequence[int]] | None = None,
    *,
    causal: bool = True,
) -> int:
    """The text model on a prompt, with the head at one position of each row.

    Args:
        source: text config, a multimodal one, or a model family.
        layer_tokens: tokens of each row at each layer, [layers][rows].
        visual: how many of them are visual tokens; none by default. It matters where these have
            experts of their own.
        causal: count visible query-key pairs only (what the arithmetic needs); `False` counts all T
            x T (what dense kernels do).
    """
    shapes = TextShape.all(source)
    body = sum(layers_flops(shapes, layer_tokens, visual, causal=causal))
    entry = entry_flops(shapes, sum(layer_tokens[0]))
    return entry + body + head_flops(shapes[0], len(layer_tokens[0]))


def decode_flops(source: Any, slots_per_layer: Sequence[int]) -> int:
    """The text model on one new token of one row.

    Args:
        source: text config, a multimodal one, or a model family.
        slots_per_layer: keys that the token sees in each layer, itself included; of a layer that
            shares keys, those of its donor count, and of one with a running state none.
    """
    shapes = TextShape.all(source)
    total = entry_flops(shapes, 1) + shapes[-1].streams.joined(1) + head_flops(shapes[0])
    for shape, own in zip(shapes, slots_per_layer, strict=True):
        total += layer_flops(shape, 1, own if shape.donor is None else slots_per_layer[shape.donor])
    return total


def expert_flops(expert: Expert, slots_per_layer: Sequence[int]) -> int:
    """One step of an expert on one row: its tokens see all of the cache and, counted in full, each
    other.

    Args:
        expert: the expert.
        slots_per_layer: what the cache of the prompt holds.
    """
    count, total = expert.tokens, 2 * expert.products
    for shape, slots in zip(TextShape.all(expert), slots_per_layer, strict=True):
        total += layer_flops(shape, count, slots + count, causal=False)
    return total


def kv_bytes(source: Any, slots_per_layer: Sequence[int], batch: int, dtype: torch.dtype) -> int:
    """Bytes of the key-value cache: what a slot of a layer holds times its slots and the rows.
    Layers that share keys and layers with a running state have no slots.

    Args:
        source: text config, a multimodal one, or a model family.
        slots_per_layer: tokens that each layer was given, padding included; a layer with a window
            holds the last of them only.
        batch: B, rows.
        dtype: what the cache holds.
    """
    layers = zip(TextShape.all(source), slots_per_layer, strict=True)
    held = (shape.mixer.slot_bytes(dtype) * shape.mixer.held(slots) for shape, slots in layers)
    return batch * sum(held)


def state_bytes(source: Any, batch: int, dtype: torch.dtype) -> int:
    """Bytes of the running states of recurrent layers, which no removal of tokens makes smaller.

    Args:
        source: text config, a multimodal one, or a model family.
        batch: B, rows.
        dtype: of the model; some states are kept in 32 bits all the same.
    """
    return batch * sum(shape.mixer.state_bytes(dtype) for shape in TextShape.all(source))


def text_attention_flops(source: Any, tokens: int) -> int:
    """The signal `text_attention` for one row, of the first layer with attention: keys of all
    tokens, one query, one row of scores.

    2 T D g d for the keys, 2 D h d for the query, twice that if it comes with a gate, and 2 h d T
    for the scores.
    """
    mixers = (shape.mixer for shape in TextShape.all(source))
    one = next(mixer for mixer in mixers if isinstance(mixer, Attention) and not mixer.shared)
    keys = 2 * tokens * one.hidden * one.kv_heads * one.head_dim
    return keys + 2 * one.hidden * one.query_width + 2 * one.heads * one.head_dim * tokens
