"""The sizes of decoder layers, read from a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.errors import UnsupportedModelError
from foveate.families.family import window_of
from foveate.measure.mixers import (
    Attention,
    GatedDeltaNet,
    LatentAttention,
    Mixer,
    ShortConvolution,
)

GATED = frozenset({"qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"})
"""Text models whose query matrix makes a gate of the output too; their configs do not say so."""
UNGATED = frozenset({"cosmos3_edge_text"})
"""Text models whose MLP has no gate."""
BOTH_WAYS = frozenset({"modernbert"})
"""Text models that see what comes after a token too, as far as before; a window counts one side."""
ATTENTION = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class TextShape:
    """The sizes of a decoder layer: what mixes its tokens, and an MLP.

    Symbols: `T` tokens, `D` hidden, `M` width of the MLP.

    Args:
        layers: L, of the whole decoder.
        hidden: D.
        mixer: what mixes the tokens.
        mlp: M, the neurons that a token passes: of a mixture, those of its experts and of shared
            ones.
        vocabulary: tokens of the language-model head.
        router: numbers that a token is rated by: one for each expert in choice, and one if there is
            a gate of shared ones; 0 without a mixture.
        per_layer: width of what each token brings to the layer beside the hidden state, as in
            Gemma 4; 0 for nothing.
        donor: the earlier layer whose keys and values this one uses; `None` if it has its own.
        matrices: of the MLP: gate, up and down, or two where it has no gate.
    """

    layers: int
    hidden: int
    mixer: Mixer
    mlp: int
    vocabulary: int
    router: int = 0
    per_layer: int = 0
    donor: int | None = None
    matrices: int = 3

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
        mlp, router = _mlp(text, layer, shared=donor is not None)
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            mixer=_mixer(text, layer, shared=donor is not None),
            mlp=mlp,
            vocabulary=text.vocab_size,
            router=router,
            per_layer=getattr(text, "hidden_size_per_layer_input", None) or 0,
            donor=donor,
            matrices=2 if getattr(text, "model_type", "") in UNGATED else 3,
        )

    @classmethod
    def all(cls, config: Any) -> tuple[TextShape, ...]:
        """The sizes of every layer."""
        text = getattr(config, "text_config", config)
        return tuple(cls.of(text, layer) for layer in range(text.num_hidden_layers))

    def mlp_flops(self, tokens: int) -> int:
        """The matrices of the MLP, 2 T D M each, 2 T D for each number of the router, and 4 T D
        times the width of inputs per layer, for their gate and their way back.
        """
        widths = self.matrices * self.mlp + self.router + 2 * self.per_layer
        return 2 * tokens * self.hidden * widths


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
        return LatentAttention(
            hidden=text.hidden_size,
            heads=heads,
            query_rank=own.q_lora_rank,
            rank=own.kv_lora_rank,
            rotary=own.qk_rope_head_dim,
            plain=own.qk_nope_head_dim,
            value=own.v_head_dim,
        )
    head_dim = getattr(own, "head_dim", None) or text.hidden_size // heads
    # Of each head, or of each of its channels.
    gating = getattr(own, "gating", None) or getattr(own, "use_attention_gate", False)
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
        both_ways=both_ways,
    )


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


# -- the MLP


def _mlp(text: Any, layer: int, shared: bool) -> tuple[int, int]:
    """Neurons of the MLP that a token passes in a layer, and numbers that it is rated by."""
    if getattr(text, "enable_moe_block", False):  # beside an MLP, as in Gemma 4
        chosen = text.top_k_experts * text.moe_intermediate_size
        return _dense(text, shared) + chosen, text.num_experts
    active = _first(text, "num_experts_per_tok", "moe_topk")
    dense = layer in (getattr(text, "mlp_only_layers", None) or ())
    dense |= layer < (getattr(text, "first_k_dense_replace", None) or 0)
    if kinds := getattr(text, "mlp_layer_types", None):
        dense |= kinds[layer] == "dense"
    dense |= (layer + 1) % getattr(text, "decoder_sparse_step", 1) != 0
    if not active or dense:
        return _dense(text, shared), 0
    experts = _first(
        text, "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"
    )
    chosen = active + (_first(text, "n_shared_experts", "moe_num_shared_experts") or 0)
    width = _first(text, "moe_intermediate_size", "intermediate_size")
    rated = getattr(text, "shared_expert_intermediate_size", None) or 0  # with a gate of its own
    beside = rated + (getattr(text, "share_expert_dim", None) or 0)
    return chosen * width + beside, experts + (rated > 0)


def _first(config: Any, *names: str) -> Any:
    """The first of some settings that a config has."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _dense(text: Any, shared: bool) -> int:
    """Width of an MLP that all tokens pass."""
    if getattr(text, "block_auto_adjust_ff_dim", False):  # LFM2 names a width and takes another
        width = int(2 * text.intermediate_size / 3)
        if text.block_ffn_dim_multiplier is None:
            return width
        step = text.block_multiple_of
        return step * -(-int(text.block_ffn_dim_multiplier * width) // step)
    wide = shared and getattr(text, "use_double_wide_mlp", False)
    return text.intermediate_size * (2 if wide else 1)
