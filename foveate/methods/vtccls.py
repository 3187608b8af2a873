"""VTC-CLS: keep the tokens that the vision encoder's class token attends to, over several layers.

Paper: Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
arXiv:2412.05819. Reference code: THU-MIG/VTC-CLS @ e41ac9b.
Differs from the reference: any batch and several images work, each ranked on its own; only the
class token's attention row is computed, not the maps; `layers=None` scales the release's default
start (16 of 24 layers) to the encoder at hand; a start outside the encoder is an error, not a
clipped slice.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.core import Keep, ModelFacts, Need, Positions, Scorer, Step, VisualTokens, register
from foveate.errors import LayerError
from foveate.io.quoting import quoted


@register(
    "vtc-cls",
    stage="pre_llm",
    does="[CLS] attention of several layers",
    needs=("cls_attention",),
    paper="Wang et al. 2024, arXiv:2412.05819",
)
@dataclass(frozen=True)
class VTCCLS(Scorer):
    """Rank visual tokens by class-token attention, summed over late encoder layers.

    Args:
        keep: what survives; a count is the release's `token_num`. Its default is 36 tokens.
        layers: encoder layers whose attention is summed. An int is the first layer of a range that
            ends with the layer the language model sees (the release's `start_layer`; negative
            counts from the end, and -2 is that one layer on LLaVA). A tuple is exactly these
            layers. `None` starts at two thirds of the encoder's depth.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.

    Cost: one query row of attention in each layer; no attention map.
    """

    keep: Keep = 36
    layers: int | tuple[int, ...] | None = None
    positions: Positions | None = None

    def check_fields(self) -> None:
        """As in `Method`; `layers` is a tuple rather than a list, and names no layer twice.

        Raises:
            LayerError: it is not.
            FoveateError: another field does not fit its annotation.
        """
        if isinstance(self.layers, list):
            raise LayerError(
                f"layers must be an int, a tuple of ints or None, got {quoted(self.layers)}"
            )
        super().check_fields()
        if isinstance(self.layers, tuple) and not 0 < len(self.layers) == len(set(self.layers)):
            raise LayerError(f"layers must be distinct, got {quoted(self.layers)} in vtc-cls")

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector.

        Raises:
            LayerError: a layer lies outside the encoder, or the range is empty.
        """
        return (Step("pre_llm", needs=(Need("cls_attention", self._encoder_layers(model)),)),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Class-token attention, head mean, summed over the layers: (G, V)."""
        return tokens.signal("cls_attention").float().mean(2).sum(1)

    def _encoder_layers(self, model: ModelFacts) -> tuple[int, ...]:
        depth, last = model.vision_layers, model.feature_layer
        if isinstance(self.layers, tuple):
            layers = tuple(_inside(layer, depth) for layer in self.layers)
            if len(set(layers)) < len(layers):
                raise LayerError(
                    f"layers={self.layers} names a layer twice in an encoder of {depth} layers"
                )
            return tuple(sorted(layers))
        if self.layers is None:
            start = min(2 * depth // 3, last)
        else:
            start = _inside(self.layers, depth)
        if start > last:
            raise LayerError(
                f"layers={self.layers} starts after layer {last}, the last one that the language "
                f"model sees of the encoder's {depth} layers; start at {last} or before, or name "
                "the layers in a tuple"
            )
        return tuple(range(start, last + 1))


def _inside(layer: int, depth: int) -> int:
    if not -depth <= layer < depth:
        raise LayerError(
            f"vtc-cls asks for layer {layer}, but the vision encoder has {depth} layers; "
            f"use {-depth} to {depth - 1}"
        )
    return layer % depth
