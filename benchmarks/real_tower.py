"""What survives on a real tower: CLIP ViT-B/16 on 53 photographs whose objects are known.

    python scripts/real_parts.py --out TOWER
    git clone https://github.com/alexeygrigorev/clothing-dataset-small CLOTHES    # CC0, optional
    python benchmarks/real_tower.py --tower TOWER --data ../shared/data --clothes CLOTHES
    python benchmarks/quality.py                    # figure and page

Every method that the encoder or its features decide chooses among the 196 patches of each
photograph. Methods after the projector share one encoding, in a LLaVA that shows them the features
of the tower's last layer but one; its language model is random and decides nothing. A single
`cls-drop` after layer k ranks by what that layer computes of all patches, so the same encoding
answers for it. Other methods inside the tower run on the tower alone, which also gives their image
embeddings; these are compared with the unpruned ones: cosine, and nearest other photographs. With
`--clothes`, a linear probe that was trained on all tokens reads the embeddings of photographs of
clothes under every method inside the tower, in bfloat16.

What is measured goes to `--out`, and the same command goes on where it was cut off. `--minutes`
ends it early; methods that were measured on all photographs are reported, and the probe on as many
photographs as were done. Without `--clothes`, the result has no probe.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _embeddings import WHOLE, rows
from _probe import probed
from _real_tower_page import BASELINES, RESULT
from _survival import Means, Sources, mean_of
from _tower import Photograph, batch_of, choices, dropped, encoded, llava, load, photographs
from _tower_methods import KEEPS, Name, after, inside, left_out, measured, threshold
from torch import Tensor

from foveate.core import Method, VisualTokens, get_method
from foveate.errors import FoveateError
from foveate.measure.machine import describe_machine
from foveate.methods import Random

ROOT = Path(__file__).resolve().parents[1]
SEEDS, DRAWS, BATCH = 5, 3, 9  # seeds of what survives, draws of embeddings
Cells = tuple[Tensor, Tensor]  # where survivors stand, and where their sources do
Encoded = tuple[Tensor, Cells]  # an embedding, and what was left on the way


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

    def encoded(self, tower: Any, photos: Sequence[Photograph]) -> dict[Name, list[Encoded]]:
        """Name -> photograph -> embedding and cells, of what acts inside the tower, and of none."""
        pixels = torch.cat([photo.pixels for photo in photos])
        equal = {keep: threshold(pixels, keep) for keep in KEEPS}
        wanted: list[Name] = [WHOLE]
        for keep in KEEPS:
            wanted += [("smaller image", keep), *((name, keep) for name in inside(keep, 0.0))]
        wanted += [(slug, 1.0) for slug in measured("vision", removes=False)]
        found = {}
        for name in wanted:
            images = []
            for number, photo in enumerate(photos):
                label = re.sub(r"\W+", "-", f"{name[0]} {name[1]}")
                image = self.piece(f"{label}-{number}", partial(one, tower, photo, name, equal))
                if image is None:
                    break
                images.append(image)
            if len(images) == len(photos):
                found[name] = images
        return found

    def dropped(self, tower: Any, photos: Sequence[Photograph]) -> dict[Name, list[Tensor]]:
        """Name -> seed -> (N, E) embeddings of photographs whose patches are dropped once."""
        found: dict[Name, list[list[Tensor]]] = {}
        for number, photo in enumerate(photos):
            seeds = range(DRAWS * number, DRAWS * (number + 1))
            made = self.piece(f"drops-{number}", partial(dropped, tower, photo.pixels, seeds))
            if made is None:
                return {}
            for name, embeddings in made.items():
                found.setdefault(name, []).append(embeddings)
        return {
            name: [torch.cat(of) for of in zip(*images, strict=True)]
            for name, images in found.items()
        }


def one(tower: Any, photo: Photograph, name: Name, equal: Mapping[float, float]) -> Encoded:
    """Embedding and cells of a photograph under a method inside the tower, or none."""
    method: Method | None = None
    if name[1] < 1 and name[0] != "smaller image":
        method = inside(name[1], equal[name[1]])[name[0]]()
    elif name != WHOLE and name[1] == 1:
        method = get_method(name[0])()
    embedding, made = encoded(tower, batch_of(photo.pixels, name), method)
    return embedding, (made.kept, made.sources)


def sizes(photos: Sequence[Photograph]) -> dict[str, int]:
    """How much was measured."""
    return {
        "photographs": len(photos),
        "objects": sum(len(photo.objects.areas) for photo in photos),
        "small": sum(int(photo.objects.small.sum()) for photo in photos),
        "seeds": SEEDS,
        "draws": DRAWS,
    }


def survival(
    photos: Sequence[Photograph],
    chosen: Mapping[Name, list[list[Cells]]],
    embedded: Mapping[Name, list[Encoded]],
) -> list[dict[str, Any]]:
    """What is left of the objects: a row for each method and budget."""
    within = {
        name: [[cells] for _, cells in images]
        for name, images in embedded.items()
        if name[1] < 1 and name[0] != "smaller image"
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
        row["own"] = {key: mean.to_dict() for key, mean in own.items()}
        row["sources"] = {key: sources[key].to_dict() for key in ("area", "lost")}
        for other in BASELINES:
            base, _ = means[other, row["keep"]]
            row[f"over {other}"] = {key: mean.minus(base[key]) for key, mean in own.items()}
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


def rounded(value: Any) -> Any:
    """The same with floats of five digits."""
    if isinstance(value, Mapping):
        return {key: rounded(of) for key, of in value.items()}
    if isinstance(value, list):
        return [rounded(of) for of in value]
    return round(value, 5) if isinstance(value, float) else value


def written(result: Mapping[str, Any]) -> str:
    """A result as JSON, each row of a table on a line of its own."""
    rows: list[str] = []

    def lines(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            rows.extend(json.dumps(row) for row in value)
            return [f"row {len(rows) - len(value) + n}" for n in range(len(value))]
        if isinstance(value, Mapping):
            return {key: lines(of) for key, of in value.items()}
        return value

    text = json.dumps(lines(result), indent=1)
    return re.sub(r'"row (\d+)"', lambda found: rows[int(found[1])], text) + "\n"


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--clothes", type=Path, help="photographs of the linear probe")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "real-tower")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(given.out, time.time() + 60 * given.minutes)
    try:
        tower, photos = load(given.tower), list(photographs(given.data))
        chosen = run.chosen(llava(tower), photos)
        embedded = run.encoded(tower, photos)
        drops = run.dropped(tower, photos)
        of_clothes = probed(tower, given.clothes, run.piece) if given.clothes else {}
    except FoveateError as error:
        sys.exit(f"error: {error}")
    if not chosen:
        sys.exit("error: there was no time for all photographs; the same command goes on")
    stacked = {name: [torch.stack([of for of, _ in found])] for name, found in embedded.items()}
    result = {
        "machine": {**describe_machine(), "dtype": "float32", "attention": "sdpa"},
        "tower": "CLIP ViT-B/16, 224 px, int8 weights as float32",
        "sizes": sizes(photos),
        "left out": left_out(),
        "survival": survival(photos, chosen, embedded),
        "embeddings": rows(stacked | drops),
        "probe": of_clothes,
    }
    RESULT.write_text(written(rounded(result)), encoding="utf-8")
    print(f"saved {RESULT}")


if __name__ == "__main__":
    main()
