"""What survives on a real tower: CLIP ViT-B/16 on 53 photographs whose objects are known.

    python scripts/real_parts.py --out TOWER
    python benchmarks/real_tower.py --tower TOWER --data ../shared/data
    python benchmarks/quality.py                    # figure and page

Every method that the encoder or its features decide chooses among the 196 patches of each
photograph. Methods after the projector share one encoding, in a LLaVA that shows them the features
of the tower's last layer but one; its language model is random and decides nothing. A single
`cls-drop` after layer k ranks by what that layer computes of all patches, so the same encoding
answers for it. Other methods inside the tower run on the tower alone, which also gives their image
embeddings; these are compared with the unpruned ones: cosine, and nearest other photographs.

What is measured goes to `--out`, and the same command goes on where it was cut off. `--minutes`
ends it early; methods that were measured on all photographs are reported.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _real_tower_page import RESULT
from _survival import Means, Sources, agreement, mean_of
from _tower import Name, Photograph, choices, encoded, llava, load, photographs
from torch import Tensor

from foveate.core import Method, VisualTokens, get_method
from foveate.errors import FoveateError
from foveate.measure.machine import describe_machine
from foveate.methods import VTCCLS, ClsDrop, Random, ToMe

ROOT = Path(__file__).resolve().parents[1]
KEEPS = (0.25, 0.5, 0.125, 0.0625)  # the most telling first
AFTER = (
    "divprune", "downsample", "fastervlm", "fopru", "hiprune", "holov", "idpruner",
    "llava-prumerge", "prunesid", "scope", "todre", "uniform", "vflowopt", "visionzip",
    "vispruner", "vtc-cls",
)  # fmt: skip
SEEDS, BATCH, LAYERS = 5, 9, 12
PROBED = (3, 9)  # layers in which patches are dropped for the embeddings
Cells = tuple[Tensor, Tensor]  # where survivors stand, and where their sources do


@dataclass(frozen=True)
class RandomDrop(ClsDrop):
    """The control of `cls-drop`: as many patches at the same place, whatever they show."""

    seed: int = 0

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Random numbers: (G, V)."""
        return torch.rand(tokens.index.shape, generator=torch.Generator().manual_seed(self.seed))


def stepwise(keep: float) -> tuple[float, float, float]:
    """Three equal cuts that end at `keep`."""
    return keep ** (1 / 3), keep ** (2 / 3), keep


def tome(keep: float, tokens: int = 196) -> ToMe:
    """Equal numbers in all layers, or equal shares where those would be over half of a layer."""
    if keep * tokens >= tokens / (LAYERS + 1) + 1:
        return ToMe(keep=keep)
    left = [round(tokens * keep ** (layer / LAYERS)) for layer in range(LAYERS)]
    left.append(int(tokens * keep))
    return ToMe(r=tuple(a - b for a, b in pairwise(left)))


def inside(keep: float, seed: int) -> dict[str, Callable[[], Method]]:
    """Methods that run inside the tower, those that need it most first."""
    made: dict[str, Callable[[], Method]] = {
        "tome": lambda: tome(keep),
        "flowcut": lambda: get_method("flowcut")(keep=keep),
    }
    for layer in PROBED:
        made[f"cls-drop, layer {layer}"] = lambda at=layer: ClsDrop((at,), keep)
        made[f"random, layer {layer}"] = lambda at=layer: RandomDrop((at,), keep, seed=seed)
    made["gtp-vit"] = lambda: get_method("gtp-vit")(keep=keep)
    for slug in ("zero-tprune", "token-transforming"):
        made[slug] = lambda slug=slug: get_method(slug)(keep=stepwise(keep))
    return made


def after() -> dict[Name, Method]:
    """Methods that one encoding answers for."""
    made: dict[Name, Method] = {(s, k): get_method(s)(keep=k) for s in AFTER for k in KEEPS}
    for layer in range(LAYERS):
        for keep in KEEPS:
            count = ClsDrop.rounding(196 * keep)
            made[f"cls-drop, layer {layer}", keep] = VTCCLS(keep=count, layers=(layer,))
    return made


def by_chance(keep: float, seed: int) -> Sources:
    """What `random` keeps of an image."""
    method, made = Random(keep=keep, seed=seed), Sources(196)
    index = torch.arange(196)[None]
    tokens = VisualTokens(lambda: index[..., None].float(), index, (14, 14))
    made.reduce(index, method.reduce(tokens, int(196 * keep)))
    return made


