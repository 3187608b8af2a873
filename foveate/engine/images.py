"""Images of a forward: where their tokens are, and which of them are alive.

Images with equal counts are handled together, so that methods see plain batched tensors. A video
counts as one image.
Shapes: `G` images of a group, `V` tokens of each, `B` batch, `T` logical length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foveate.core import Reduction
from foveate.core.tokens import Shape
from foveate.record.tiles import Placed

Kept = Mapping[str, Tensor]
Place = Callable[[], Placed]


@dataclass(frozen=True, eq=False)
class Group:
    """Images of the same shape, and the same number of tokens alive.

    Args:
        images: number of each image within the forward, in order of appearance.
        rows: row of the batch of each image.
        index: (G, V) raster positions alive; ascending, unless a method orders its survivors.
        shape: tokens, grid and frames of each image before anything was removed.
        ends: for each image, logical position of its last token, alive or not.
        columns: (G, V) logical position in its row of each living token, ascending; `None` while
            only features are known.
        before: for each image, entry of each step before the language model -> (K) raster positions
            alive after it.
        places: for each image, how to find out where in it the tokens lie.
        ordered: whether `index` need not ascend.
        began: for each image, number of a method -> tokens it had where the method began.
        labels: number of a method -> (G, V) what it has labelled each living token with.
        readout: for each image, whether a next token is read from its last token, which stays.
    """

    images: tuple[int, ...]
    rows: tuple[int, ...]
    index: Tensor
    shape: Shape
    ends: tuple[int, ...] = ()
    columns: Tensor | None = None
    before: tuple[Kept, ...] = ()
    places: tuple[Place | None, ...] = ()
    ordered: bool = False
    began: tuple[Mapping[int, int], ...] = ()
    labels: Mapping[int, Tensor] = field(default_factory=dict)
    readout: tuple[bool, ...] = ()

    @property
    def lasting(self) -> Tensor | None:
        """(G) which of the tokens alive may not be removed, -1 for none; `None` for no image."""
        if not any(self.readout):
            return None
        read = torch.tensor(self.readout, device=self.index.device)
        there = (self.index[:, -1:] == self.shape.total - 1).any(1)
        return torch.where(read & there, self.index.shape[1] - 1, -1)

    def pick(self, members: Sequence[int]) -> Group:
        """The group of some of its images."""
        if len(members) == len(self.images):
            return self
        chosen = torch.tensor(members, device=self.index.device)
        return replace(
            self,
            images=tuple(self.images[i] for i in members),
            rows=tuple(self.rows[i] for i in members),
            index=self.index[chosen],
            ends=tuple(self.ends[i] for i in members) if self.ends else (),
            columns=None if self.columns is None else self.columns[chosen],
            before=tuple(self.before[i] for i in members) if self.before else (),
            places=tuple(self.places[i] for i in members) if self.places else (),
            began=tuple(self.began[i] for i in members) if self.began else (),
            labels={method: label[chosen] for method, label in self.labels.items()},
            readout=tuple(self.readout[i] for i in members) if self.readout else (),
        )

    def reduced(self, reduction: Reduction, method: int) -> Group:
        """The group after a reduction by the method of a number."""
        labels = {n: label.gather(1, reduction.index) for n, label in self.labels.items()}
        if reduction.label is not None:
            labels[method] = reduction.label
        columns = None if self.columns is None else self.columns.gather(1, reduction.index)
        if columns is not None and reduction.ordered:
            columns = columns.sort(dim=1).values
        return replace(
            self,
            index=self.index.gather(1, reduction.index),
            columns=columns,
            ordered=self.ordered or reduction.ordered,
            labels=labels,
        )


@dataclass(frozen=True, eq=False)
class Left:
    """What the steps before the language model have left of an image.

    Args:
        count: tokens alive.
        began: number of a method -> tokens it had where the method began.
        labels: number of a method -> (K) its labels, in the order of columns.
        index: (K) raster positions alive in the order of their columns; `None` for raster order.
        kept: entry of each step behind the encoder -> (K) raster positions alive after it.
    """

    count: int
    began: Mapping[int, int]
    labels: Mapping[int, Tensor]
    index: Tensor | None = None
    kept: Kept = field(default_factory=dict)


def note(group: Group, entry: str, kept: Mapping[int, dict[str, Tensor]]) -> None:
    """Write down in `kept`, of each image, which tokens are alive after a step."""
    for i, image in enumerate(group.images):
        index = group.index[i]
        kept[image][entry] = index.sort().values if group.ordered else index
