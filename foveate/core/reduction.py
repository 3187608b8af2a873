"""Reduction: the linear map W from V tokens to K, as a value.

Pruning is a gather, merging a segment mean, mixing a dense matrix, propagation a gather with a
residual: four storage forms of one thing. Shapes: `G` images of equal size, `V` visual tokens of an
image, `K` kept, `P` propagated, `D` hidden.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.ranking import Scale, top


@dataclass(frozen=True, eq=False)
class Reduction:
    """Which tokens survive, and what they become.

    A survivor stands at the position of one of its sources. With none of `slot`, `weights` and
    `residual`, survivors keep their own value.

    Args:
        index: (G, K) position of each survivor among the V tokens, unique. Ascending, unless it is
            `ordered`, and except inside an encoder, where the order means nothing to attention.
        weights: (G, K, V) the value of each survivor as a weighted sum of all tokens.
        slot: (G, V) the survivor that each token goes into, or -1 for a token that is dropped.
        share: (G, V) weight of each token in its survivor; those of a mean sum to one.
        ordered: whether the order of survivors has a meaning: where they get consecutive positions,
            the language model reads them in this order.
        label: (G, K) a number for each survivor, which later steps of the same method are told.
        valid: inside an encoder, (G, K) mask of real survivors. The rest is padding of images that
            have fewer, and nobody attends to it. `None` for all.
        removed: (G, P) positions of tokens of which survivors get a part on top of their own value.
        residual: (G, K, P) the weight of each of these in each survivor.
        mass: (G, K) how often each survivor counts in proportional attention; `None` for as often
            as it has sources. Needed with `residual`.
        parts: what is done one after the other, where there is a residual; `then` makes it.
        values: in and after an encoder, (G, K, D) values of the survivors, made by the method; the
            other fields say what they stand for.
        gates: between decoder layers in training, (G, K) in (0, 1]: how much later layers attend to
            each survivor. A gate of 0 would be the token's removal.
    """

    index: Tensor
    weights: Tensor | None = None
    slot: Tensor | None = None
    share: Tensor | None = None
    ordered: bool = False
    label: Tensor | None = None
    valid: Tensor | None = None
    removed: Tensor | None = None
    residual: Tensor | None = None
    mass: Tensor | None = None
    parts: tuple[Reduction, ...] = ()
    values: Tensor | None = None
    gates: Tensor | None = None

    @classmethod
    def top(cls, scores: Tensor, count: int, scale: Scale = None) -> Reduction:
        """Keep the `count` highest of (G, V) scores, in their original order.

        Args:
            scores: higher is kept; ties go to the lower index (`foveate.core.ranking`).
            count: how many.
            scale: what scores are sums or differences of, such as 1 for cosines.
        """
        return cls(top(scores, count, scale))

    @classmethod
    def mean(cls, index: Tensor, slot: Tensor, mass: Tensor | None = None) -> Reduction:
        """Average each segment of tokens into its survivor.

        Args:
            index: (G, K) position of each survivor.
            slot: (G, V) the survivor that each token goes into, or -1.
            mass: (G, V) what each token counts in its mean; `None` counts all alike.
        """
        mass = torch.ones_like(slot, dtype=torch.float32) if mass is None else mass
        mass = mass.masked_fill(slot < 0, 0.0)
        target = slot.clamp(min=0)
        total = mass.new_zeros(index.shape).scatter_add(1, target, mass)
        return cls(index, slot=slot, share=mass / total.gather(1, target))

    @property
    def kept(self) -> int:
        """Number of survivors of each image, K."""
        return self.index.shape[-1]

    @property
    def merges(self) -> bool:
        """Whether survivors change their value."""
        return any(
            form is not None for form in (self.slot, self.weights, self.residual, *self.parts)
        )

    def in_raster_order(self) -> Reduction:
        """The same survivors, ascending."""
        return replace(self.reordered(self.index.argsort(dim=1)), ordered=False)

    def reordered(self, order: Tensor) -> Reduction:
        """The same survivors in another order: (G, K) which of them comes where."""
        slot = self.slot
        if slot is not None:
            place = order.argsort(dim=1).gather(1, slot.clamp(min=0))
            slot = torch.where(slot < 0, slot, place)
        index, mass, label, valid = (
            None if of is None else of.gather(1, order)
            for of in (self.index, self.mass, self.label, self.valid)
        )
        weights, residual, values = (
            None if of is None else of.gather(1, order[..., None].expand(-1, -1, of.shape[2]))
            for of in (self.weights, self.residual, self.values)
        )
        assert index is not None
        assert not self.parts  # only what methods return
        return replace(
            self,
            index=index,
            weights=weights,
            slot=slot,
            residual=residual,
            mass=mass,
            label=label,
            valid=valid,
            values=values,
        )

    def apply(self, x: Tensor) -> Tensor:
        """Map (G, V, D) to (G, K, D)."""
        for part in self.parts:
            x = part.apply(x)
        if self.parts:
            return x
        if self.residual is not None and self.removed is not None:
            given = torch.matmul(self.residual.to(x.dtype), take_rows(x, self.removed))
            return take_rows(x, self.index) + given
        if self.values is not None:
            return self.values.to(x.dtype)
        if self.weights is not None:
            return torch.matmul(self.weights.to(x.dtype), x)
        if self.slot is None:
            return take_rows(x, self.index)
        assert self.share is not None
        # In half precision a sum of many parts stands still once each is less than half its step.
        kind = torch.promote_types(x.dtype, torch.float32)
        parts = x.to(kind) * self.share[..., None].to(kind)
        return _add_rows(parts, self.slot.clamp(min=0), self.kept).to(x.dtype)

    def matrix(self, tokens: int) -> Tensor:
        """(G, K, V) the map W itself.

        Args:
            tokens: V, which a gather does not know.
        """
        if self.weights is not None:
            return self.weights
        if self.parts:
            counts = (tokens, *(part.kept for part in self.parts))
            maps = (part.matrix(n) for part, n in zip(self.parts, counts, strict=False))
            return functools.reduce(lambda before, after: torch.matmul(after, before), maps)
        zeros = torch.zeros(*self.index.shape, tokens, device=self.index.device)
        if self.slot is None:
            own = zeros.scatter(2, self.index[..., None], 1.0)
            if self.residual is None or self.removed is None:
                return own
            columns = self.removed[:, None].expand_as(self.residual)
            return own.scatter(2, columns, self.residual.to(own))
        assert self.share is not None
        return zeros.scatter(1, self.slot.clamp(min=0)[:, None], self.share[:, None].to(zeros))

    def then(self, after: Reduction, tokens: int) -> Reduction:
        """The reduction that does this one and then another: W = W_after W.

        Args:
            after: a reduction of this one's K survivors.
            tokens: V of this one.
        """
        index = self.index.gather(1, after.index)
        mass = after.mass if self.mass is None or after.mass is not None else after.total(self.mass)
        if any(r.parts or r.residual is not None for r in (self, after)):
            parts = (*(self.parts or (self,)), *(after.parts or (after,)))
            mass = after.total(self.sizes(tokens)) if mass is None else mass
            return Reduction(index, parts=parts, mass=mass, valid=after.valid)
        if self.weights is not None or after.weights is not None:
            weights = torch.matmul(after.matrix(self.kept), self.matrix(tokens))
            return Reduction(index, weights, mass=mass, valid=after.valid)
        if self.slot is None and after.slot is None:
            return Reduction(index, mass=mass, valid=after.valid)
        slot, share = self._segments(tokens)
        later_slot, later_share = after._segments(self.kept)
        target = slot.clamp(min=0)
        dropped = slot < 0
        return Reduction(
            index,
            slot=later_slot.gather(1, target).masked_fill(dropped, -1),
            share=share * later_share.gather(1, target).masked_fill(dropped, 0.0),
            mass=mass,
            valid=after.valid,
        )

    def sizes(self, tokens: int) -> Tensor:
        """(G, K) how many of the V tokens each survivor stands for, or its `mass`; dropped ones
        count nowhere.

        Args:
            tokens: V, which a gather does not know.
        """
        if self.mass is not None:
            return self.mass
        return self.total(torch.ones(self.index.shape[0], tokens, device=self.index.device))

    def total(self, mass: Tensor) -> Tensor:
        """(G, K) what each survivor counts, from what the (G, V) tokens count."""
        if self.weights is not None:
            return (mass[..., None] * self._spread()).sum(1)
        if self.slot is None:
            return mass.gather(1, self.index)
        counts = mass.masked_fill(self.slot < 0, 0.0)
        return counts.new_zeros(self.index.shape).scatter_add(1, self.slot.clamp(min=0), counts)

    def altered(self, tokens: int) -> Tensor:
        """(G, K) which survivors are not just the token at whose position they stand.

        Args:
            tokens: V, which a gather does not know.
        """
        if self.weights is not None:
            return _altered(self.weights, self.index)
        if self.parts or self.residual is not None:
            return _altered(self.matrix(tokens), self.index)
        if self.share is None:
            return torch.zeros_like(self.index, dtype=torch.bool)
        return (self.share.gather(1, self.index) != 1) | (self.sizes(tokens) != 1)

    def without(self, hidden: Tensor) -> Reduction:
        """The same survivors, which some tokens tell nothing; those of such tokens alone stay.

        Args:
            hidden: (G, V) the tokens, whose weight goes to the others that a survivor is made of.
        """
        if self.weights is not None:
            seen = self.weights.masked_fill(hidden[:, None], 0.0)
            total, remaining = self.weights.sum(-1, keepdim=True), seen.sum(-1, keepdim=True)
            rest = seen * (total / remaining.masked_fill(remaining == 0, 1.0))
            return replace(self, weights=torch.where(remaining == 0, self.weights, rest))
        if self.residual is not None and self.removed is not None:
            unseen = hidden.gather(1, self.removed)[:, None]
            return replace(self, residual=self.residual.masked_fill(unseen, 0.0))
        if self.slot is None or self.share is None:
            return self
        seen, into = self.share.masked_fill(hidden, 0.0), self.slot.clamp(min=0)
        dropped = self.slot < 0
        total, remaining = (
            part.new_zeros(self.index.shape)
            .scatter_add(1, into, part.masked_fill(dropped, 0.0))
            .gather(1, into)
            for part in (self.share, seen)
        )
        rest = seen * (total / remaining.masked_fill(remaining == 0, 1.0))
        return replace(self, share=torch.where(remaining == 0, self.share, rest))

    def recover(self, y: Tensor, tokens: int, missing: Tensor | float = 0.0) -> Tensor:
        """Back to V rows: every token gets the value of the survivor that it went into.

        Args:
            y: (G, K, D) values of the survivors.
            tokens: V.
            missing: what dropped tokens get, a number or (G, 1, D).

        Returns:
            (G, V, D). After a dense reduction, or one with a residual, a token gets the mean of the
            survivors that it went into, weighted as it was; a chain is undone from its end.
        """
        if self.parts:
            counts = (tokens, *(part.kept for part in self.parts))
            for part, count in reversed(list(zip(self.parts, counts, strict=False))):
                y = part.recover(y, count, missing)
            return y
        if self.residual is not None and self.removed is not None:
            full = self._gather().recover(y, tokens, missing)
            back = self.residual.abs().transpose(1, 2).to(y.dtype)
            total = back.sum(-1, keepdim=True)
            given = torch.matmul(back / total.masked_fill(total == 0, 1.0), y)
            given = torch.where(total == 0, missing, given)
            return full.scatter(1, self.removed[..., None].expand_as(given), given)
        if self.weights is not None:
            spread = self._spread().to(y.dtype)
            dropped = (spread.sum(-1) == 0)[..., None]
            return torch.where(dropped, missing, torch.matmul(spread, y))
        slot, _ = self._segments(tokens)
        return torch.where((slot < 0)[..., None], missing, take_rows(y, slot.clamp(min=0)))

    def after(self, count: int) -> Reduction:
        """The same reduction of tokens that `count` others precede, all of which survive."""
        if not count:
            return self
        images = self.index.shape[0]
        first = torch.arange(count, device=self.index.device).expand(images, -1)
        index = torch.cat((first, self.index + count), 1)
        if self.weights is not None:
            eye = torch.eye(count, dtype=self.weights.dtype, device=self.weights.device)
            return Reduction(index, torch.stack([torch.block_diag(eye, w) for w in self.weights]))
        assert not self.parts  # only what methods return
        if self.residual is not None and self.removed is not None and self.mass is not None:
            residual = F.pad(self.residual, (0, 0, count, 0))
            mass = F.pad(self.mass, (count, 0), value=1.0)
            return Reduction(index, removed=self.removed + count, residual=residual, mass=mass)
        if self.slot is None:
            return Reduction(index)
        assert self.share is not None
        slot = torch.where(self.slot < 0, self.slot, self.slot + count)
        share = torch.cat((self.share.new_ones(images, count), self.share), 1)
        return Reduction(index, slot=torch.cat((first, slot), 1), share=share)

    def _gather(self) -> Reduction:
        """The same survivors with their own values."""
        return Reduction(self.index, valid=self.valid)

    def _segments(self, tokens: int) -> tuple[Tensor, Tensor]:
        """(G, V) slot and share, of a gather too."""
        if self.slot is not None and self.share is not None:
            slot, share = self.slot, self.share
        else:
            order = torch.arange(self.kept, device=self.index.device).expand_as(self.index)
            slot = order.new_full((self.index.shape[0], tokens), -1).scatter(1, self.index, order)
            share = (slot >= 0).float()
        if self.valid is None:
            return slot, share
        return slot.masked_fill(~self.valid.gather(1, slot.clamp(min=0)), -1), share

    def _spread(self) -> Tensor:
        """(G, V, K) share of each token that went into each survivor; zero rows for dropped
        ones.
        """
        assert self.weights is not None
        back = self.weights.abs().transpose(1, 2)
        total = back.sum(-1, keepdim=True)
        return back / total.masked_fill(total == 0, 1.0)


def _altered(weights: Tensor, index: Tensor) -> Tensor:
    own = weights.gather(2, index[..., None])[..., 0]
    return (own != 1) | (weights.abs().sum(-1) != own.abs())


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (G, V, D) named by (G, K); one flat gather, which is far faster than `gather`."""
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).unflatten(0, index.shape)


def _add_rows(x: Tensor, slot: Tensor, count: int) -> Tensor:
    """(G, K, D) sums of the rows of (G, V, D) that go into each of `count` slots."""
    where = _flat(slot, count)[:, None].expand(-1, x.shape[-1])
    sums = x.new_zeros(x.shape[0] * count, x.shape[-1]).scatter_add(0, where, x.flatten(0, 1))
    return sums.unflatten(0, (x.shape[0], count))


def _flat(index: Tensor, width: int) -> Tensor:
    start = torch.arange(index.shape[0], device=index.device)[:, None] * width
    return (index + start).flatten()
