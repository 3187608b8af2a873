"""FLOPs and cache bytes from a config and token counts; no model is run.

A multiply-add counts as 2. Norms, activations, softmax, biases, rotary embeddings and the embedding
lookup are left out: they are below one percent of a decoder layer.

Symbols: `T` tokens of a row in this forward, `S` keys it may see, `D` hidden, `h` query heads, `g`
key-value heads, `d` head width, `M` MLP width, `L` layers, `P` patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TextShape:
    """The sizes of a decoder like Llama or Qwen2: three MLP matrices, grouped key-value heads."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> TextShape:
        """Read the sizes from a text config, or from the `text_config` of a multimodal one."""
        text = getattr(config, "text_config", config)
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp=_text_mlp_width(text),
            vocabulary=text.vocab_size,
        )


def _text_mlp_width(text: Any) -> int:
    """Width of the MLP that a token passes, on average over the layers; routers are left out."""
    active = getattr(text, "num_experts_per_tok", None)
    if not active:
        return text.intermediate_size
    dense = {*(getattr(text, "mlp_only_layers", None) or ())}
    dense.update(range(getattr(text, "first_k_dense_replace", 0)))
    every = getattr(text, "decoder_sparse_step", 1)
    layers = range(text.num_hidden_layers)
    sparse = sum(i not in dense and (i + 1) % every == 0 for i in layers)
    total = sparse * (active + getattr(text, "n_shared_experts", 0)) * text.moe_intermediate_size
    return (total + (len(layers) - sparse) * text.intermediate_size) // len(layers)


