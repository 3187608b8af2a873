"""What is known of a text model: its layers, how they mix tokens, and how positions reach them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.families.decoder_layer import is_causal, mixer_of, position_scale_of

RECURRENT = frozenset({"linear_attention", "conv"})
"""Kinds of decoder layers, in transformers' words, that mix tokens into a running state."""
TOKENWISE = frozenset({"mlp", "moe"})
"""Kinds of decoder layers that mix no tokens, where each layer is one module."""


def window_of(text: Any, layer: int) -> int | None:
    """Positions that a token sees at most in a decoder layer, itself included; `None` for all.

    Args:
        text: the text model's config; without kinds of layers, its window is that of all.
        layer: the decoder layer.
    """
    kinds = getattr(text, "layer_types", None)
    windowed = not kinds or kinds[layer] == "sliding_attention"
    return getattr(text, "sliding_window", None) if windowed else None


class TextFacts:
    """The side of a family that is about its text model; a family has `text` and its `layers`."""

    text: Any
    layers: Sequence[nn.Module]
    one_dimensional: ClassVar[bool] = True
    """Whether positions are a single number, so that survivors can be renumbered (not M-RoPE)."""
    first_position: ClassVar[int] = 0
    """Position of the first token of a prompt."""
    rotary_where_rotated: ClassVar[bool] = False
    """Whether layers that do not rotate are handed no rotary positions, rather than ignore them."""
    token_axis: ClassVar[int] = 1
    """Axis of tokens in states between decoder layers; the one before it is that of the batch."""
    per_position: ClassVar[tuple[str, ...]] = ()
    """Further arguments of decoder layers with an entry for each position: (B, T, ...)."""
    replaces_state: ClassVar[bool] = False
    """Whether recurrent layers hand each new running state to the cache, and write over none."""

    @property
    def model_type(self) -> str:
        """The config's model type."""
        return self.text.config.model_type

    @property
    def policy(self) -> Any:
        """The module that embeds prompts (`embed_prefix`), and hands the base model's cache of them
        to an expert; `None` where there is no expert.
        """
        return None

    @property
    def expert(self) -> Expert | None:
        """What attends to the cache of a prompt in place of new tokens, such as an action expert;
        `None` where new tokens are the text model's own.
        """
        return None

    @cached_property
    def text_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def text_width(self) -> int:
        """Width of the embeddings that the language model is given; 0 without one."""
        return self.text.config.hidden_size if self.text_layers else 0

    @property
    def first_llm_layer(self) -> int:
        """First decoder layer before which tokens may be removed (0 without DeepStack)."""
        return 0

    @cached_property
    def layer_kinds(self) -> tuple[str, ...]:
        """How each decoder layer mixes tokens, in transformers' words: `full_attention`,
        `sliding_attention`, `linear_attention`, `conv`, ...
        """
        kinds = getattr(self.text.config, "layer_types", None)
        return tuple(kinds or ["full_attention"] * self.text_layers)[: self.text_layers]

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """Decoder layers that see the whole sequence, so that their attention can rank tokens."""
        return tuple(i for i in self.keyed_layers if self.layer_kinds[i] == "full_attention")

    @cached_property
    def keyed_layers(self) -> tuple[int, ...]:
        """Decoder layers that make keys and values of single tokens."""
        own = (i for i, donor in enumerate(self.donors) if donor == i)
        return tuple(i for i in own if i not in self.keyless_layers)

    @cached_property
    def donors(self) -> tuple[int, ...]:
        """For each decoder layer, the one whose keys and values it reads: itself, or the last layer
        of its kind that makes some.
        """
        modes = getattr(self.text.config, "kv_sharing_modes", [None] * self.text_layers)
        found, last = [], {}
        for number, (kind, mode) in enumerate(zip(self.layer_kinds, modes, strict=True)):
            if mode != "reuse":
                last[kind] = number
            found.append(last[kind])
        return tuple(found)

    @cached_property
    def last_llm_layer(self) -> int:
        """Last decoder layer before which tokens may be removed. Those after it make no keys and
        values, and in generation compute nothing but the last token.
        """
        return max(self.donors, default=-1)

    @cached_property
    def recurrent_layers(self) -> frozenset[int]:
        """Decoder layers that mix tokens into a running state and have no keys of single tokens."""
        return frozenset(i for i, kind in enumerate(self.layer_kinds) if kind in RECURRENT)

    @cached_property
    def keyless_layers(self) -> frozenset[int]:
        """Decoder layers in which no token attends to another: recurrent ones, and those that mix
        none.
        """
        alone = (i for i, kind in enumerate(self.layer_kinds) if kind in TOKENWISE)
        return self.recurrent_layers.union(alone)

    @cached_property
    def causal(self) -> bool:
        """Whether a token sees those before it alone, where the text model makes no mask and leaves
        that to the attention kernel.
        """
        return all(is_causal(self.layers[number]) for number in self.keyed_layers)

    @property
    def reads_embeddings(self) -> bool:
        """Whether the text model makes more of its input embeddings than the input of layer 0."""
        return False

    def embedded(self, states: Tensor) -> Tensor:
        """(B, P, D) input embeddings, of the states (B, P, ...) before the first decoder layer."""
        return states

    def attended(self, layer: Any, states: Tensor) -> Tensor:
        """(B, P, D) what a decoder layer norms and projects, of the states (B, P, ...) before it.

        Args:
            layer: its module.
            states: with the axes of the batch and of tokens first.
        """
        return states

    @property
    def embedding(self) -> tuple[int, int] | None:
        """Numbers of an embedding, and bytes of a number, where the model makes an embedding of
        each token; else `None`.
        """
        return None

    @property
    def window(self) -> int | None:
        """Positions that a token sees at most, itself included, where that is so in all layers."""
        config = self.text.config
        return None if getattr(config, "layer_types", None) else window_of(config, 0)

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> Any:
        """Rotary (cos, sin) of a decoder layer for (B, T) positions; `None` if handed none."""
        if self.rotary_where_rotated and not self.rotates(layer):
            return None
        kind = {"layer_type": self.layer_kinds[layer]} if self._rotary_by_kind else {}
        return self.text.rotary_emb(hidden, position_ids=position_ids, **kind)

    @cached_property
    def _rotary_by_kind(self) -> bool:
        """Whether each kind of layer has a rotary embedding of its own."""
        return "layer_type" in signature(type(self.text.rotary_emb).forward).parameters

    @property
    def rotary_by_length(self) -> bool:
        """Whether the frequencies of rotary embeddings depend on the largest position."""
        kinds = getattr(self.text.rotary_emb, "rope_type", "default")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        return any("dynamic" in kind or kind == "longrope" for kind in kinds)

    @property
    def rope_switch(self) -> int | None:
        """Position from which rotary embeddings take other frequencies for the whole sequence
        (LongRoPE); `None` if they do not.
        """
        rope: Any = getattr(self.text, "rotary_emb", None)
        if getattr(rope, "rope_type", None) != "longrope":
            return None
        return rope.config.rope_parameters["original_max_position_embeddings"]

    @property
    def tempered_from(self) -> int | None:
        """First position from which layers sharpen attention by where a token stands among those
        that they are given, rather than by its position; `None` if they do not.
        """
        return None

    @cached_property
    def scales_by_position(self) -> bool:
        """Whether layers scale their queries by position ids."""
        return any(position_scale_of(mixer_of(layer)) is not None for layer in self.layers[:1])

    def rotates(self, layer: int) -> bool:
        """Whether a decoder layer rotates queries and keys (not so in layers without RoPE)."""
        return True


class Expert(TextFacts):
    """What attends to the cache of a prompt in place of new tokens, layer by layer.

    Args:
        model: a text model without a head, with at most as many layers as the one that fills the
            cache.
        tokens: of a row, in each of its steps; all see the prompt.
        products: multiply-adds of a step on a row before its first layer and after its last.
    """

    def __init__(self, model: Any, tokens: int, products: int) -> None:
        self.model, self.text, self.layers = model, model, model.layers
        self.config = model.config
        self.tokens, self.products = tokens, products
