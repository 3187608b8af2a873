"""The sizes of decoder layers, read from a config; `mlps` reads those of their MLPs. If there are
layers to look at, `widths` reads how wide they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from foveate.errors import UnsupportedModelError
from foveate.families.text_facts import TOKENWISE, window_of
from foveate.measure.latents import IndexedAttention, LatentAttention
from foveate.measure.mamba import Mamba2
from foveate.measure.mixers import Attention, GatedDeltaNet, Mixer, ShortConvolution, Unmixed
from foveate.measure.mlps import Mlp
from foveate.measure.streams import Streams
from foveate.measure.widths import measured, size_of

GATED = frozenset({"qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"})
"""Text models whose query matrix makes a gate of the output too; their configs do not say so."""
GATED_APART = frozenset({"muse_glimmer_text", "muse_spark_text"})
"""Text models with a matrix of its own for such a gate; their configs do not say so either."""
BOTH_WAYS = frozenset({"modernbert"})
"""Text models that see what comes after a token too, as far as before; a window counts one side."""
FUSED = frozenset({"modernbert", "phi4_multimodal"})
"""Text models with one matrix for queries, keys and values."""
GATED_LATENTS = frozenset({"dots3_note_text"})
"""Text models whose latent attention gates every head."""
ATTENTION = frozenset(
    {
        "chunked_attention",
        "full_attention",
        "indexed_attention",
        "reference_sliding_attention",
        "sliding_attention",
    }
)


@dataclass(frozen=True)
class TextShape:
    """The sizes of a decoder layer: what mixes its tokens, and an MLP.

    Symbols: `T` tokens, `D` hidden.

    Args:
        layers: L, of the whole decoder.
        mixer: what mixes the tokens.
        mlp: the MLP.
        vocabulary: tokens of the language-model head.
        streams: states of each token.
        per_layer: width of what each token brings to the layer beside the hidden state, as in
            Gemma 4; 0 for nothing.
        bypass: rank of a way around the attention (LAuReL); 0 for none.
        donor: the earlier layer whose keys and values this one uses; `None` if it has its own.
    """

    layers: int
    mixer: Mixer
    mlp: Mlp
    vocabulary: int
    streams: Streams
    per_layer: int = 0
    bypass: int = 0
    donor: int | None = None

    @classmethod
    def of(cls, config: Any, layer: int = 0) -> TextShape:
        """Read the sizes from a text config, or from the `text_config` of a multimodal one.

        Args:
            config: the config.
            layer: the decoder layer; they may differ in all but width and vocabulary.

        Raises:
            UnsupportedModelError: it is of a kind whose cost is not known.
        """
        text = getattr(config, "text_config", config)
        donor = _donor(text, layer)
        return cls(
            layers=text.num_hidden_layers,
            mixer=_mixer(text, layer, shared=donor is not None),
            mlp=Mlp.of(text, layer, shared=donor is not None),
            vocabulary=text.vocab_size,
            streams=Streams.of(config),
            per_layer=getattr(text, "hidden_size_per_layer_input", None) or 0,
            bypass=getattr(text, "laurel_rank", 0),
            donor=donor,
        )

    @classmethod
    def all(cls, source: Any) -> tuple[TextShape, ...]:
        """The sizes of every layer.

        Args:
            source: a config, or a model family, whose layers are as wide as they are.
        """
        config = getattr(source, "config", source)
        text = getattr(config, "text_config", config)
        shapes = tuple(cls.of(config, layer) for layer in range(text.num_hidden_layers))
        if not hasattr(source, "layers"):
            return shapes
        head = size_of(getattr(source.model, "lm_head", None))
        return tuple(
            shape.fitted(layer, shape.vocabulary if head is None else head[0])
            for shape, layer in zip(shapes, source.layers, strict=False)  # layers may be left out
        )

    def fitted(self, layer: Any, vocabulary: int) -> TextShape:
        """The same as wide as a layer is.

        Args:
            layer: its module.
            vocabulary: tokens of the language-model head.
        """
        mixer, mlp = measured(layer, self.mixer, self.mlp)
        streams = replace(self.streams, hidden=mlp.hidden)
        return replace(self, mixer=mixer, mlp=mlp, streams=streams, vocabulary=vocabulary)

    @property
    def hidden(self) -> int:
        """D."""
        return self.mlp.hidden

    def mlp_flops(self, tokens: int, visual: int = 0) -> int:
        """The MLP, and 4 T D times the width of inputs per layer, for their gate and their way
        back, and times the rank of a bypass.

        Args:
            tokens: T.
            visual: how many of them are visual tokens.
        """
        beside = 4 * tokens * self.hidden * (self.per_layer + self.bypass)
        return self.mlp.flops(tokens, visual) + beside


# -- what mixes tokens


def _mixer(text: Any, layer: int, shared: bool) -> Mixer:
    kind = (getattr(text, "layer_types", None) or ["full_attention"] * (layer + 1))[layer]
    if kind == "linear_attention" and hasattr(text, "linear_num_value_heads"):
        return GatedDeltaNet(
            hidden=text.hidden_size,
            key_heads=text.linear_num_key_heads,
            value_heads=text.linear_num_value_heads,
            key_dim=text.linear_key_head_dim,
            value_dim=text.linear_value_head_dim,
            taps=text.linear_conv_kernel_dim,
        )
    if kind == "linear_attention" and hasattr(text, "mamba_num_heads"):
        return Mamba2(
            hidden=text.hidden_size,
            heads=text.mamba_num_heads,
            head_dim=text.mamba_head_dim,
            state=text.ssm_state_size,
            groups=text.n_groups,
            taps=text.conv_kernel,
            chunk=text.chunk_size,
        )
    if kind in TOKENWISE:
        return Unmixed(text.hidden_size)
    if kind == "conv" and hasattr(text, "conv_L_cache"):
        return ShortConvolution(text.hidden_size, text.conv_L_cache)
    if kind not in ATTENTION:
        raise UnsupportedModelError(
            f"layer {layer} of this {text.model_type} is of kind {kind!r}, and what such a layer "
            "costs is not known, so neither FLOPs nor bytes can be counted"
        )
    return _attention(text, layer, kind, shared)


def _attention(text: Any, layer: int, kind: str, shared: bool) -> Attention | LatentAttention:
    own = _config_of(text, layer)
    heads = own.num_attention_heads
    if getattr(own, "kv_lora_rank", None):
        return _latent(text, own, layer, kind)
    head_dim = getattr(own, "head_dim", None) or text.hidden_size // heads
    # Of each head, or of each of its channels.
    gating = getattr(own, "gating", None) or getattr(own, "use_attention_gate", False)
    if getattr(text, "model_type", "") in GATED_APART:
        gating = "per-channel"
    window, both_ways = window_of(own, layer), getattr(text, "model_type", "") in BOTH_WAYS
    return Attention(
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(own, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        window=window + 1 if window and both_ways else window,
        gated=getattr(text, "model_type", "") in GATED,
        shared=shared,
        keys_are_values=getattr(own, "attention_k_eq_v", False) and kind == "full_attention",
        gate=0 if not gating else heads if gating in (True, "per-head") else heads * head_dim,
        chunk=own.attention_chunk_size if kind == "chunked_attention" else None,
        both_ways=both_ways,
        fused=getattr(text, "model_type", "") in FUSED,
    )


def _latent(text: Any, own: Any, layer: int, kind: str) -> LatentAttention:
    sizes: dict[str, Any] = {
        "hidden": text.hidden_size,
        "heads": own.num_attention_heads,
        "query_rank": own.q_lora_rank,
        "rank": own.kv_lora_rank,
        "rotary": own.qk_rope_head_dim,
        "plain": own.qk_nope_head_dim,
        "value": own.v_head_dim,
        "gate": own.num_attention_heads if text.model_type in GATED_LATENTS else 0,
    }
    if kind == "indexed_attention":
        return IndexedAttention(
            **sizes,
            chosen=own.index_topk,
            index_heads=own.index_n_heads,
            index_width=own.index_head_dim,
        )
    windowed = kind == "sliding_attention"
    return LatentAttention(**sizes, window=window_of(own, layer) if windowed else None)


def _config_of(text: Any, layer: int) -> Any:
    """The config of one layer: where layers differ, that of all refuses to be asked."""
    configs = getattr(text, "per_layer_config", None)
    return text if configs is None else configs[layer]


def _donor(text: Any, layer: int) -> int | None:
    """The layer whose keys and values a layer uses: the last of its kind that makes its own."""
    first = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    if layer < first:
        return None
    kind = text.layer_types[layer]
    return max(number for number in range(first) if text.layer_types[number] == kind)