def visible_keys(tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
    """Query-key pairs of one row: sum over the `T` queries of the keys each may see.

    Args:
        tokens: T, the last T of the keys are the queries' own.
        keys: S, keys in all; `None` means T, a prompt without a past.
        causal: whether a query sees only keys up to itself: T (S - T) + T (T + 1) / 2, else T S.
    """
    total = tokens if keys is None else keys
    if not causal:
        return tokens * total
    return tokens * (total - tokens) + tokens * (tokens + 1) // 2


def projection_flops(shape: TextShape, tokens: int) -> int:
    """q, k, v and output projections of one layer: 2 T D (2 h d + 2 g d)."""
    widths = 2 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
    return 2 * tokens * shape.hidden * widths


def attention_flops(shape: TextShape, pairs: int) -> int:
    """Q K^T and the weighted sum of values in one layer: 4 h d for each visible query-key pair."""
    return 4 * shape.heads * shape.head_dim * pairs


def mlp_flops(shape: TextShape, tokens: int) -> int:
    """Gate, up and down matrices of one layer: 6 T D M."""
    return 6 * tokens * shape.hidden * shape.mlp


def layer_flops(
    shape: TextShape, tokens: int, keys: int | None = None, *, causal: bool = True
) -> int:
    """One decoder layer on T tokens of one row."""
    pairs = visible_keys(tokens, keys, causal=causal)
    return (
        projection_flops(shape, tokens) + attention_flops(shape, pairs) + mlp_flops(shape, tokens)
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
    shape = TextShape.of(config)
    body = sum(layer_flops(shape, t, causal=causal) for row in layer_tokens for t in row)
    return body + head_flops(shape, len(layer_tokens[0]) if layer_tokens else 0)


def decode_flops(config: Any, slots_per_layer: Sequence[int]) -> int:
    """The text model on one new token of one row.

    Args:
        config: text config, or a multimodal one.
        slots_per_layer: keys that the token sees in each layer, itself included.
    """
    shape = TextShape.of(config)
    return sum(layer_flops(shape, 1, keys) for keys in slots_per_layer) + head_flops(shape)


def kv_bytes(config: Any, slots_per_layer: Sequence[int], batch: int, dtype: torch.dtype) -> int:
    """Bytes of the key-value cache: 2 B g d for each slot of each layer, times the item size.

    Args:
        config: text config, or a multimodal one.
        slots_per_layer: cache slots of each layer, padding included.
        batch: B, rows.
        dtype: what the cache holds.
    """
    shape = TextShape.of(config)
    return 2 * batch * shape.kv_heads * shape.head_dim * sum(slots_per_layer) * dtype.itemsize


VISION_COUNTED = frozenset({"llava"})
"""Types of vision-language models whose tower and projector the functions below describe."""


def vision_flops(config: Any, rows: Sequence[tuple[int, int]] = ()) -> int:
    """A ViT-like encoder on one image, without what pools its rows.

    All layers count: transformers runs those behind the feature layer too.

    Patch embedding 2 P (3 p^2) D, then in each layer, for the P patches and the special tokens,
    four D x D projections, dense attention, and a two-matrix MLP (three matrices with SwiGLU).

    Args:
        config: of the encoder, or of a model around it.
        rows: for each layer, rows that its attention and its MLP see; without it, all in all.
    """
    vision = getattr(config, "vision_config", config)
    patches = patch_count(vision)
    hidden = vision.hidden_size
    full = patches + special_tokens(vision)
    embedding = 2 * patches * vision.num_channels * vision.patch_size**2 * hidden
    total = embedding
    for attention, mlp in rows or [(full, full)] * vision.num_hidden_layers:
        total += 8 * attention * hidden**2 + 4 * hidden * attention**2
        total += 2 * mlp * hidden * _mlp_width(vision)
    return total


def patch_count(vision: Any) -> int:
    """P, patches of an image of the encoder's own size."""
    if hasattr(vision, "num_patches"):
        return vision.num_patches
    return (vision.image_size // vision.patch_size) ** 2


def special_tokens(vision: Any) -> int:
    """Class, distillation and register tokens, by the encoder's config type."""
    counts = {"clip_vision_model": 1, "vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1}
    return counts.get(vision.model_type, 0) + getattr(vision, "num_register_tokens", 0)


def _mlp_width(vision: Any) -> int:
    """Widths of an encoder MLP's matrices, summed."""
    if not hasattr(vision, "mlp_ratio"):
        return 2 * vision.intermediate_size
    width = int(vision.hidden_size * vision.mlp_ratio)
    if getattr(vision, "use_swiglu_ffn", False):
        return 3 * ((int(width * 2 / 3) + 7) // 8 * 8)
    return 2 * width


def projector_flops(config: Any, tokens: int) -> int:
    """LLaVA's projector on V visual tokens of one image: 2 V (F Dv D + D^2), F feature layers."""
    feature_layers = config.vision_feature_layer
    inputs = config.vision_config.hidden_size * (
        1 if isinstance(feature_layers, int) else len(feature_layers)
    )
    hidden = config.text_config.hidden_size
    return 2 * tokens * (inputs * hidden + hidden**2)


def text_attention_flops(config: Any, tokens: int) -> int:
    """The signal `text_attention` for one row: keys of all tokens, one query, one row of scores.

    2 T D g d for the keys, 2 D h d for the query and 2 h d T for the scores.
    """
    shape = TextShape.of(config)
    queries = shape.heads * shape.head_dim
    keys = 2 * tokens * shape.hidden * shape.kv_heads * shape.head_dim
    return keys + 2 * shape.hidden * queries + 2 * queries * tokens


def cls_scores_flops(config: Any) -> int:
    """The same where the layer's own queries and keys are at hand: one row, 2 D (P + 1)."""
    vision = getattr(config, "vision_config", config)
    return 2 * vision.hidden_size * (patch_count(vision) + 1)


def cls_attention_flops(config: Any) -> int:
    """The signal `cls_attention` of one image and layer: one query row, 2 D^2 + 2 D (P + 1)."""
    vision = getattr(config, "vision_config", config)
    tokens = patch_count(vision) + 1
    return 2 * vision.hidden_size**2 + 2 * vision.hidden_size * tokens
