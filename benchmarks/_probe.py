"""A linear probe of a tower, on photographs of clothes: the head is trained on all tokens.

The photographs are those of github.com/alexeygrigorev/clothing-dataset-small (CC0), as the folders
`train` and `test` with a folder for each of ten classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _embeddings import WHOLE, probe, rows
from _tower import batch_of, centre, dropped, embeddings_of, pixels_of
from _tower_methods import KEEPS, Name, inside, measured, threshold
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from foveate.core import Method, get_method
from foveate.errors import FoveateError
from foveate.methods import ClsDrop

EACH, BATCH, COMPARED = 50, 31, ("all tokens", "tome", "cls-drop, layer 3", "gtp-vit")
Piece = Callable[[str, Callable[[], Any]], Any]
"""Makes a piece of a run unless it was made before; `None` where there is no time."""


def photographs(folder: Path, part: str) -> list[tuple[Path, int]]:
    """Files of a part and the numbers of their classes, in an order that mixes classes.

    Raises:
        FoveateError: they are not there.
    """
    classes = sorted(found for found in (folder / part).glob("*") if found.is_dir())
    files = [(file, n) for n, kind in enumerate(classes) for file in sorted(kind.glob("*.jpg"))]
    if not files:
        raise FoveateError(
            f"there is no {part}/CLASS/*.jpg in {folder}; clone "
            "github.com/alexeygrigorev/clothing-dataset-small"
        )
    return sorted(files, key=lambda pair: pair[0].name)  # names are random


def trained_on(files: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """The first `EACH` of each class."""
    seen: dict[int, int] = {}
    chosen = []
    for file, label in files:
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= EACH:
            chosen.append((file, label))
    return chosen


def shown(files: Sequence[tuple[Path, int]]) -> Tensor:
    """(N, 3, 224, 224) of files, as CLIP is shown them."""
    return torch.cat([pixels_of(centre(Image.open(file).convert("RGB"))) for file, _ in files])


def asked(equal: Mapping[float, float]) -> Iterator[tuple[Name, Method | None]]:
    """What is measured besides single drops; `None` for all tokens, and for a smaller image."""
    yield WHOLE, None
    for slug in measured("vision", removes=False):
        yield (slug, 1.0), get_method(slug)()
    for keep in KEEPS:
        yield ("smaller image", keep), None
        for name, make in inside(keep, equal[keep]).items():
            yield (name, keep), make()


def every(
    tower: CLIPVisionModelWithProjection, pixels: Tensor, equal: Mapping[float, float], seed: int
) -> dict[Name, Tensor]:
    """(N, E) embeddings of a batch under everything that is measured."""
    made = {
        name: embeddings_of(tower, batch_of(pixels, name), method) for name, method in asked(equal)
    }
    return made | {name: found for name, (found,) in dropped(tower, pixels, (seed,)).items()}


def rounding(
    towers: Sequence[CLIPVisionModelWithProjection], pixels: Tensor, equal: float
) -> dict[str, Any]:
    """How embeddings of two towers agree, with and without methods."""
    made: dict[str, Any] = {}
    drop = ClsDrop((3,), 0.25)
    methods = {WHOLE[0]: lambda: None, "cls-drop, layer 3": lambda: drop, **inside(0.25, equal)}
    for name in COMPARED:
        one, other = (embeddings_of(tower, pixels, methods[name]()) for tower in towers)
        cosines = (one * other).sum(1)
        made[name] = {"mean": float(cosines.mean()), "least": float(cosines.min())}
    return {"images": len(pixels), "keep": 0.25, "cosine": made}


def probed(tower: CLIPVisionModelWithProjection, folder: Path, piece: Piece) -> dict[str, Any]:
    """The probe's part of the result, on as many photographs as there is time for.

    Raises:
        FoveateError: there are no photographs.
    """
    train, test = trained_on(photographs(folder, "train")), photographs(folder, "test")
    half = copy.deepcopy(tower).to(torch.bfloat16)
    equal = piece("clothes-equal", lambda: _thresholds(shown(train[:BATCH])))
    features = piece("clothes-train", lambda: _in_batches(half, train))
    if equal is None or features is None:
        return {}
    found: dict[Name, list[Tensor]] = {}
    shown_labels: list[int] = []
    for start in range(0, len(test), BATCH):
        files = test[start : start + BATCH]

        def make(files: Sequence[tuple[Path, int]] = files, seed: int = start) -> Any:
            return every(half, shown(files), equal, seed)

        part = piece(f"clothes-{start}", make)
        if part is None:
            continue
        shown_labels += [label for _, label in files]
        for name, embeddings in part.items():
            found.setdefault(name, []).append(embeddings)
    compared = piece(
        "clothes-rounding", lambda: rounding((tower, half), shown(test[: BATCH // 2]), equal[0.25])
    )
    if not found:
        return {}
    weight, bias = probe(features, torch.tensor([label for _, label in train]))
    embedded = {name: [torch.cat(parts)] for name, parts in found.items()}
    labels = torch.tensor(shown_labels)
    return {
        "photographs": len(labels), "of": len(test), "trained on": len(train),
        "classes": len(weight), "bfloat16": compared,
        "rows": rows(embedded, lambda x: F.linear(x, weight, bias).argmax(1) == labels),
    }  # fmt: skip


def _thresholds(pixels: Tensor) -> dict[float, float]:
    return {keep: threshold(pixels, keep) for keep in KEEPS}


def _in_batches(tower: CLIPVisionModelWithProjection, files: Sequence[tuple[Path, int]]) -> Tensor:
    parts = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    return torch.cat([embeddings_of(tower, shown(part), None) for part in parts])
