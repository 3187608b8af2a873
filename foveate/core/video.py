"""Videos: methods that compare frames, and what they share.

Shapes: `G` videos of equal size, `T` frames of a video, `P` tokens of a frame, `V` = T * P,
`K` kept, `D` hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.method import Adaptive
from foveate.core.reduction import Reduction
from foveate.core.step import ModelFacts, Need, Step
from foveate.core.tokens import VisualTokens
from foveate.errors import BudgetError, InputError
from foveate.io.quoting import quoted

Parts = list[tuple[tuple[int, ...], Reduction]]


class VideoMethod(Adaptive):
    """A method that works on the whole frames of videos, before the language model.

    Images pass untouched, and so do tokens after the last frame of a video, such as a newline.
    `merges` says whether a survivor is made of several tokens, `first_whole` whether all of the
    first frame stay, whatever the budget.
    """

    merges: ClassVar[bool] = True
    first_whole: ClassVar[bool] = False

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; what it needs is of the layer that the model sees."""
        layer = (model.feature_layer,)
        needs = tuple(Need(name, layer) for name in self.needs)
        return (Step("pre_llm", needs=needs, whole=True, merges=self.merges),)

    def reduce_each(self, tokens: VisualTokens) -> Parts:
        """Reduce videos; members of the group and their reduction, parts of equal counts.

        Raises:
            InputError: tokens are missing from the frames.
        """
        if tokens.frames == 1 or (isinstance(self.keep, float) and self.keep == 1.0):
            return everything(tokens)
        cells = tokens.frames * prod(tokens.grid)
        if tokens.count < cells or bool((tokens.index[:, -1] != tokens.count - 1).any()):
            raise InputError(
                f"{self.slug} compares whole frames, but tokens are missing from the "
                f"{tokens.frames} frames of {tokens.grid[0]} x {tokens.grid[1]} of a video; put it "
                "before methods that remove tokens"
            )
        rest = tokens.count - cells
        return [
            (members, _with_rest(reduction, cells, rest))
            for members, reduction in self.reduce_videos(tokens)
        ]

    @abstractmethod
    def reduce_videos(self, tokens: VisualTokens) -> Parts:
        """As `reduce_each`, for videos of which no token is missing; tokens after the last frame
        are not the method's business.
        """


