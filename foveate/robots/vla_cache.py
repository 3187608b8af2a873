"""VLA-Cache: which tokens of a control step keep the keys and values of the step before.

Paper: Xu et al., "VLA-Cache: Efficient Vision-Language-Action Manipulation via Adaptive Token
Caching", arXiv:2502.02175. Reference code: siyuhsu/vla-cache @ 1163ff8 and its fork of transformers
@ 07ffe25, for OpenVLA, a causal model of 32 layers.
Our reading, and what differs from the reference: layers are scaled to the depth at hand; where
fewer tokens are taken over than there are candidates, the instruction attends to those least (in
the reference, they are the first of the first camera); patches that are equal bit for bit are alike
whatever is in them (there, not if they are black); padding has no part in entropies. On pi0 all
tokens of a prompt see each other, so old keys and values are those of another context even where no
token before them has changed, unlike on a causal model.

Shapes: `G` cameras of the batch that are in the prompt, `V` patches of each, `B` rows, `T` tokens
of the prompt, `L` layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.ranking import top
from foveate.errors import BudgetError, LayerError
from foveate.io.quoting import quoted

DEPTH, LAYERS, ATTENTION = 32, (2, 6, 9, 11), 15  # of the reference's model


@dataclass(frozen=True)
class VLACache:
    """Take over what looks as before and what the instruction hardly attends to.

    A token that is taken over before a layer is not computed in it or in any later one.

    Args:
        similarity: least cosine of the pixels of a patch, in [0, 1], with those of the step before.
        static: share of a camera's patches that are taken over at most, the most alike.
        relevant: share of them that are computed anyway: those that the instruction attended to
            most in the step before, the mean over its tokens and over heads.
        growth: how much of an increase from one layer to the next counts, of the share of
            candidates that is taken over; that share is 1 in the layer whose attention had the
            least entropy in the step before, and 0 in the one that had the most.
        layers: before which tokens may be taken over; by default 2, 6, 9 and 11 of 32, scaled and
            rounded up.
        attention: the layer whose attention says what is relevant; by default 15 of 32, scaled and
            rounded down.

    Raises:
        BudgetError: a number is out of range.
        LayerError: a layer is no int.

    Cost: one attention map of each layer, in chunks, for the entropies.
    """

    similarity: float = 0.996
    static: float = 150 / 256
    relevant: float = 100 / 256
    growth: float = 0.55
    layers: tuple[int, ...] | None = None
    attention: int | None = None

    def __post_init__(self) -> None:
        for name in ("static", "relevant", "growth"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise BudgetError(f"{name} must be a share in [0, 1], got {quoted(share)}")
        least = self.similarity  # above 1, nothing is alike
        if isinstance(least, bool) or not isinstance(least, int | float) or not least >= 0:
            raise BudgetError(f"similarity must be a cosine of at least 0, got {quoted(least)}")
        given = self.layers
        if given is not None and not (isinstance(given, tuple | list) and all(map(_is_int, given))):
            raise LayerError(f"layers must be a tuple of ints, got {quoted(given)}")
        if self.attention is not None and not _is_int(self.attention):
            raise LayerError(f"attention must be a layer, got {quoted(self.attention)}")

    def places(self, depth: int) -> tuple[int, ...]:
        """Layers of a model of some depth before which tokens may be taken over.

        Raises:
            LayerError: one lies outside the model, or they do not ascend.
        """
        layers = self.layers
        if layers is None:
            scaled = {math.ceil(layer * depth / DEPTH) for layer in LAYERS}
            layers = tuple(sorted(layer for layer in scaled if layer < depth))
        if list(layers) != sorted(set(layers)) or not all(0 <= n < depth for n in layers):
            raise LayerError(f"layers must ascend within 0 to {depth - 1}, got {quoted(layers)}")
        return layers

    def reader(self, depth: int) -> int:
        """The layer whose attention says what is relevant.

        Raises:
            LayerError: it lies outside the model.
        """
        layer = ATTENTION * depth // DEPTH if self.attention is None else self.attention
        if not 0 <= layer < depth:
            raise LayerError(f"attention must be a layer of 0 to {depth - 1}, got {quoted(layer)}")
        return layer

    def candidates(self, alike: Tensor, attended: Tensor) -> Tensor:
        """(G, V) patches that may be taken over.

        Args:
            alike: (G, V) cosine with the step before; below 0 where nothing can be taken over.
            attended: (G, V) attention of the instruction in the step before.
        """
        still = _most(alike, self.static) & (alike >= self.similarity)
        return still & ~_most(attended, self.relevant)

    def shares(self, entropy: Tensor) -> Tensor:
        """(B, L) share of the candidates that each layer takes over.

        Args:
            entropy: (B, L) of the attention of each layer in the step before, the mean over rows.
        """
        least, most = entropy.amin(1, keepdim=True), entropy.amax(1, keepdim=True)
        shares = list((1 - (entropy - least) / (most - least + 1e-10)).unbind(1))
        for number in range(1, len(shares)):
            rise = shares[number] - shares[number - 1]
            slowed = shares[number - 1] + rise * self.growth
            shares[number] = torch.where(rise > 0, slowed, shares[number])
        return torch.stack(shares, 1)

    def taken_over(
        self, candidates: Tensor, attended: Tensor, entropy: Tensor
    ) -> dict[int, Tensor]:
        """Layer -> (B, T) tokens that neither it nor any later one computes; never fewer than the
        entry before has.

        Args:
            candidates: (B, T) tokens that may be taken over.
            attended: (B, T) attention of the instruction in the step before.
            entropy: (B, L) as above.
        """
        order = attended.masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True)
        rank = order.argsort(dim=1)
        total, shares = candidates.sum(1, keepdim=True), self.shares(entropy)
        count, taken = torch.zeros_like(total), {}
        for layer in self.places(entropy.shape[1]):
            wanted = (shares[:, layer, None] * total).long().clamp(min=1)
            count = torch.minimum(torch.maximum(count, wanted), total)
            taken[layer] = rank < count
        return taken


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _most(values: Tensor, share: float) -> Tensor:
    """(G, V) which values of each row are among its largest; ties go to the first."""
    chosen = top(values, round(share * values.shape[1]))
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, chosen, True)
