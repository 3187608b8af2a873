"""FastV: drop the visual tokens that receive little attention in an early decoder layer.

Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference
Acceleration for Large Vision-Language Models", arXiv:2403.06764, section 4.
Reference code: pkunlp-icler/FastV @ d165972, the Hugging Face integration.
Differs from the reference: any batch, several images and any attention kernel work; each image has
its own budget; at least one token of an image survives. With `use_cache=False` the selection is
made anew at each generated token, as there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.core import Keep, ModelFacts, Need, Positions, Scorer, Step, VisualTokens, register
from foveate.core.fields import Positive
from foveate.core.schedule import moved, ranked_before
from foveate.errors import LayerError
from foveate.io.quoting import quoted

PUBLISHED_LAYER = 2


@register(
    "fastv",
    stage="llm",
    does="one early cut by attention",
    needs=("text_attention",),
    paper="Chen et al. 2024, arXiv:2403.06764",
)
@dataclass(frozen=True)
class FastV(Scorer):
    """Rank visual tokens by the last token's attention in layer `layer - 1`.

    Args:
        layer: K of the paper: layers 0 to K-1 see all tokens, tokens are dropped before layer K.
            `None` is the published 2, or the nearest layer to it after one whose attention can rank
            tokens.
        keep: what survives, 1 - R of the paper; shares are rounded half to even, as in the
            reference.
        positions: `None` leaves survivors at their positions (`original`), as the reference does;
            `renumbered` makes them consecutive.

    Cost: one key projection of all tokens and one query row; no attention map.
    """

    layer: Positive | None = None
    keep: Keep = 0.5
    positions: Positions | None = None
    published_positions = "original"
    rounding = round

    def check_fields(self) -> None:
        """As in `Method`; `layer` is 1 at least.

        Raises:
            LayerError: `layer` is below 1; the paper's K=0 is a random choice, see the method
            `random`.
            FoveateError: another field does not fit its annotation.
        """
        if isinstance(self.layer, int) and self.layer < 1:
            raise LayerError(
                f"FastV scores tokens in layer - 1, so layer must be at least 1, got "
                f"{quoted(self.layer)}; "
                "for a random choice at the input use the method 'random'"
            )
        super().check_fields()

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One drop before `layer`, scored with the weights of the layer before it."""
        layer = self._published(model) if self.layer is None else self.layer
        return (Step("llm", layer, (Need("text_attention", (layer - 1,)),)),)

    def note_on(self, model: ModelFacts) -> str:
        """That the default layer is not the paper's, where it is not."""
        if self.layer is not None or (layer := self._published(model)) == PUBLISHED_LAYER:
            return super().note_on(model)
        return moved(PUBLISHED_LAYER, layer, model)

    def _published(self, model: ModelFacts) -> int:
        return ranked_before(PUBLISHED_LAYER, model, self.slug)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Attention of the last token, averaged over heads: (G, V)."""
        return tokens.signal("text_attention")[:, 0].mean(1)