class Survivors:
    """The survivors of one video, collected in their order.

    Args:
        total: tokens of the video, V.
        device: where they live.
    """

    def __init__(self, total: int, device: torch.device) -> None:
        self._index: list[Tensor] = []
        self._count = self._sets = 0
        self._labels: list[Tensor] = []
        self._slot = torch.full((total,), -1, device=device)
        self._share = torch.zeros(total, device=device)

    def keep(self, index: Tensor) -> None:
        """Tokens that survive as they are.

        Args:
            index: (K) their positions.
        """
        self.merge(index, index, torch.arange(len(index), device=index.device))

    def merge(
        self, index: Tensor, members: Tensor, joined: Tensor, share: Tensor | float = 1.0
    ) -> None:
        """Tokens that become survivors together.

        Args:
            index: (K) position at which each survivor stands.
            members: (N) positions of the tokens.
            joined: (N) which of the K survivors each goes into.
            share: (N) its weight there; those of a survivor sum to one.
        """
        self._slot[members] = joined + self._count
        self._share[members] = share
        self._index.append(index)
        self._count += len(index)

    def average(self, index: Tensor, members: Tensor, joined: Tensor, sets: int) -> None:
        """Tokens that become survivors in equal parts.

        Args:
            index: (K) position at which each survivor stands.
            members: (N) positions of the tokens.
            joined: (N) which of the K survivors each goes into.
            sets: equally large sets of survivors, one after the other, of which later steps are
                told by number.
        """
        numbers = torch.arange(self._sets, self._sets + sets, device=index.device)
        self._labels.append(numbers.repeat_interleave(len(index) // sets))
        self._sets += sets
        counts = torch.zeros(len(index), device=index.device)
        counts = counts.scatter_add(0, joined, torch.ones_like(joined, dtype=counts.dtype))
        self.merge(index, members, joined, 1 / counts[joined])

    def reduction(self) -> Reduction:
        """The reduction of the video, G = 1."""
        return Reduction(
            torch.cat(self._index)[None],
            slot=self._slot[None],
            share=self._share[None],
            ordered=True,
            label=torch.cat(self._labels)[None] if self._labels else None,
        )


def everything(tokens: VisualTokens) -> Parts:
    """The parts of a group of which nothing is removed."""
    images, count = tokens.index.shape
    index = torch.arange(count, device=tokens.index.device).expand(images, -1)
    return [(tuple(range(images)), Reduction(index))]


def by_frame(values: Tensor, tokens: VisualTokens) -> Tensor:
    """(G, V, ...) values of tokens as (G, T, P, ...), without those after the last frame."""
    cells = prod(tokens.grid)
    return values[:, : tokens.frames * cells].unflatten(1, (tokens.frames, cells))


def exact(x: Tensor) -> Tensor:
    """Values to decide with: no gradient, float32 at least."""
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the last axes; tokens of zero length are orthogonal to all."""
    return F.cosine_similarity(x, y, dim=-1)


def normalize(x: Tensor) -> Tensor:
    """Rows of unit length; rows of zero length stay zero."""
    return F.normalize(x, dim=-1, eps=1e-12)


def check_switch(slug: str, keep: object) -> None:
    """Check the `keep` of a method that finds out from a video how much survives.

    Raises:
        BudgetError: it is neither `None` nor 1.0, which removes nothing.
    """
    if keep is not None and not (type(keep) is float and keep == 1.0):
        raise BudgetError(
            f"{slug} cannot be given a budget, as the video decides; leave keep=None, or 1.0 to "
            f"remove nothing, got {quoted(keep)}"
        )


def check_one_share(keep: object) -> None:
    """Check the `keep` of a method that aims at a share of a video, and cannot promise a count.

    Raises:
        BudgetError: it is no share.
    """
    if not isinstance(keep, float):
        raise BudgetError(f"keep must be one share in (0, 1], got {quoted(keep)}")


def together(reductions: Sequence[Reduction]) -> Parts:
    """Put the reductions of single videos (G = 1) that keep equally many tokens together."""
    counts: dict[int, list[int]] = defaultdict(list)
    for number, reduction in enumerate(reductions):
        counts[reduction.kept].append(number)
    return [
        (tuple(members), _stack([reductions[i] for i in members])) for members in counts.values()
    ]


def _stack(reductions: Sequence[Reduction]) -> Reduction:
    first = reductions[0]
    if len(reductions) == 1:
        return first

    def joined(name: str) -> Tensor | None:
        if getattr(first, name) is None:
            return None
        return torch.cat([getattr(reduction, name) for reduction in reductions])

    index = torch.cat([reduction.index for reduction in reductions])
    return Reduction(
        index,
        joined("weights"),
        joined("slot"),
        joined("share"),
        first.ordered,
        joined("label"),
    )


def _with_rest(reduction: Reduction, cells: int, rest: int) -> Reduction:
    """The reduction of the first `cells` tokens, and `rest` more that survive, labelled -1."""
    if not rest:
        return reduction
    images, kept = reduction.index.shape
    device = reduction.index.device
    last = torch.arange(cells, cells + rest, device=device).expand(images, -1)
    result = replace(reduction, index=torch.cat((reduction.index, last), 1))
    if reduction.label is not None:
        result = replace(result, label=F.pad(reduction.label, (0, rest), value=-1))
    if reduction.weights is not None:
        weights = F.pad(reduction.weights, (0, rest, 0, rest))
        weights[:, kept:, cells:] = torch.eye(rest, device=device, dtype=weights.dtype)
        result = replace(result, weights=weights)
    if reduction.slot is not None and reduction.share is not None:
        own = torch.arange(kept, kept + rest, device=device).expand(images, -1)
        slot = torch.cat((reduction.slot, own), 1)
        share = F.pad(reduction.share, (0, rest), value=1.0)
        result = replace(result, slot=slot, share=share)
    return result
