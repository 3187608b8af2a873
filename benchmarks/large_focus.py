"""Does a trained Region Focus Module find what a question is about on large images?

    python -m recipes.region_focus --out RUN
    python benchmarks/large_focus.py --run RUN

Scenes of 1,152 pixels a side are drawn; only questions about one object that fills less than 0.1 %
of them count. `found` is the share of questions for which a token that survives level 1 shows part
of the object, which is what makes the next level fetch its tile.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import save
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from foveate import tiny
from foveate.large import Reader, RegionFocus, levels, open_image
from foveate.methods import LRSVQA
from foveate.tiny.questions import Question
from foveate.tiny.scenes import Scene
from recipes.region_focus import KINDS, LAYERS, asked

SCALE, SIDE = 3, 1152
PER_SCENE = 8
LARGEST = 1e-3  # share of the image that an object may fill
FIRST_SEED = 5_000_000  # no training scene is drawn from it
KEEPS = (0.05, 0.1, 0.25)


def scenes(count: int) -> list[tuple[Scene, list[Question]]]:
    """Held-out scenes with their questions about one small object."""
    made = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        scene = tiny.draw_scene(seed, objects=(6, 12), size=SIDE, scale=SCALE, per_kind=6)
        filled = [float((scene.owner == i).mean()) for i in range(len(scene.objects))]
        small = {o.box for o, share in zip(scene.objects, filled, strict=True) if share < LARGEST}
        questions = [q for q in asked(scene) if len(q.boxes) == 1 and q.boxes[0] in small]
        made.append((scene, questions[:PER_SCENE]))
    return made


def shown(boxes: Tensor, question: Question) -> bool:
    """Whether one of (K, 4) boxes, as shares of the image, overlaps the evidence."""
    left, top, right, bottom = (edge / SIDE for edge in question.boxes[0])
    overlaps = (boxes[:, 0] < right) & (boxes[:, 2] > left)
    return bool((overlaps & (boxes[:, 1] < bottom) & (boxes[:, 3] > top)).any())


@torch.no_grad()
def level_one(reader: Reader, made: list[tuple[Scene, list[Question]]]) -> dict[str, Any]:
    """Share of questions whose object is found at level 1, for each `keep`."""
    hits: dict[float, list[bool]] = {keep: [] for keep in KEEPS}
    embed = reader.model.get_input_embeddings()
    for scene, questions in made:
        image = open_image(scene.image)
        pyramid = levels(image.size, reader.tile)
        thumbnail = reader.encode(image, pyramid[0], [[0, 0]]).flatten(0, 2)
        tokens = reader.look(image, pyramid[1], pyramid[1].tiles())
        for question in questions:
            before, after = reader.text(f"<image> {question.text}")
            head = torch.cat((embed(before), thumbnail))
            scores = reader.rank(head, tokens, embed(after))
            for keep in KEEPS:
                kept = LRSVQA(keep=keep).chosen(scores, tokens.newline)
                hits[keep].append(shown(tokens.take(kept).boxes(), question))
    return {str(keep): float(np.mean(found)) for keep, found in hits.items()}


@torch.no_grad()
def answers(
    reader: Reader, processor: Any, made: list[tuple[Scene, list[Question]]], most: int
) -> dict[str, float]:
    """Whole readings: right answers, objects in what the language model gets, tiles encoded."""
    right, found, tiles = [], [], []
    asked_of = [(scene, q) for scene, questions in made for q in questions[:1]][:most]
    for scene, question in asked_of:
        reading = reader.read(scene.image, f"<image> {question.text}")
        out = reader.model.generate(**reading.inputs, max_new_tokens=3)
        said = processor.decode(
            out[0, reading.inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right.append(said.split()[:1] == [question.answer])
        found.append(shown(reading.rounds[-1].boxes, question))
        tiles.append(reading.tiles)
    count = {"questions": len(right), "tiles": float(np.mean(tiles))}
    return {"right": float(np.mean(right)), "found": float(np.mean(found)), **count}


def contenders(run: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> model and module."""
    shipped, _ = tiny.load()
    adapted = LlavaForConditionalGeneration.from_pretrained(run / "model").eval()
    torch.manual_seed(0)
    return {
        "untrained, copied from the shipped model": (shipped, RegionFocus.of(shipped, LAYERS)),
        "untrained, copied from the adapted model": (adapted, RegionFocus.of(adapted, LAYERS)),
        "trained": (adapted, RegionFocus.load(run / "focus", adapted)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="what recipes.region_focus wrote")
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--readings", type=int, default=30)
    arguments = parser.parse_args()
    _, processor = tiny.load()
    made = scenes(arguments.scenes)
    result: dict[str, Any] = {}
    for name, (model, focus) in contenders(arguments.run).items():
        begun = time.process_time()
        reader = Reader(model, processor, focus, LRSVQA(keep=0.1))
        result[name] = {"found": level_one(reader, made)}
        result[name]["reading"] = answers(reader, processor, made, arguments.readings)
        print(name, result[name], round(time.process_time() - begun), flush=True)
    log = [json.loads(line) for line in (arguments.run / "log.jsonl").read_text().splitlines()]
    training = {"steps": len(log), "cpu_s": log[-1]["cpu_s"], "first": log[0], "last": log[-1]}
    about = {
        "side": SIDE, "scenes": len(made), "questions": sum(len(q) for _, q in made),
        "kinds": list(KINDS), "largest_share": LARGEST, "layers": list(LAYERS),
    }  # fmt: skip
    save("large_focus", {"scenes": about, "training": training, "modules": result})


if __name__ == "__main__":
    main()
