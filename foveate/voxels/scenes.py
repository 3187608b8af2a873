"""Drawn scenes of coloured boxes and balls on a floor, and a sentence about one of them.

In half of the scenes an object like the target stands on the other side of the one it is compared
with, so that only the relation tells which is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.voxels.loss import Target
from foveate.voxels.sparse import SparseVoxels

VOXEL_SIZE = 0.1
"""Side of the finest voxel, in metres."""
SIDE, HEIGHT = 32, 10
"""Voxels of a scene along x and y, and along z."""
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.1, 0.2, 1.0),
    "yellow": (0.9, 0.9, 0.1),
}
KINDS = ("box", "ball")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "behind": (1, 1), "before": (1, -1)}
"""Axis along which a relation looks, and in which direction."""
FLOOR = (0.5, 0.5, 0.5)
VOCABULARY = ("<pad>", "<s>", "the", *COLOURS, *KINDS, "left", "right", "of", "behind", "before")
APART = 4
"""Voxels by which the centres of related objects differ at least, along the axis."""


@dataclass(frozen=True)
class VoxelScene:
    """A scene and its sentence.

    Args:
        voxels: one scene of surface voxels, colours as (n, 3) features.
        sentence: speaks of one object, by its relation to another.
        boxes: (M, 6) centre and size of each object, in metres.
        target: which one the sentence speaks of.
        anchor: which one it is compared with.
    """

    voxels: SparseVoxels
    sentence: str
    boxes: Tensor
    target: int
    anchor: int


@dataclass(frozen=True)
class _Thing:
    colour: str
    kind: str
    low: tuple[int, int, int]
    size: tuple[int, int, int]

    def centre(self, axis: int) -> float:
        return self.low[axis] + (self.size[axis] - 1) / 2

    def meets(self, other: _Thing) -> bool:
        return all(
            self.low[i] <= other.low[i] + other.size[i]
            and other.low[i] <= self.low[i] + self.size[i]
            for i in (0, 1)
        )

    def name(self) -> str:
        return f"the {self.colour} {self.kind}"


def draw_scene(seed: int) -> VoxelScene:
    """A scene of three or four objects.

    Args:
        seed: scenes of one seed are equal.
    """
    rng = np.random.default_rng(seed)
    while True:
        relation = str(rng.choice(list(RELATIONS)))
        axis, sign = RELATIONS[relation]
        things = list(_things(rng, twin=rng.random() < 0.5))
        anchor, target = things[:2]
        if any(a.meets(b) for i, a in enumerate(things) for b in things[:i]):
            continue
        fits = [
            thing
            for thing in things
            if thing is not anchor
            and thing.name() == target.name()
            and sign * (thing.centre(axis) - anchor.centre(axis)) > -APART
        ]
        ahead = sign * (target.centre(axis) - anchor.centre(axis))
        if fits == [target] and ahead >= APART:
            sentence = f"{target.name()} {relation} {anchor.name()}"
            return VoxelScene(_voxels(things), sentence, _boxes(things), 1, 0)


def _things(rng: np.random.Generator, twin: bool) -> Iterator[_Thing]:
    """Anchor, target, one that looks like the target if asked for, and another one."""
    looks = [(colour, kind) for colour in COLOURS for kind in KINDS]
    chosen = [looks[i] for i in rng.permutation(len(looks))[:4]]
    if twin:
        chosen[2] = chosen[1]
    for colour, kind in chosen[: 4 if rng.random() < 0.5 else 3]:
        side = rng.integers(5, 9, 3)
        size = tuple(int(s) for s in (side if kind == "box" else side[[0, 0, 0]]))
        low = [int(rng.integers(0, SIDE - size[i] + 1)) for i in (0, 1)]
        yield _Thing(colour, kind, (low[0], low[1], 1), (size[0], size[1], size[2]))


def _voxels(things: Sequence[_Thing]) -> SparseVoxels:
    """The floor, and the surfaces of things."""
    colour = np.zeros((SIDE, SIDE, HEIGHT, 3), np.float32)
    colour[:, :, 0] = FLOOR
    for thing in things:
        grid = np.stack(np.meshgrid(*(np.arange(s) for s in thing.size), indexing="ij"), -1)
        middle = (np.array(thing.size) - 1) / 2
        inside = np.ones(thing.size, bool)
        if thing.kind == "ball":
            inside = ((grid - middle) ** 2).sum(-1) <= (thing.size[0] / 2) ** 2
        core = np.pad(inside, 1)
        for axis in range(3):
            core &= np.roll(core, 1, axis) & np.roll(core, -1, axis)
        places = grid[inside & ~core[1:-1, 1:-1, 1:-1]] + thing.low
        colour[tuple(places.T)] = COLOURS[thing.colour]
    places = np.argwhere(colour.any(-1))
    features = torch.from_numpy(colour[tuple(places.T)])
    coordinates = torch.from_numpy(np.pad(places, ((0, 0), (1, 0))))
    return SparseVoxels(coordinates, features)


def _boxes(things: Sequence[_Thing]) -> Tensor:
    rows = [[*(thing.centre(i) for i in range(3)), *thing.size] for thing in things]
    return torch.tensor(rows) * VOXEL_SIZE


def batch_of(scenes: Sequence[VoxelScene]) -> tuple[SparseVoxels, Target]:
    """Scenes as one batch, and what their sentences speak of.

    Args:
        scenes: one at least.

    Raises:
        InputError: there are none.
    """
    if not scenes:
        raise InputError("a batch needs a scene")
    parts = [scene.voxels.coordinates.clone() for scene in scenes]
    for number, part in enumerate(parts):
        part[:, 0] = number
    voxels = SparseVoxels(torch.cat(parts), torch.cat([s.voxels.features for s in scenes]))
    centres = [
        torch.nn.functional.pad(s.boxes[:, :3], (1, 0), value=i) for i, s in enumerate(scenes)
    ]
    return voxels, Target(
        torch.stack([s.boxes[s.target] for s in scenes]),
        torch.cat(centres),
        torch.cat([c[[s.target, s.anchor]] for c, s in zip(centres, scenes, strict=True)]),
    )


def word_ids(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(B, T) places of words in `VOCABULARY`, each sentence after `<s>`; (B, T) which are words.

    Args:
        sentences: of words of the vocabulary.

    Raises:
        InputError: a word is not in it.
    """
    rows = [["<s>", *sentence.split()] for sentence in sentences]
    unknown = {word for row in rows for word in row} - set(VOCABULARY)
    if unknown:
        raise InputError(f"scenes have no words for {', '.join(sorted(unknown))}")
    size = max(map(len, rows))
    ids = torch.tensor([
        [VOCABULARY.index(word) for word in row] + [0] * (size - len(row)) for row in rows
    ])  # fmt: skip
    return ids, ids > 0
