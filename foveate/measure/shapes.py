"""The sizes of decoder layers, read from a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.families.family import window_of
from foveate.measure.mixers import Attention, Mixer


@dataclass(frozen=True)
class TextShape:
    """The sizes of a decoder layer: what mixes its tokens, and an MLP of three matrices.

    Symbols: `T` tokens, `D` hidden, `M` width of the MLP.

    Args:
        layers: L, of the whole decoder.
        hidden: D.
        mixer: what mixes the tokens.
        mlp: M, the neurons that a token passes: of a mixture, those of its experts.
        vocabulary: tokens of the language-model head.
        router: experts that a token is rated for; 0 without a mixture.
    """

    layers: int
    hidden: int
    mixer: Mixer
    mlp: int
    vocabulary: int
    router: int = 0

    @classmethod
    def of(cls, config: Any, layer: int = 0) -> TextShape:
        """Read the sizes from a text config, or from the `text_config` of a multimodal one.

        Args:
            config: the config.
            layer: the decoder layer; they may differ in MLP and window.
        """
        text = getattr(config, "text_config", config)
        mlp, router = _mlp(text, layer)
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            mixer=_mixer(text, layer),
            mlp=mlp,
            vocabulary=text.vocab_size,
            router=router,
        )

    @classmethod
    def all(cls, config: Any) -> tuple[TextShape, ...]:
        """The sizes of every layer."""
        text = getattr(config, "text_config", config)
        return tuple(cls.of(text, layer) for layer in range(text.num_hidden_layers))

    def mlp_flops(self, tokens: int) -> int:
        """Gate, up and down matrices, 6 T D M, and 2 T D for each expert in choice."""
        return 2 * tokens * self.hidden * (3 * self.mlp + self.router)


def _mixer(text: Any, layer: int) -> Mixer:
    heads = text.num_attention_heads
    return Attention(
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        window=window_of(text, layer),
    )


def _mlp(text: Any, layer: int) -> tuple[int, int]:
    """Neurons of the MLP that a token passes in a layer, and experts that it is rated for."""
    active = getattr(text, "num_experts_per_tok", None)
    dense = layer in (getattr(text, "mlp_only_layers", None) or ())
    dense |= layer < getattr(text, "first_k_dense_replace", 0)
    dense |= (layer + 1) % getattr(text, "decoder_sparse_step", 1) != 0
    if not active or dense:
        return text.intermediate_size, 0
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    experts = next(n for name in names if (n := getattr(text, name, None)))
    return (active + getattr(text, "n_shared_experts", 0)) * text.moe_intermediate_size, experts
