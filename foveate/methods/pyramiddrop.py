"""PyramidDrop: drop part of the visual tokens at the end of each stage of the language model.

Paper: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction", arXiv:2410.17247, section 3. Reference code: Cooperx521/PyramidDrop @ 6444f30
(inference path).
Differs from the reference: any batch, several images, grouped-query attention and padding work
(there they do not); each image has its own budget; at least one token of an image survives; no
truncation to the tokenizer's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from foveate.budget import Keep, steps_in
from foveate.errors import LayerError
from foveate.method import ModelFacts, Need, Positions, Scorer, Step, register
from foveate.tokens import VisualTokens


@register(
    "pyramiddrop",
    stage="llm",
    needs=("text_attention",),
    paper="Xing et al. 2024, arXiv:2410.17247",
)
@dataclass(frozen=True)
class PyramidDrop(Scorer):
    """Rank visual tokens by the attention of the last prompt token, stage by stage.

    Args:
        layers: decoder layers before which tokens are dropped, ascending. `None` divides the model
            at hand into equal stages, which is the published (8, 16, 24) on 32 layers; where a
            layer sees only a window of the sequence, the nearest one that sees all takes its place.
        keep: what survives each drop, as a share of the ORIGINAL count of each image (paper:
            lambda = 0.5 to the power of the stage), or a count. Shares are truncated, as in the
            reference.
        positions: `None` gives survivors consecutive positions (`renumbered`) after every drop, as
            the reference does, where positions are single numbers; `original` leaves them where
            they were.

    Cost: one key projection of all tokens and one query row per drop; no attention map.
    """

    layers: tuple[int, ...] | None = None
    keep: Keep = (0.5, 0.25, 0.125)
    positions: Positions | None = None
    rounding = math.trunc

    def __post_init__(self) -> None:
        """Check budgets and layers.

        Raises:
            BudgetError: `keep` is out of range, or its length differs from that of `layers`.
            LayerError: `layers` is not ascending.
        """
        super().__post_init__()
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise LayerError(f"layers must be ascending and distinct, got {self.layers}")

    @property
    def step_count(self) -> int | None:
        """One step per entry of `layers`; with `layers=None`, one per entry of `keep`."""
        return None if self.layers is None else len(self.layers)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A drop before each of the layers, scored with that layer's own weights."""
        layers = self.layers or self._equal_stages(model)
        return tuple(Step("llm", layer, (Need("text_attention", (layer,)),)) for layer in layers)

    def _equal_stages(self, model: ModelFacts) -> tuple[int, ...]:
        """Stage boundaries, each moved to the nearest layer whose attention can rank tokens."""
        drops = steps_in(self.keep)
        legal = [i for i in model.attention_layers if i >= model.first_llm_layer]
        chosen: list[int] = []
        for i in range(drops):
            even = model.text_layers * (i + 1) // (drops + 1)
            free = [layer for layer in legal if layer not in chosen]
            if not free:
                raise LayerError(
                    f"PyramidDrop has {drops} drops, but only {len(legal)} layers of this model "
                    f"can rank tokens; give a keep with {len(legal)} entries at most"
                )
            chosen.append(min(free, key=lambda layer: abs(layer - even)))
        return tuple(sorted(chosen))

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Attention of the last prompt token, averaged over heads: (G, V)."""
        return tokens.signal("text_attention")[:, 0].mean(1)
