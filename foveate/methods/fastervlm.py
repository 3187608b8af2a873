"""FasterVLM: keep the tokens that the class token attends to in the layer the model sees.

Paper: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make
VLM Inference Faster", arXiv:2412.01818v1. Reference code: Theia-4869/FasterVLM @ f5d5f12.
Differs from the reference: `keep` may be a share, rounded as the README's counts are (58 for 10 %
of 576, 29 for 5 %); only the class token's attention row is computed; where a model puts tiles
together (LLaVA-NeXT), one choice is made among all tokens of an image (there: one in each crop);
what becomes of the newline tokens of tiled images is the model's affair, where the release removes
them even when nothing is pruned.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.core import Keep, ModelFacts, Need, Positions, Scorer, Step, VisualTokens, register


@register(
    "fastervlm",
    stage="pre_llm",
    does="keeps what [CLS] attends to",
    needs=("cls_attention",),
    paper="Zhang et al. 2024, arXiv:2412.01818v1",
)
@dataclass(frozen=True)
class FasterVLM(Scorer):
    """Rank visual tokens by class-token attention in the encoder layer that LLaVA reads.

    Args:
        keep: what survives, 1 - R of the paper; a count is the release's `visual_token_num`.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.

    Cost: one query row of attention in one layer; no attention map.
    """

    keep: Keep = 0.25
    positions: Positions | None = None
    rounding = round

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector, scored in the feature layer."""
        return (Step("pre_llm", needs=(Need("cls_attention", (model.feature_layer,)),)),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Class-token attention averaged over heads: (G, V)."""
        return tokens.signal("cls_attention")[:, 0].float().mean(1)
