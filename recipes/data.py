"""Batches for training: scenes, packed questions, and what every patch shows.

Training scenes are drawn from seeds above `TRAIN_SEEDS`; every seed below is held out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from foveate.io.images import load_image
from foveate.tiny.build import EOS, MEAN, PAD, PATCH, SIZE, STD
from foveate.tiny.questions import KINDS_OF_QUESTION, Question
from foveate.tiny.scenes import MIX, Scene, draw_scene
from foveate.tiny.sequences import SEQUENCE_KINDS
from foveate.tiny.words import COLOURS, KINDS, SHAPES, VOCABULARY, WORDS

TRAIN_SEEDS = 2**40
HELD_OUT_PHOTOS = 10
IGNORE = -100
WORD_ID = {word: index for index, word in enumerate(VOCABULARY)}
GROUPS = (*KINDS_OF_QUESTION, *SEQUENCE_KINDS)
HARD = ("exists", "count", "relation-color", "relation-object", "compare")
HARDEST = ("count", "relation-color", "relation-object")

_SIDE = SIZE // PATCH
_LEAST_INK = 6  # pixels of an object from which on a patch counts as showing it
_PER_KIND = 6  # questions of one kind in a training scene
_SIZES = (SIZE, SIZE, SIZE, 96, 160, 192, 224)  # of varied scenes, before they are shrunk
_MIXES = (MIX, (30, 10, 20, 40))
_COLOUR_ID = {name: index for index, name in enumerate(COLOURS)}
_KIND_ID = {name: index for index, name in enumerate(KINDS)}


@dataclass(frozen=True)
class Packing:
    """How questions are laid out.

    Args:
        slots: independent conversations per image.
        length: tokens per conversation.
        turns: most questions in one conversation.
        hard: how much likelier a question of one of the `often` kinds is chosen.
        often: which kinds of questions those are.
    """

    slots: int
    length: int
    turns: int
    hard: float = 1.0
    often: tuple[str, ...] = HARD


SINGLE = Packing(slots=24, length=11, turns=1)
MULTI = Packing(slots=9, length=36, turns=4)


class Labelled(Protocol):
    """What losses need of a batch: see `Batch`."""

    @property
    def labels(self) -> Tensor:
        """(B, S, C)."""

    @property
    def groups(self) -> Tensor:
        """(B, S, C)."""


@dataclass(frozen=True)
class Batch:
    """One batch; `B` images, `V` patches, `S` slots of `C` tokens.

    Args:
        pixels: (B, H, W, 3) uint8.
        words: (B, S, C) token ids.
        labels: (B, S, C) the next token where it is part of an answer, else `IGNORE`.
        groups: (B, S, C) index into `GROUPS` where an answer is predicted, else -1.
        ink: (B, V) object pixels per patch.
        kinds: (B, V) index into `KINDS`; -1 for background, `IGNORE` where it is unclear.
        colours: (B, V) index of the colour, `IGNORE` off objects.
        present: (B, 27) colours, shapes, numbers by leading digit, words, on the image.
    """

    pixels: Tensor
    words: Tensor
    labels: Tensor
    groups: Tensor
    ink: Tensor
    kinds: Tensor
    colours: Tensor
    present: Tensor


def photo_paths(folder: Path | None, *, held_out: bool) -> list[Path]:
    """List the photos of a folder: the last ten by name are held out, the rest are for training.

    Args:
        folder: where `*.jpg` files lie; None gives no photos.
        held_out: which of the two parts.

    Returns:
        Sorted paths.
    """
    paths = sorted(folder.glob("*.jpg")) if folder else []
    return paths[-HELD_OUT_PHOTOS:] if held_out else paths[:-HELD_OUT_PHOTOS]


def load_photos(paths: list[Path]) -> list[Image.Image]:
    """Open photos and shrink them to 256 pixels on the short side."""
    photos = []
    for path in paths:
        photo = load_image(path)
        scale = 256 / min(photo.size)
        photos.append(photo.resize((round(photo.width * scale), round(photo.height * scale))))
    return photos


def normalise(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float, as the packaged image processor does it."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def make_batch(
    seeds: range,
    packing: Packing,
    photos: list[Image.Image],
    photo_share: float,
    varied: bool = False,
) -> Batch:
    """Draw scenes and pack their questions.

    Args:
        seeds: one scene each.
        packing: layout of the questions.
        photos: backgrounds to choose from; may be empty.
        photo_share: share of scenes on a photo.
        varied: show words too, and draw some scenes larger and shrink them.

    Returns:
        The batch.
    """
    rows = []
    for seed in seeds:
        rng = Random(seed + 1)
        on_photo = bool(photos) and rng.random() < photo_share
        background: Literal["texture"] | Image.Image = "texture"
        if on_photo:
            background = rng.choice(photos)
        size, mix = (rng.choice(_SIZES), rng.choice(_MIXES)) if varied else (SIZE, MIX)
        scene = draw_scene(seed, background=background, per_kind=_PER_KIND, size=size, mix=mix)
        if size != SIZE:
            scene = _shrink(scene)
        rows.append((np.array(scene.image), *_pack(scene, packing, rng), *_patches(scene)))
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def _shrink(scene: Scene) -> Scene:
    """The scene as the image processor resizes it; boxes stay those of the large one."""
    image = scene.image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    at = (np.arange(SIZE) * len(scene.owner) + len(scene.owner) // 2) // SIZE
    return replace(scene, image=image, owner=scene.owner[at][:, at])


def _pack(scene: Scene, packing: Packing, rng: Random) -> tuple[np.ndarray, ...]:
    """Lay questions into slots; a slot takes turns until it is full or has enough of them."""
    shape = (packing.slots, packing.length)
    words, labels = np.full(shape, PAD, np.int64), np.full(shape, IGNORE, np.int64)
    groups = np.full(shape, -1, np.int64)
    waiting: list[Question] = []
    for slot in range(packing.slots):
        used = 0
        for _ in range(packing.turns):
            if not waiting:
                waiting = _shuffle(scene.questions, packing, rng)
            question = waiting.pop()
            ids = [WORD_ID[word] for word in question.text.split()]
            if rng.random() < 0.1:
                ids.pop()
            end = used + len(ids)
            if end + 1 > packing.length:
                break
            answer = WORD_ID[question.answer]
            words[slot, used : end + 1] = [*ids, answer]
            labels[slot, end - 1 : end + 1] = answer, EOS
            groups[slot, end - 1] = GROUPS.index(question.kind)
            if end + 1 < packing.length:
                words[slot, end + 1] = EOS
            used = end + 2
    return words, labels, groups


def _shuffle(questions: tuple[Question, ...], packing: Packing, rng: Random) -> list[Question]:
    """Random order; questions that are wanted often tend to come last, to be taken first."""

    def key(question: Question) -> float:
        return rng.random() ** (1 / packing.hard if question.kind in packing.often else 1.0)

    return sorted(questions, key=key)


def _patches(scene: Scene) -> tuple[np.ndarray, ...]:
    """Say what every patch shows, and what the image contains."""
    grid = scene.owner.reshape(_SIDE, PATCH, _SIDE, PATCH).swapaxes(1, 2).reshape(_SIDE**2, -1)
    ink = (grid[:, :, None] == np.arange(len(scene.objects))).sum(1)
    owner, most = ink.argmax(1), ink.max(1)
    kind_of = np.array([_KIND_ID[o.kind] for o in scene.objects])
    colour_of = np.array([_COLOUR_ID[o.colour] for o in scene.objects])
    shown = most >= _LEAST_INK
    kinds = np.where(shown, kind_of[owner], np.where(most == 0, -1, IGNORE))
    colours = np.where(shown, colour_of[owner], IGNORE)
    present = np.zeros(27, np.float32)
    present[colour_of] = 1
    for o in scene.objects:
        if o.kind in WORDS:
            label = len(SHAPES) + 10
        else:
            label = SHAPES.index(o.kind) if o.kind in SHAPES else len(SHAPES) + int(o.kind[0])
        present[len(COLOURS) + label] = 1
    return ink.sum(1), kinds, colours, present


class _Stream(IterableDataset):
    """An endless stream of batches of fresh scenes."""

    def __init__(
        self, first: int, size: int, packing: Packing, photos: list[Path], share: float
    ) -> None:
        self.first, self.size, self.packing = first, size, packing
        self.photos, self.share = photos, share

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        photos = load_photos(self.photos)
        seed = self.first
        while True:
            yield make_batch(range(seed, seed + self.size), self.packing, photos, self.share)
            seed += self.size


def stream(
    first: int, size: int, packing: Packing, photos: list[Path], photo_share: float
) -> Iterator[Batch]:
    """Draw training batches in a second process, ahead of time.

    Args:
        first: scenes already seen; the stream goes on after them.
        size: images per batch.
        packing: layout of the questions.
        photos: background files.
        photo_share: share of scenes on a photo.

    Returns:
        An endless iterator.
    """
    data = _Stream(TRAIN_SEEDS + first, size, packing, photos, photo_share)
    return iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=8))
