"""Whether PixelPrune changes answers, on drawn screens that the embedded model is asked about.

    python benchmarks/pixelprune_answers.py [--scenes 60]

A screen here is a scene whose background has one colour, so that cells without an object repeat.
Each question is asked with all tokens, after PixelPrune, and after `uniform` and `divprune` with as
many tokens as PixelPrune left of that image.
"""

from __future__ import annotations

import argparse
from typing import Any

from _bench import save, warm_heap

if __name__ == "__main__":
    warm_heap()

import numpy as np
import torch
from PIL import Image

import foveate
from foveate.bench.stats import wilson
from foveate.tiny import draw_scene, load
from foveate.tiny.scenes import Scene

COLOURS = {"black": (0, 0, 0), "grey": (96, 96, 96), "blue": (40, 90, 140)}
OTHERS = ("uniform", "divprune")
FIRST = 50_000  # seeds of scenes, which training did not use
NOISE = 10  # how far grain of a background strays from its colour, of 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=60, help="of each background")
    given = parser.parse_args()
    model, processor = load()
    results = {
        name: background(model, processor, colour, given.scenes) for name, colour in COLOURS.items()
    }
    save("pixelprune_answers", {"scenes": given.scenes, "results": results})


def background(
    model: Any, processor: Any, colour: tuple[int, int, int], scenes: int
) -> dict[str, Any]:
    """Answers about scenes on one colour: how many are right, and how many stay the same."""
    said: dict[str, list[str]] = {name: [] for name in ("all", "pixelprune", *OTHERS)}
    truth: list[str] = []
    left: list[float] = []
    for number in range(scenes):
        ground = Image.new("RGB", (256, 256), colour)
        scene = draw_scene(FIRST + number, background=ground, per_kind=1)
        image = flat(scene)
        for question in scene.questions:
            inputs = processor(images=image, text=f"<image> {question.text}", return_tensors="pt")
            truth.append(question.answer)
            said["all"].append(answer(model, processor, inputs))
            with foveate.use(model, "pixelprune") as run:
                said["pixelprune"].append(answer(model, processor, inputs))
                tokens = len(run.kept[0]["vision:0"])
            left.append(tokens / 256)
            for name in OTHERS:
                with foveate.use(model, name, keep=tokens):
                    said[name].append(answer(model, processor, inputs))
    return {
        "questions": len(truth),
        "left": sum(left) / len(left),
        **{
            name: {
                "accuracy": counted([a == b for a, b in zip(texts, truth, strict=True)]),
                "same": counted([a == b for a, b in zip(texts, said["all"], strict=True)]),
            }
            for name, texts in said.items()
        },
    }


def flat(scene: Scene) -> Image.Image:
    """The image without the grain that scenes have."""
    pixels = np.array(scene.image)
    colour = np.median(pixels[scene.owner < 0], axis=0).astype(np.uint8)
    grain = np.abs(pixels.astype(int) - colour).max(-1) <= NOISE
    pixels[grain & (scene.owner < 0)] = colour
    return Image.fromarray(pixels)


def answer(model: Any, processor: Any, inputs: Any) -> str:
    """What the model says."""
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def counted(right: list[bool]) -> list[float]:
    """A share, and its 95 % interval."""
    return [sum(right) / len(right), *wilson(sum(right), len(right))]


if __name__ == "__main__":
    main()
