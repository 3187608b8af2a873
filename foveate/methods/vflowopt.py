"""VFlowOpt: prune in three steps by one score of the vision encoder; recycle what goes first.

Paper: Yang et al., "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information
Flow-Guided Optimization", arXiv:2508.05211. Reference code: sihany077/VFlowOpt @ 129eeef.
Differs from the reference: any batch works; every image and video is recycled on its own (there:
one image, and a plain choice for several images and videos); patch entropy is left out of the
score, because its weight is zero in all published strategies and the release takes it from
wrapped-around pixel values; without a query that counts as global all queries count (there: the
mean of an empty set, NaN); every layer is causal (there: not the one before the first drop in the
language model); `keep=1.0` recycles nothing; layers given as `None` scale to the model at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from foveate.core import (
    Adaptive,
    Keep,
    ModelFacts,
    Need,
    PerRequest,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    by_count,
    register,
)
from foveate.core.fields import Natural, Range
from foveate.core.transfer import members_of
from foveate.errors import BudgetError, LayerError
from foveate.io.quoting import quoted
from foveate.ops.cell_merging import cells, merged, pool_size, recycle, tile_coordinates

STRATEGIES: dict[float, dict[str, Any]] = {
    0.5: {"keep": (0.7233, 0.7233 * 0.7487, 0.7233 * 0.7487 * 0.487), "threshold": 28.683,
          "cell": 11.757},
    0.25: {"keep": (0.2651, 0.2651 * 0.9833, 0.2651 * 0.9833 * 0.8773), "threshold": 34.76,
           "cell": 15.581},
    0.1: {"keep": (0.1166, 0.1166, 0.1166 * 0.6011), "threshold": 39.265, "cell": 17.387},
}  # fmt: skip
"""Published strategies by average share of tokens, for LLaVA-OneVision-7B: `VFlowOpt(**...)`."""


@register(
    "vflowopt",
    stage="pre_llm",
    does="three cuts with calibrated budgets",
    needs=("global_attention",),
    paper="Yang et al. 2025, arXiv:2508.05211",
)
@dataclass(frozen=True)
class VFlowOpt(Adaptive):
    """Rank by the attention that global patches pay; merge cells of what goes first, then drop.

    The first step, after the projector, takes the lowest ranked tokens of each image out; those of
    one cell of the grid become one token, their mean weighted by score, where the best of them
    stood. Two more steps, in the language model, drop the lowest ranked by the same score.

    Args:
        keep: share of the original count that each of the three steps leaves. The published rho,
            q1 and q2 are `(rho, rho * q1, rho * q1 * q2)`, and the default those for a quarter; a
            single share is that of the first step, and the others drop nothing. As in the release,
            the first step leaves only about its share: cells bring tokens back, and for them as
            many go as the image has cells.
        threshold: t, an encoder patch is global if it receives more than t times the mean
            attention; only global patches vote.
        cell: m, side of a cell in tokens, at least 1; need not be whole.
        layers: the two decoder layers before which tokens are dropped. `None` scales the published
            9 and 18 of 28 layers to the model at hand.
        positions: `None` leaves survivors at their positions (`original`), as the reference does;
            `renumbered` makes them consecutive.

    Cost: the attention of one encoder layer, summed up in chunks.
    """

    keep: Keep = STRATEGIES[0.25]["keep"]
    threshold: Annotated[float, Range(0)] = STRATEGIES[0.25]["threshold"]
    cell: Annotated[float, Range(1)] = STRATEGIES[0.25]["cell"]
    layers: tuple[Natural, ...] | None = None
    positions: Positions | None = None
    published_positions = "original"

    def check_fields(self) -> None:
        """As in `Method`; `layers` are two.

        Raises:
            LayerError: they are not, or do not ascend.
            FoveateError: another field does not fit its annotation.
        """
        super().check_fields()
        if self.layers is not None and not (
            len(self.layers) == 2 and self.layers == tuple(sorted(set(self.layers)))
        ):
            raise LayerError(
                f"layers must be two, ascending, got {quoted(self.layers)} in vflowopt"
            )

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`: a share for all steps, or one for each.

        Raises:
            BudgetError: it is something else.
        """
        super().check_budget(3 if isinstance(self.keep, tuple) else None)
        if isinstance(self.keep, PerRequest) or not all(
            isinstance(share, float) for share in self._shares
        ):
            raise BudgetError(
                "vflowopt counts from what recycling leaves, so keep is a share in (0, 1] or three "
                f"of them, got {quoted(self.keep)}"
            )

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.keep if isinstance(self.keep, tuple) else (self.keep,) * 3  # type: ignore[return-value]

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One step after the projector, two between decoder layers."""
        scored = Need("global_attention", (model.feature_layer,), global_threshold=self.threshold)
        first, second = self.layers or self.published_layers(model)
        recycled = Step("pre_llm", needs=(scored,), merges=True)
        return recycled, Step("llm", first), Step("llm", second)

    def published_layers(self, model: ModelFacts) -> tuple[int, int]:
        """The published decoder layers before which tokens are dropped, scaled to a model."""
        lowest = model.first_llm_layer
        first = max(9 * model.text_layers // 28, lowest)
        return first, min(max(18 * model.text_layers // 28, first + 1), model.last_llm_layer)

    def reduce_each(self, tokens: VisualTokens) -> list[tuple[tuple[int, ...], Reduction]]:
        """Recycle after the projector; drop by the same scores in the language model."""
        if tokens.number == 0:
            return self._recycle(tokens)
        scores = tokens.label
        assert scores is not None  # the first step has left them
        before, after = self._shares[tokens.number - 1 : tokens.number + 1]
        # As `keep` holds products, only digits that survive their rounding count.
        dropped = round(tokens.count * (1 - round(after / before, 12)))
        return [(tuple(range(len(scores))), Reduction.top(scores, max(tokens.count - dropped, 1)))]

    def _recycle(self, tokens: VisualTokens) -> list[tuple[tuple[int, ...], Reduction]]:
        scores = tokens.signal("global_attention")[:, 0]
        newline = scores == -torch.inf
        scores = scores.masked_fill(newline, 1.0)  # which keeps them, as in the release
        pool = pool_size(tokens.count, self._shares[0], self.cell)
        into, mass = recycle(scores, cells(tile_coordinates(tokens, newline), self.cell), pool)
        stays = into == torch.arange(tokens.count, device=into.device)
        parts = []
        for count, members in by_count(stays.sum(1)).items():
            reduction = merged(members_of(into, members), members_of(mass, members), count)
            label = members_of(scores, members).gather(1, reduction.index)
            parts.append((tuple(members), replace(reduction, label=label)))
        return parts
