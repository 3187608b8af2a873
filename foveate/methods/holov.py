"""HoloV: a budget for each part of the image, and within it what the encoder attends to.

Paper: Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic
Context Retention", arXiv:2510.02912 (NeurIPS 2025). Reference code: obananas/HoloV @ 1d2e65e, its
LLaVA form. There the score of a run adds to attention 0.09 times the variance of cosines, scaled
to have the attention's mean in the same run: every score becomes 1.09 times the mean attention, and
quotas follow attention alone. So nothing is computed of cosines here; recorded choices are equal.
Differs from the reference: any batch works, and all tiles of an image are one sequence, with a
budget of its own; survivors stay in raster order (there: in order of attention within a run that is
cut); what a run's quota has above its tokens goes to other runs in proportion (there: zero vectors
fill up the budget); without a class token, which the release needs, attention received counts;
newlines between tiles come last in their run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import (
    Keep,
    Positions,
    Reduction,
    VisualTokens,
    register,
)
from foveate.core.fields import Positive
from foveate.core.ranking import TIE, marked, ranked
from foveate.ops.saliency import Salient, saliency


@register(
    "holov",
    stage="pre_llm",
    does="budget for each image part",
    needs=("cls_attention", "received_attention"),
    paper="Zou et al. 2025, arXiv:2510.02912",
)
@dataclass(frozen=True)
class HoloV(Salient):
    """Cut an image into runs of consecutive tokens; each keeps its share of the budget.

    A run's share is that of its mean attention among those of all runs. Attention is the class
    token's in the layer that is read; without a class token, attention received there.

    Args:
        keep: what survives; a count is the release's `new_image_token_num`. Shares are rounded half
            to even.
        num_patches: runs of an image, equally long, the first ones by one token more if need be.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: one row of attention (all rows without a class token), and two sorts.
    """

    keep: Keep = 64
    num_patches: Positive = 16
    positions: Positions | None = None

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep each run's most attended tokens, `count` in all, in raster order."""
        seen = saliency(tokens)
        images, total = seen.shape
        runs = min(self.num_patches, total)
        size = torch.full((runs,), total // runs, device=seen.device)
        size[: total % runs] += 1
        run = torch.arange(runs, device=seen.device).repeat_interleave(size, output_size=total)
        sums = seen.new_zeros(images, runs).index_add_(1, run, seen.clamp(min=0))
        quota = quotas(sums / size, size, count)
        order = ranked(seen)
        order = order.gather(1, run[order].argsort(dim=-1, stable=True))  # run by run
        rank = torch.arange(total, device=seen.device) - (size.cumsum(0) - size)[run]
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, rank < quota[:, run])
        return Reduction(marked(kept, count))


def quotas(weight: Tensor, size: Tensor, count: int) -> Tensor:
    """Divide a budget: each run gets its share rounded down, and the heaviest ones get one more.

    What is above the size of a run is divided again among those that have room.

    Args:
        weight: (G, R) weight of each run, not negative.
        size: (R) most that each can get.
        count: the budget, at most the sum of sizes.

    Returns:
        (G, R) integers whose sum is the budget.
    """
    tiny = torch.finfo(weight.dtype).tiny
    weight = weight + tiny  # so that runs without any have equal shares
    order = ranked(weight)
    given = torch.zeros_like(weight, dtype=torch.long)
    for _ in size:  # each time the budget is spent, or a run is full
        left, room = count - given.sum(1, keepdim=True), size - given
        # Elsewhere than here, looking would hold up the device.
        if left.device.type == "cpu" and not bool(left.any()):
            break
        share = torch.where(room > 0, weight, 0.0)
        share = share / share.sum(1, keepdim=True).clamp(min=tiny) * left
        more = (share + TIE * count).floor().long()
        first = (room > 0).gather(1, order)
        first &= first.cumsum(1) <= left - more.sum(1, keepdim=True)
        more += torch.zeros_like(first).scatter(1, order, first)
        given += torch.minimum(more, room)
    return given