class Run:
    """A run that keeps what it has measured in a folder, and goes on from there.

    Args:
        folder: where results of each piece are kept.
        until: when to stop, in seconds as `time.time` counts.
    """

    def __init__(self, folder: Path, until: float) -> None:
        self.folder, self.until = folder, until
        folder.mkdir(parents=True, exist_ok=True)

    def piece(self, name: str, make: Callable[[], Any]) -> Any:
        """A piece, made now unless it was made before; `None` where there is no time."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            if time.time() > self.until:
                return None
            torch.save(make(), path)
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        return torch.load(path)

    def chosen(self, model: Any, photos: Sequence[Photograph]) -> dict[Name, list[list[Cells]]]:
        """Name -> photograph -> seed -> cells, of methods after the projector."""
        found: dict[Name, list[list[Cells]]] = {}
        asked = after()
        for start in range(0, len(photos), BATCH):
            pixels = torch.cat([photo.pixels for photo in photos[start : start + BATCH]])

            def make(pixels: Tensor = pixels) -> dict[Name, list[Cells]]:
                made = choices(model, pixels, asked)
                return {n: [(s.kept, s.sources) for s in images] for n, images in made.items()}

            part = self.piece(f"after-{start}", make)
            if part is None:
                return {}
            for name, images in part.items():
                found.setdefault(name, []).extend([cells] for cells in images)
        for keep in KEEPS:
            drawn = [
                [by_chance(keep, SEEDS * i + s) for s in range(SEEDS)] for i in range(len(photos))
            ]
            found["random", keep] = [[(s.kept, s.sources) for s in of] for of in drawn]
        return found

    def encoded(
        self, tower: Any, photos: Sequence[Photograph]
    ) -> dict[Name, list[tuple[Tensor, Cells]]]:
        """Name -> photograph -> embedding and cells, of methods inside the tower, and of none."""
        found = {}
        wanted: list[Name] = [("all tokens", 1.0)]
        wanted += [(name, keep) for keep in KEEPS for name in inside(keep, 0)]
        for name in wanted:
            images = []
            for number, photo in enumerate(photos):
                label = re.sub(r"\W+", "-", f"{name[0]} {name[1]}")
                make = functools.partial(one, tower, photo, name, number)
                image = self.piece(f"{label}-{number}", make)
                if image is None:
                    break
                images.append(image)
            if len(images) == len(photos):
                found[name] = images
        return found


def one(tower: Any, photo: Photograph, name: Name, seed: int) -> tuple[Tensor, Cells]:
    """Embedding and cells of a photograph under a method inside the tower, or none."""
    method = None if name[1] == 1.0 else inside(name[1], seed)[name[0]]()
    embedding, made = encoded(tower, photo.pixels, method)
    return embedding, (made.kept, made.sources)


def sizes(photos: Sequence[Photograph]) -> dict[str, int]:
    """How much was measured."""
    return {
        "photographs": len(photos),
        "objects": sum(len(photo.objects.areas) for photo in photos),
        "small": sum(int(photo.objects.small.sum()) for photo in photos),
        "seeds": SEEDS,
    }


def survival(
    photos: Sequence[Photograph],
    chosen: Mapping[Name, list[list[Cells]]],
    embedded: Mapping[Name, list[tuple[Tensor, Cells]]],
) -> list[dict[str, Any]]:
    """What is left of the objects: a row for each method and budget."""
    within = {
        name: [[cells] for _, cells in images]
        for name, images in embedded.items()
        if name not in chosen and not name[0].startswith(("random", "all"))
    }
    means, rows = {}, []
    for name, images in {**chosen, **within}.items():
        tokens = [float(kept.sum()) for of in images for kept, _ in of]
        means[name] = tuple(left(photos, images, which) for which in (0, 1))
        rows.append({
            "method": name[0], "keep": name[1], "tokens": sum(tokens) / len(tokens),
            "inside": name in within or name[0].startswith("cls-drop"),
        })  # fmt: skip
    for row in rows:
        own, sources = means[row["method"], row["keep"]]
        grid, _ = means["uniform", row["keep"]]
        row["own"] = {key: mean.to_dict() for key, mean in own.items()}
        row["sources"] = {key: mean.to_dict() for key, mean in sources.items()}
        row["over uniform"] = {key: mean.minus(grid[key]) for key, mean in own.items()}
    return rows


def left(
    photos: Sequence[Photograph], images: Sequence[Sequence[Cells]], which: int
) -> dict[str, Means]:
    """Means over photographs; `which` is 0 for cells of survivors, and 1 for their sources."""
    found = [
        [photo.objects.left(cells[which]) for cells in of]
        for photo, of in zip(photos, images, strict=True)
    ]
    return {
        key: Means.of([mean_of([seed[key] for seed in of]) for of in found]) for key in found[0][0]
    }


def embeddings(embedded: Mapping[Name, list[tuple[Tensor, Cells]]]) -> list[dict[str, Any]]:
    """How far pruning inside the tower moves its image embeddings: a row for each method."""
    if ("all tokens", 1.0) not in embedded:
        return []
    whole = torch.stack([of for of, _ in embedded["all tokens", 1.0]])
    rows = []
    for (method, keep), images in embedded.items():
        if keep < 1:
            found = agreement(torch.stack([of for of, _ in images]), whole)
            means = {key: Means.of(pairs).to_dict() for key, pairs in found.items()}
            rows.append({"method": method, "keep": keep, **means})
    return rows


def rounded(value: Any) -> Any:
    """The same with floats of five digits."""
    if isinstance(value, Mapping):
        return {key: rounded(of) for key, of in value.items()}
    if isinstance(value, list):
        return [rounded(of) for of in value]
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "real-tower")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        tower, photos = load(given.tower), list(photographs(given.data))
    except FoveateError as error:
        sys.exit(f"error: {error}")
    run = Run(given.out, time.time() + 60 * given.minutes)
    chosen = run.chosen(llava(tower), photos)
    embedded = run.encoded(tower, photos)
    if not chosen:
        sys.exit("error: there was no time for all photographs; the same command goes on")
    result = {
        "machine": {**describe_machine(), "dtype": "float32", "attention": "sdpa"},
        "tower": "CLIP ViT-B/16, 224 px, int8 weights as float32",
        "sizes": sizes(photos),
        "survival": survival(photos, chosen, embedded),
        "embeddings": embeddings(embedded),
    }
    RESULT.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    print(f"saved {RESULT}")


if __name__ == "__main__":
    main()
