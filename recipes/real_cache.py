"""What the tower sees of training images, encoded once, and what is asked about them.

A chunk is 64 images: drawn scenes, and images of easy-VQA's train part where there is a folder of
it. Scenes are drawn from seeds of training, as in `recipes.data`, half of them small and sparse.

Shapes: `N` images, `V` patches, `D` width of the tower.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.bench import data as files
from foveate.io.writing import replacing
from foveate.tiny.scenes import MIX, Scene, draw_scene
from foveate.tiny.words import COLOURS, KINDS
from recipes.data import IGNORE, TRAIN_SEEDS
from recipes.precision import mixed

SCENES, OTHERS = 48, 16
WORDY = (30, 10, 20, 40)
_EASY, _USUAL, _CROWDED = (96, (2, 6)), (112, (4, 10)), (128, (6, 14))  # edge and objects
_PER_KIND = 6
_LEAST_INK = 0.12  # share of a patch from which on it shows an object

Asked = tuple[str, str, str]
"""A question, its answer and its kind."""


@dataclass(frozen=True)
class Chunk:
    """Some images.

    Args:
        features: (N, V, D) bfloat16 states of the layer that LLaVA reads.
        colours: (N, V) index of the colour of what a patch shows; -1 for background, `IGNORE`
            where it is unclear.
        kinds: (N, V) index into `KINDS`, likewise.
        asked: questions about each image.
    """

    features: Tensor
    colours: Tensor
    kinds: Tensor
    asked: list[list[Asked]]


def chunk(folder: Path, number: int, model: Any, processor: Any, data: Path | None) -> Chunk:
    """A chunk from a folder, encoded now unless it was before.

    Args:
        folder: of chunks that were made with the same `data`.
        number: which one.
        model: a LLaVA with its tower, or None where the chunk must be there.
        processor: its processor.
        data: holds `easy-vqa/`; None leaves its images out.
    """
    path = folder / f"{number:04}.pt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        made = encode(number, model, processor, data)
        with replacing(path) as part:
            torch.save(vars(made), part)
    return Chunk(**torch.load(path))


def encode(number: int, model: Any, processor: Any, data: Path | None) -> Chunk:
    """Draw the images of a chunk and show them to the tower."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    images, colours, kinds, asked = [], [], [], []
    for index in range(SCENES):
        scene = draw(TRAIN_SEEDS + number * SCENES + index)
        images.append(scene.image)
        shown = patches(scene, side)
        colours.append(shown[0])
        kinds.append(shown[1])
        asked.append([(q.text, q.answer, q.kind) for q in scene.questions])
    for image, rows in easy(data, number) if data else ():
        images.append(image)
        colours.append(np.full(side**2, IGNORE))
        kinds.append(np.full(side**2, IGNORE))
        asked.append([(row.question, row.answer, "easy-vqa") for row in rows])
    seen = [look(model, processor, images[at : at + 8]) for at in range(0, len(images), 8)]
    first, second = (torch.from_numpy(np.stack(each)) for each in (colours, kinds))
    return Chunk(torch.cat(seen), first, second, asked)


def draw(seed: int) -> Scene:
    """A scene for training; the questions of `foveate.tiny` about it."""
    rng = Random(seed + 1)
    size, objects = rng.choice((_EASY, _EASY, _USUAL, _CROWDED))
    mix = rng.choice((MIX, MIX, WORDY))
    return draw_scene(seed, objects=objects, size=size, per_kind=_PER_KIND, mix=mix)


def easy(data: Path, number: int) -> list[tuple[Image.Image, list[files.Row]]]:
    """Images of easy-VQA's train part with their questions, each once before any comes again."""
    rows = _by_image(data)
    names = sorted(rows)
    Random(0).shuffle(names)
    picked = [names[(number * OTHERS + n) % len(names)] for n in range(OTHERS)]
    return [(files.packed_image(data, "easy-vqa", "train", name), rows[name]) for name in picked]


@lru_cache(maxsize=1)
def _by_image(data: Path) -> dict[str, list[files.Row]]:
    found: dict[str, list[files.Row]] = defaultdict(list)
    for row in files.easy_vqa(data, "train"):
        found[row.image].append(row)
    return found


@torch.inference_mode()
def look(model: Any, processor: Any, images: list[Image.Image]) -> Tensor:
    """(N, V, D) of the tower's layer that LLaVA reads, without the class token."""
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with mixed():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layer: Tensor = states[model.config.vision_feature_layer][:, 1:]
    return layer.to(torch.bfloat16).clone()


def patches(scene: Scene, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour and kind that each of side x side patches shows: (V,), (V,)."""
    cell = 16
    at = (np.arange(side * cell) * len(scene.owner) + len(scene.owner) // 2) // (side * cell)
    grid = scene.owner[at][:, at].reshape(side, cell, side, cell).swapaxes(1, 2)
    shown = grid.reshape(side**2, -1, 1) == np.arange(len(scene.objects))
    share = shown.mean(1)
    owner, most = share.argmax(1), share.max(1)
    unclear = np.where(most == 0, -1, IGNORE)
    colour = np.array([list(COLOURS).index(o.colour) for o in scene.objects])
    kind = np.array([KINDS.index(o.kind) for o in scene.objects])
    clear = most >= _LEAST_INK
    return np.where(clear, colour[owner], unclear), np.where(clear, kind[owner], unclear)
