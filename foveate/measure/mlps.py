"""The MLPs of decoder layers: how wide they are, and what they cost.

Symbols: `T` tokens, `D` hidden, `M` neurons that a token passes, `N` width of what experts read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.families.text_facts import TOKENWISE

UNGATED = frozenset({"apertus1p5_text", "cosmos3_edge_text", "nemotron_h"})
"""Text models whose MLP has no gate."""


@dataclass(frozen=True)
class Mlp:
    """The MLP of a decoder layer, or its mixture of experts.

    Args:
        hidden: D.
        neurons: M; of a mixture, those of the experts of a token and of shared ones.
        router: numbers that a token is rated by: one for each expert in choice, and one if there is
            a gate of shared ones; 0 without a mixture.
        matrices: gate, up and down, or two where there is no gate.
        narrow: N, to which a matrix brings tokens before experts, and another back from it, as in
            Muse Spark; 0 where experts read D.
        visual: M of visual tokens, which have experts of their own in ERNIE 4.5 VL; `None` for that
            of all.
    """

    hidden: int
    neurons: int
    router: int = 0
    matrices: int = 3
    narrow: int = 0
    visual: int | None = None

    @classmethod
    def of(cls, text: Any, layer: int, *, shared: bool = False) -> Mlp:
        """Read the sizes from a text config.

        Args:
            text: the config.
            layer: the decoder layer.
            shared: whether the layer reads the keys of an earlier one.
        """
        neurons, router = _neurons(text, layer, shared)
        return cls(
            hidden=text.hidden_size,
            neurons=neurons,
            router=router,
            matrices=2 if getattr(text, "model_type", "") in UNGATED else 3,
            narrow=(getattr(text, "moe_hidden_size", None) or 0) if router else 0,
            visual=_visual(text, neurons) if router else None,
        )

    @property
    def read(self) -> int:
        """Width of what the neurons read: D, or N."""
        return self.narrow or self.hidden

    @property
    def of_visual(self) -> int:
        """Neurons that a visual token passes."""
        return self.neurons if self.visual is None else self.visual

    def flops(self, tokens: int, visual: int = 0) -> int:
        """The matrices, 2 T D M each, and 2 T D for each number of the router. Where experts read
        N, 2 T N M each, and 4 T D N for the way there and back.

        Args:
            tokens: T.
            visual: how many of them are visual tokens.
        """
        neurons = (tokens - visual) * self.neurons + visual * self.of_visual
        beside = tokens * self.hidden * (self.router + 2 * self.narrow)
        return 2 * (self.matrices * self.read * neurons + beside)


def _neurons(text: Any, layer: int, shared: bool) -> tuple[int, int]:
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
    """As `_neurons`, in Nemotron-H, whose layers mix tokens or are an MLP; experts may work in a
    latent space, whose way there and back counts as neurons.
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
    """As `_neurons`, where transformers puts each token through all experts and through a shared
    one, and weights those that are not its own with zero.
    """
    if not sparse:
        return text.intermediate_size_mlp, 0
    return (text.num_local_experts + 1) * text.intermediate_size, text.num_local_experts


def _widths(text: Any) -> Sequence[int]:
    """Neurons of an expert: of all, or of one of text and of one of visual tokens."""
    width = _first(text, "moe_intermediate_size", "intermediate_size")
    return [width] if isinstance(width, int) else width


def _visual(text: Any, neurons: int) -> int | None:
    """What `_neurons` says, for visual tokens; shared experts are as wide as those of text."""
    text_width, *others = _widths(text)
    if not others:
        return None
    return neurons + text.num_experts_per_tok * (others[0] - text_width)


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
