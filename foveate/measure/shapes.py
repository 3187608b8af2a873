"""The sizes of decoder layers, read from a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.errors import UnsupportedModelError
from foveate.families.family import TOKENWISE, window_of
from foveate.measure.mamba import Mamba2
from foveate.measure.mixers import (
    Attention,
    GatedDeltaNet,
    IndexedAttention,
    LatentAttention,
    Mixer,
    ShortConvolution,
    Unmixed,
)

GATED = frozenset({"qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"})
"""Text models whose query matrix makes a gate of the output too; their configs do not say so."""
GATED_APART = frozenset({"muse_glimmer_text", "muse_spark_text"})
"""Text models with a matrix of its own for such a gate; their configs do not say so either."""
UNGATED = frozenset({"cosmos3_edge_text", "nemotron_h"})
"""Text models whose MLP has no gate."""
BOTH_WAYS = frozenset({"modernbert"})
"""Text models that see what comes after a token too, as far as before; a window counts one side."""
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

    Symbols: `T` tokens, `D` hidden, `M` width of the MLP, `N` width of what its experts read.

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
        narrow: N, to which a matrix brings tokens before experts, and another back from it, as in
            Muse Spark; 0 where experts read D.
        streams: S, of states that a layer predicts and corrects, as in Gemma 3n (AltUp); 1 where
            each token has one state.
        bypass: rank of a way around the attention (LAuReL); 0 for none.
        tables: width of further embedding tables, for ids of other modalities; each token is looked
            up in all and projected.
        visual_mlp: M of visual tokens, which have experts of their own in ERNIE 4.5 VL; `None` for
            that of all.
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
    narrow: int = 0
    streams: int = 1
    bypass: int = 0
    tables: int = 0
    visual_mlp: int | None = None

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
            visual_mlp=None if not router else _visual_mlp(text, mlp),
            narrow=(getattr(text, "moe_hidden_size", None) or 0) if router else 0,
            streams=getattr(text, "altup_num_inputs", 1),
            bypass=getattr(text, "laurel_rank", 0),
            tables=_tables(config),
        )

    @classmethod
    def all(cls, config: Any) -> tuple[TextShape, ...]:
        """The sizes of every layer."""
        text = getattr(config, "text_config", config)
        return tuple(cls.of(config, layer) for layer in range(text.num_hidden_layers))

    def mlp_flops(self, tokens: int, visual: int = 0) -> int:
        """The matrices of the MLP, 2 T D M each, 2 T D for each number of the router, and 4 T D
        times the width of inputs per layer, for their gate and their way back, and times the rank
        of a bypass. Where experts read N, 2 T N M each, and 4 T D N for the way there and back.

        Args:
            tokens: T.
            visual: how many of them are visual tokens.
        """
        own = self.mlp if self.visual_mlp is None else self.visual_mlp
        neurons = (tokens - visual) * self.mlp + visual * own
        read = self.narrow or self.hidden
        widths = self.router + 2 * (self.per_layer + self.bypass + self.narrow)
        return 2 * (self.matrices * read * neurons + tokens * self.hidden * widths)

    def prediction_flops(self, tokens: int) -> int:
        """What a layer predicts of S streams before its attention: weights by a router,
        2 T (D S + S^3), and a sum of all S for each, 2 T D S^2.
        """
        if self.streams == 1:
            return 0
        routed = self.hidden * self.streams + self.streams**3
        return 2 * tokens * (routed + self.hidden * self.streams**2)

    def streams_flops(self, tokens: int) -> int:
        """The prediction, and how much each of S streams follows what attention and MLP have
        changed, 2 T (D S + S^2).
        """
        if self.streams == 1:
            return 0
        corrected = 2 * tokens * (self.hidden * self.streams + self.streams**2)
        return self.prediction_flops(tokens) + corrected

    def entry_flops(self, tokens: int) -> int:
        """Before the first layer, once: streams, and ids of other modalities, 2 T D times the width
        of their tables.
        """
        return self.joining_flops(tokens) + 2 * tokens * self.hidden * self.tables

    def joining_flops(self, tokens: int) -> int:
        """A matrix for each stream but the first, which makes it of the input embedding, or brings
        it back after the last layer: 2 T D^2 (S - 1).
        """
        return 2 * tokens * self.hidden**2 * (self.streams - 1)


def _tables(config: Any) -> int:
    """Width of embedding tables of other modalities, which configs name by their first id."""
    parts: list[Any] = [getattr(config, f"{name}_config", None) for name in ("vision", "audio")]
    return sum(part.hidden_size for part in parts if hasattr(part, "vocab_offset"))


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


# -- the MLP


def _mlp(text: Any, layer: int, shared: bool) -> tuple[int, int]:
    """Neurons of the MLP that a token passes in a layer, and numbers that it is rated by."""
    if getattr(text, "enable_moe_block", False):  # beside an MLP, as in Gemma 4
        chosen = text.top_k_experts * text.moe_intermediate_size
        return _dense(text, layer, shared) + chosen, text.num_experts
    if getattr(text, "model_type", "") == "nemotron_h":
        return _of_one_module(text, text.layer_types[layer])
    if (sparse := getattr(text, "moe_layers", None)) is not None:  # of Llama 4
        return _of_all_experts(text, layer in sparse)
    active = _first(text, "num_experts_per_tok", "moe_topk")
    dense = layer in (getattr(text, "mlp_only_layers", None) or ())
    dense |= layer < (getattr(text, "first_k_dense_replace", None) or 0)
    if kinds := getattr(text, "mlp_layer_types", None):
        dense |= kinds[layer] == "dense"
    dense |= (layer + 1) % getattr(text, "decoder_sparse_step", 1) != 0
    if not active or dense:
        return _dense(text, layer, shared), 0
    experts = _first(
        text, "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"
    )
    chosen = active + (_first(text, "n_shared_experts", "moe_num_shared_experts") or 0)
    width = _widths(text)[0]
    rated = getattr(text, "shared_expert_intermediate_size", None) or 0  # with a gate of its own
    beside = rated + (_first(text, "share_expert_dim", "shared_intermediate_size") or 0)
    return chosen * width + beside, experts + (rated > 0)


def _of_one_module(text: Any, kind: str) -> tuple[int, int]:
    """As `_mlp`, in Nemotron-H, whose layers mix tokens or are an MLP; experts may work in a latent
    space, whose way there and back counts as neurons.
    """
    if kind not in TOKENWISE:
        return 0, 0
    if kind == "mlp":
        return text.intermediate_size, 0
    shared, latent = text.moe_shared_expert_intermediate_size, text.moe_latent_size
    chosen = text.num_experts_per_tok * text.moe_intermediate_size
    if latent is not None:
        chosen = latent + chosen * latent // text.hidden_size
    return shared + chosen, text.n_routed_experts


def _of_all_experts(text: Any, sparse: bool) -> tuple[int, int]:
    """As `_mlp`, where transformers puts each token through all experts and through a shared one,
    and weights those that are not its own with zero.
    """
    if not sparse:
        return text.intermediate_size_mlp, 0
    return (text.num_local_experts + 1) * text.intermediate_size, text.num_local_experts


def _widths(text: Any) -> Sequence[int]:
    """Neurons of an expert: of all, or of one of text and of one of visual tokens."""
    width = _first(text, "moe_intermediate_size", "intermediate_size")
    return [width] if isinstance(width, int) else width


def _visual_mlp(text: Any, mlp: int) -> int | None:
    """What `_mlp` says, for visual tokens; shared experts are as wide as those of text."""
    text_width, *others = _widths(text)
    if not others:
        return None
    return mlp + text.num_experts_per_tok * (others[0] - text_width)


def _first(config: Any, *names: str) -> Any:
    """The first of some settings that a config has."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _dense(text: Any, layer: int, shared: bool) -> int:
    """Width of an MLP that all tokens pass."""
    if getattr(text, "block_auto_adjust_ff_dim", False):  # LFM2 names a width and takes another
        width = int(2 * text.intermediate_size / 3)
        if text.block_ffn_dim_multiplier is None:
            return width
        step = text.block_multiple_of
        return step * -(-int(text.block_ffn_dim_multiplier * width) // step)
    wide = shared and getattr(text, "use_double_wide_mlp", False)
    # Of all layers in Gemma 3n; where experts have the plain name, an MLP for all has another.
    width = _first(text, "dense_intermediate_size", "intermediate_size")
    return (width[layer] if isinstance(width, list) else width) * (2 if wide else 1)
