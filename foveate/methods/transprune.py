"""TransPrune: keep the visual tokens that layers change most and that the instruction looks at.

Paper: Li et al., "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
arXiv:2507.20630 (token transition variation, and instruction-guided attention). Reference code:
liaolea/TransPrune @ c9e8284.
Differs from the reference: any batch, several images, grouped-query attention and padding work
(there they do not); the direction term is normalised over a row of the batch, padding excluded
(there: over all rows together); decoding does not compute variations that nobody reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from foveate.core import (
    Keep,
    ModelFacts,
    Need,
    Positions,
    Scheduled,
    Scorer,
    Step,
    VisualTokens,
    register,
)
from foveate.core.fields import Natural, check_ascending
from foveate.core.schedule import Drop
from foveate.errors import LayerError
from foveate.io.quoting import quoted


@register(
    "transprune",
    stage="llm",
    does="keeps what layers change most",
    needs=("transition", "question_attention"),
    paper="Li et al. 2025, arXiv:2507.20630",
)
@dataclass(frozen=True)
class TransPrune(Scheduled, Scorer):
    """Rank visual tokens by their transitions so far plus the attention of the text after them.

    Both parts are scaled to sum to one over an image's tokens, and weigh alike.

    Args:
        layers: decoder layers before which tokens are dropped, ascending, from 1. `None` scales the
            published (7, 9, 12) of 32 layers to the model at hand; where a layer sees only a
            window of the sequence, the nearest one that sees all takes its place.
        keep: what survives each drop, as a share of the ORIGINAL count of each image, or a count.
            Shares are truncated, as in the reference. One number is the mean over the layers from
            the first drop on.
        accumulate: decoder layers whose transitions add up, 0-based, ascending (the release counts
            from 1); a drop sums those before it. `None` takes all from the layer before the first
            drop to that before the last, as published.
        positions: `None` gives survivors consecutive positions (`renumbered`) after every drop, as
            the reference does, where positions are single numbers; `original` leaves them where
            they were.

    Cost: per drop, one key projection of all tokens and a query row for each text token after the
    image; per accumulated layer, two norms and one inner product of every token's input and output.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = (0.875, 0.625, 0.125)
    accumulate: tuple[Natural, ...] | None = None
    positions: Positions | None = None
    rounding = math.trunc
    published_layers = (7, 9, 12)
    first_drop = 1

    def check_fields(self) -> None:
        """As in `Scheduled`; `accumulate` ascends.

        Raises:
            LayerError: `layers` or `accumulate` do not ascend, or `layers` begins too early.
            FoveateError: another field does not fit its annotation.
        """
        super().check_fields()
        check_ascending(self.accumulate, "accumulate")

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A drop before each of the layers.

        Raises:
            LayerError: no accumulated layer precedes the first drop.
        """
        drops = self.drops(model)
        summed = self.accumulate
        if summed is None:
            summed = tuple(range(drops[0][0] - 1, drops[-1][0]))
        if summed[0] >= drops[0][0]:
            raise LayerError(
                f"accumulate must begin before the first drop, which is before layer "
                f"{drops[0][0]}, got {quoted(summed)} in transprune"
            )
        curve = self.curve(model, drops)
        return tuple(
            Drop("llm", layer, self._needs(layer, summed), entry=entry, curve=curve)
            for layer, entry in drops
        )

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Share of the image's transitions plus share of its attention: (G, V)."""
        changed = tokens.signal("transition").sum(1)
        query_tokens = tokens.signal("question_mask").sum(1).clamp(min=1)
        seen = tokens.signal("question_attention")[:, 0].mean(1).sum(1) / query_tokens[:, None]
        return _share(changed) + _share(seen)

    def _needs(self, layer: int, summed: tuple[int, ...]) -> tuple[Need, ...]:
        before = tuple(i for i in summed if i < layer)
        return Need("transition", before), Need("question_attention", (layer,))


def _share(x: Tensor) -> Tensor:
    return x / (x.sum(-1, keepdim=True) + 1e-8)
