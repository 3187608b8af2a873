"""InfiniPot-V: which tokens of a stream stay in the cache when it is full.

Paper: Kim et al., "InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video
Understanding", arXiv:2506.15745 (NeurIPS 2025). Reference code: aiha-lab/InfiniPot-V @ 81a4dbe.
Differs from the reference: a token is compared with those that stood at its own place in recent
frames, after any number of evictions (there, by its slot's number modulo the tokens of a frame,
which is its place only before the first); the number of survivors is one of tokens, not of frames;
norms are not pooled over neighbours, which needs whole frames.

Shapes: `H` key-value heads, `N` slots with visual tokens, `d` width of a head, `C` cells of the
grid of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.ranking import top
from foveate.errors import BudgetError
from foveate.io.quoting import quoted


@dataclass(frozen=True)
class InfiniPotV:
    """Keep recent frames, then older tokens unlike recent ones, then those with large values.

    Each key-value head of each layer chooses for itself. Ties go to the older token.

    Args:
        keep: how full the cache is after an eviction, as a share of what frames may fill; the
            release goes from 32 frames to 24.
        recent: share of the frames held, the newest, that stay whole; one frame at least, even if
            it has more tokens than `keep` leaves.
        tar: share of the survivors that are recent, or least like the recent ones at their place
            (Temporal-axis Redundancy). The rest have the largest values (Value Norm).

    Raises:
        BudgetError: a share is out of range.

    Cost: O(H N d) for each layer and eviction; no attention map is needed.
    """

    keep: float = 0.75
    recent: float = 0.25
    tar: float = 0.5

    def __post_init__(self) -> None:
        for name, low in (("keep", True), ("recent", True), ("tar", False)):
            share = getattr(self, name)
            if not isinstance(share, float) or not (0.0 <= share <= 1.0) or (low and share == 0.0):
                bounds = "(0, 1]" if low else "[0, 1]"
                raise BudgetError(f"{name} must be a share in {bounds}, got {quoted(share)}")

    def recent_frames(self, held: int, frame: int) -> int:
        """How many of the newest frames stay whole.

        Args:
            held: visual tokens of a head before the eviction.
            frame: tokens of a frame.
        """
        return max(int(self.recent * (held // frame)), 1)

    def choose(
        self, keys: Tensor, values: Tensor, cells: Tensor, recent: Tensor, count: int
    ) -> Tensor:
        """Slots that survive.

        Args:
            keys: (H, N, d) as the cache holds them.
            values: (H, N, d).
            cells: (H, N) place of each token in its frame.
            recent: (H, N) which tokens are of recent frames, R in each head.
            count: how many survive, R at least and N at most.

        Returns:
            (H, count), ascending.
        """
        kept = recent.clone()
        unlike = max(round(self.tar * count) - int(recent[0].sum()), 0)
        _add_best(kept, -self.redundancy(keys, cells, recent), unlike, 1.0)
        _add_best(kept, values.float().norm(dim=-1), count - int(kept[0].sum()), None)
        return kept.nonzero()[:, 1].view(len(kept), count)

    @staticmethod
    def redundancy(keys: Tensor, cells: Tensor, recent: Tensor) -> Tensor:
        """(H, N) mean cosine of each key to those of recent frames at its place; 0 where there are
        none. Arguments as in `choose`.
        """
        unit = F.normalize(keys.float(), dim=-1)
        size = int(cells.max()) + 1
        where = cells.long()[..., None].expand_as(unit)
        total = unit.new_zeros(len(keys), size, keys.shape[-1])
        total.scatter_add_(1, where, unit * recent[..., None])
        number = unit.new_zeros(len(keys), size).scatter_add_(1, cells.long(), recent.float())
        mean = total.gather(1, where) / number.gather(1, cells.long()).clamp(min=1)[..., None]
        return (unit * mean).sum(-1)


def _add_best(kept: Tensor, scores: Tensor, count: int, scale: float | None) -> None:
    """Add to (H, N) kept slots, in place, those of the others whose scores are highest."""
    kept.scatter_(1, top(scores.masked_fill(kept, -torch.inf), count, scale), True)
