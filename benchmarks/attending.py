"""Methods that compute the attention of an encoder layer in another way: their time and FLOPs,
beside the plain kernel and beside a plain transcription of each, with which they are compared.

    python benchmarks/attending.py [--width 1024] [--rounds 7]

One layer's attention on random queries, keys and values of 16 heads, batch 1; projections are left
out, and counted apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _bench import ratios, save, turns, warm_heap

if __name__ == "__main__":
    warm_heap()

import torch
from torch import Tensor
from transcriptions import _attention as plain

from foveate.core import Approximate, LayerAttention, LayerShape, Step
from foveate.methods import BiFormer, FastVGGT
from foveate.methods.biformer import blocks, gathered, route

HEADS = 16
STEP = Step("vision", effects=("attend",))
Contender = Callable[[LayerAttention], Tensor]


def cases(width: int) -> dict[str, tuple[LayerShape, Approximate, dict[str, Contender]]]:
    """Name -> shape, method, and what it is compared with: the first must agree."""
    image = LayerShape(77 * 77, 0, (77, 77), 1, width)
    video = LayerShape(12 * 500, 0, (20, 25), 12, width)
    merging, routing = FastVGGT(), BiFormer()
    index = blocks(image, routing.regions)

    def merged(shape: LayerShape) -> dict[str, Contender]:
        into = merging.destinations(shape)
        return {
            "transcription": lambda layer: plain.fastvggt(
                layer, into, merging.ratio, merging.protect
            )
        }

    routed: dict[str, Contender] = {
        "transcription": lambda layer: plain.biformer(layer, routing.regions, routing.topk),
        "boolean mask": lambda layer: plain.biformer_by_mask(
            layer, index, _routed(layer, index, routing.topk)
        ),
    }
    return {
        "fastvggt, an image of 77 x 77": (image, merging, merged(image)),
        "fastvggt, 12 frames of 20 x 25": (video, merging, merged(video)),
        "biformer, an image of 77 x 77": (image, routing, routed),
    }


def _routed(layer: LayerAttention, index: Tensor, topk: int) -> Tensor:
    return route(gathered(layer.query, index), gathered(layer.key, index), index, topk)


def layer_of(shape: LayerShape) -> LayerAttention:
    """A layer's attention on random states, which are like those beside them."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, shape.rows, shape.width, generator=generator)
    states = states + states.roll(1, 1)
    query, key, value = (
        (states @ torch.randn(shape.width, shape.width, generator=generator) / shape.width**0.5)
        .unflatten(2, (HEADS, -1))
        .transpose(1, 2)
        for _ in range(3)
    )

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, mask).transpose(1, 2).contiguous()

    scaling = (shape.width // HEADS) ** -0.5
    rows = torch.arange(shape.rows)[:, None]
    return LayerAttention(query, key, value, None, scaling, rows, states, shape, kernel)


def measure(
    shape: LayerShape, method: Approximate, others: dict[str, Contender], rounds: int
) -> dict[str, Any]:
    layer = layer_of(shape)
    tokens: Any = None  # these methods read nothing of it
    runs: dict[str, Callable[[], object]] = {
        "plain": layer.plain,
        "foveate": lambda: method.attend(tokens, layer),
    }
    runs |= {name: (lambda run=run: run(layer)) for name, run in others.items()}  # type: ignore[misc]
    with torch.inference_mode():
        got = method.attend(tokens, layer)
        agree = {name: float((run(layer) - got).abs().max()) for name, run in others.items()}
        times = turns(runs, rounds)
    whole = 4 * shape.width * shape.rows**2
    projections = 8 * shape.width**2 * shape.rows
    flops = method.attend_flops(STEP, shape)
    return {
        "tokens": shape.rows,
        "rounds": rounds,
        "GFLOPs": {"plain": whole / 1e9, "method": flops / 1e9, "projections": projections / 1e9},
        "predicted": whole / flops,
        "predicted with projections": (whole + projections) / (flops + projections),
        "largest difference": agree,
        "speed-up": {name: ratios(times["plain"], times[name]) for name in ("foveate", *others)},
        "over the transcription": ratios(times["transcription"], times["foveate"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = {}
    for name, (shape, method, others) in cases(arguments.width).items():
        rows[name] = row = measure(shape, method, others, arguments.rounds)
        print(name, f"predicted {row['predicted']:.2f}x, differ by {row['largest difference']}")
        for contender, spread in row["speed-up"].items():
            print(
                f"  {contender:14} {spread['median']:5.2f}x "
                f"({spread['q25']:.2f} to {spread['q75']:.2f})"
            )
    save("attending", {"width": arguments.width, "heads": HEADS, "rows": rows})


if __name__ == "__main__":
    main()
