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

from foveate.families.family import window_of

_UNGATED = ("cosmos3_edge_text",)  # text models whose MLP has no gate


@dataclass(frozen=True)
class TextShape:
    """The sizes of a decoder layer like Llama's or Qwen2's, with grouped key-value heads.

    Args:
        layers: L, of the whole decoder.
        hidden: D.
        heads: h.
        kv_heads: g.
        head_dim: d.
        mlp: M, the neurons that a token passes: of a mixture, those of its experts.
        vocabulary: tokens of the language-model head.
        router: experts that a token is rated for; 0 without a mixture.
        window: keys that a query sees at most, itself included; `None` for all.
        matrices: of the MLP: gate, up and down, or two where it has no gate.
        gate: factors that a layer computes for what its heads have mixed.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    router: int = 0
    window: int | None = None
    matrices: int = 3
    gate: int = 0

    @classmethod
    def of(cls, config: Any, layer: int = 0) -> TextShape:
        """Read the sizes from a text config, or from the `text_config` of a multimodal one.

        Args:
            config: the config.
            layer: the decoder layer; they may differ in MLP and window.
        """
        text = of_layer(getattr(config, "text_config", config), layer)
        heads = text.num_attention_heads
        mlp, router = _mlp(text, layer)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            mlp=mlp,
            vocabulary=text.vocab_size,
            router=router,
            window=window_of(text, layer),
            matrices=2 if getattr(text, "model_type", None) in _UNGATED else 3,
            gate=_gate(text, heads, head_dim),
        )

    @classmethod
    def all(cls, config: Any) -> tuple[TextShape, ...]:
        """The sizes of every layer."""
        text = getattr(config, "text_config", config)
        return tuple(cls.of(text, layer) for layer in range(text.num_hidden_layers))

    def held(self, tokens: int) -> int:
        """Slots that the layer's cache keeps of so many tokens: all, or one less than the window,
        to which the next query adds itself.
        """
        return tokens if self.window is None else min(tokens, self.window - 1)


def _mlp(text: Any, layer: int) -> tuple[int, int]:
    """Neurons of the MLP that a token passes in a layer, and experts that it is rated for."""
    active = _first(text, "num_experts_per_tok", "moe_topk")
    dense = layer in (getattr(text, "mlp_only_layers", None) or ())
    dense |= layer < getattr(text, "first_k_dense_replace", 0)
    if kinds := getattr(text, "mlp_layer_types", None):
        dense |= kinds[layer] == "dense"
    dense |= (layer + 1) % getattr(text, "decoder_sparse_step", 1) != 0
    if not active or dense:
        return text.intermediate_size, 0
    names = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    shared = _first(text, "n_shared_experts", "moe_num_shared_experts") or 0
    width = _first(text, "moe_intermediate_size", "intermediate_size")
    beside = getattr(text, "share_expert_dim", 0)
    return (active + shared) * width + beside, _first(text, *names)


def _gate(text: Any, heads: int, head_dim: int) -> int:
    """Factors that the attention of a layer computes: one for each head, or for each of its
    channels.
    """
    gating = getattr(text, "gating", False)
    return 0 if not gating else heads if gating in (True, "per-head") else heads * head_dim


def of_layer(text: Any, layer: int) -> Any:
    """The config of one decoder layer, where layers of a text model differ in size."""
    return text.per_layer_config[layer] if getattr(text, "is_heterogeneous", False) else text


def _first(config: Any, *names: str) -> Any:
    """The first of some settings that a config has."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def visible_keys(
    tokens: int, keys: int | None = None, *, causal: bool = True, window: int | None = None
) -> int:
    """Query-key pairs of one row: sum over the `T` queries of the keys each may see.

    Args:
        tokens: T, the last T of the keys are the queries' own.
        keys: S, keys in all; `None` means T, a prompt without a past.
        causal: whether a query sees only keys up to itself: T (S - T) + T (T + 1) / 2, else T S.
        window: keys that a query sees at most, if it is causal.
    """
    total = tokens if keys is None else keys
    if not causal:
        return tokens * total
    if window is None or total <= window:
        return tokens * (total - tokens) + tokens * (tokens + 1) // 2
    short = max(min(window - (total - tokens), tokens), 0)  # queries that see all before them
    return visible_keys(short, total - tokens + short) + (tokens - short) * window


def projection_flops(shape: TextShape, tokens: int) -> int:
    """q, k, v and output projections of one layer: 2 T D (2 h d + 2 g d), and its gate."""
    widths = 2 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
    return 2 * tokens * shape.hidden * (widths + shape.gate)


def attention_flops(shape: TextShape, pairs: int) -> int:
    """Q K^T and the weighted sum of values in one layer: 4 h d for each visible query-key pair."""
    return 4 * shape.heads * shape.head_dim * pairs


def mlp_flops(shape: TextShape, tokens: int) -> int:
    """The matrices of one layer's MLP, 2 T D M each, and 2 T D for each expert in choice."""
    return 2 * tokens * shape.hidden * (shape.matrices * shape.mlp + shape.router)


def layer_flops(
    shape: TextShape, tokens: int, keys: int | None = None, *, causal: bool = True
) -> int:
    """One decoder layer on T tokens of one row."""
    pairs = visible_keys(tokens, keys, causal=causal, window=shape.window)
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
    shapes = TextShape.all(config)
    body = sum(
        layer_flops(shape, t, causal=causal)
        for shape, row in zip(shapes, layer_tokens, strict=True)
        for t in row
    )
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
    """Bytes of the key-value cache: 2 B g d for each slot of each layer, times the item size.

    Args:
        config: text config, or a multimodal one.
        slots_per_layer: tokens that each layer was given, padding included; a layer with a window
            holds the last of them only.
        batch: B, rows.
        dtype: what the cache holds.
    """
    layers = zip(TextShape.all(config), slots_per_layer, strict=True)
    values = sum(2 * s.kv_heads * s.head_dim * s.held(slots) for s, slots in layers)
    return batch * values * dtype.itemsize


def text_attention_flops(config: Any, tokens: int) -> int:
    """The signal `text_attention` for one row: keys of all tokens, one query, one row of scores.

    2 T D g d for the keys, 2 D h d for the query and 2 h d T for the scores.
    """
    shape = TextShape.of(config)
    queries = shape.heads * shape.head_dim
    keys = 2 * tokens * shape.hidden * shape.kv_heads * shape.head_dim
    return keys + 2 * shape.hidden * queries + 2 * queries * tokens
