"""Training steps: time and peak memory with PyramidDrop over training with all visual tokens.

    python benchmarks/training.py [--visual 576 2880] [--rounds 9 3]

A random Llama of 768 x 16, 64 text tokens of which 16 are learned, batch 1, fp32, no checkpointing.
A step is a forward pass, a backward pass and AdamW; the vision tower is frozen and left out. AdamW
costs the same with any number of tokens and is timed apart, so that both are given: the ratio of
whole steps, and that of the two passes. FLOPs predict the second: a backward pass counts twice a
forward one, the head is at full length on both sides, and the method's scores have no backward
pass. Peak memory is what tensors hold at the worst moment of the passes, gradients included, less
the weights and the optimizer's state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from _bench import prompt, random_llava, ratios, save, turns, warm_heap

MODEL = (768, 16, 12, 2048)
TEXT, LEARNED = 64, 16
ARMS = ("all tokens", "pyramiddrop")
GPU = {
    "model": "LLaVA-1.5-7B-sized, bf16, checkpointing on",
    "status": "not measured: no GPU was at hand",
}


def stepper(arm: str, visual: int) -> tuple[Any, Callable[[], None], Callable[[], Any]]:
    """A model, prepared or not, both passes of a training step with it, and the optimizer's."""
    import torch

    import foveate

    torch.set_num_threads(1)
    model = random_llava(*MODEL).train()
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    inputs = prompt(model, visual, TEXT)
    inputs.pop("logits_to_keep")
    labels = inputs["input_ids"].clone()
    labels[:, :-LEARNED] = -100
    if arm != "all tokens":
        foveate.prepare(model, arm)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def passes() -> None:
        optimizer.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()

    return model, passes, optimizer.step


def predicted(model: Any, visual: int) -> float:
    """Ratio of the FLOPs of a step."""
    from foveate.families import find_family
    from foveate.measure import flops
    from foveate.measure.shapes import TextShape
    from foveate.methods import PyramidDrop

    config, facts, method = model.config, find_family(model), PyramidDrop()
    layers = MODEL[1]
    bounds = [0, *(s.layer for s in method.steps(facts)), layers]
    shares = (1.0, *method.keep)
    tokens = [
        int(share * visual) + TEXT
        for share, (low, high) in zip(shares, pairwise(bounds), strict=True)
        for _ in range(high - low)
    ]
    shape = TextShape.of(config)
    head = flops.head_flops(shape, visual + TEXT) - flops.head_flops(shape)
    before = 3 * (flops.prefill_flops(config, [[visual + TEXT]] * layers) + head)
    after = 3 * (flops.prefill_flops(config, [[count] for count in tokens]) + head)
    scores = sum(flops.text_attention_flops(config, tokens[low - 1]) for low in bounds[1:-1])
    return before / (after + scores)


def measure(visual: int, rounds: int) -> dict[str, Any]:
    """Time and memory of both arms at one number of visual tokens."""
    from foveate.measure.memory import peak_memory

    arms = {arm: stepper(arm, visual) for arm in ARMS}
    for _, passes, optimize in arms.values():
        passes()
        optimize()
    contenders = {arm: passes for arm, (_, passes, _) in arms.items()}
    times = turns({**contenders, "adamw": arms["all tokens"][2]}, rounds)
    wanted = predicted(arms["all tokens"][0], visual)
    speedup = ratios(times["all tokens"], times["pyramiddrop"])
    whole = {arm: [a + b for a, b in zip(times[arm], times["adamw"], strict=True)] for arm in ARMS}
    memory = {arm: peak_memory(passes) for arm, passes in contenders.items()}
    return {
        "visual tokens": visual,
        "rounds": rounds,
        "seconds": {arm: sorted(runs)[len(runs) // 2] for arm, runs in times.items()},
        "step speed-up": ratios(whole["all tokens"], whole["pyramiddrop"]),
        "passes speed-up": speedup,
        "predicted": wanted,
        "measured / predicted": speedup["median"] / wanted,
        "peak bytes": memory,
        "peak ratio": memory["pyramiddrop"] / memory["all tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--rounds", type=int, nargs="+", default=[9, 3])
    parser.add_argument("--dry", action="store_true", help="Do not write the result file.")
    given = parser.parse_args()
    rounds = (given.rounds * len(given.visual))[: len(given.visual)]
    results = [measure(*pair) for pair in zip(given.visual, rounds, strict=True)]
    for row in results:
        s, m = row["passes speed-up"], row["peak bytes"]
        print(
            f"{row['visual tokens']} visual tokens: step {row['step speed-up']['median']:.2f}x, "
            f"passes {s['median']:.2f}x ({s['q25']:.2f} to {s['q75']:.2f}), predicted "
            f"{row['predicted']:.2f}x, measured / predicted "
            f"{row['measured / predicted']:.3f}; peak {m['all tokens'] / 2**20:.0f} to "
            f"{m['pyramiddrop'] / 2**20:.0f} MiB"
        )
    model = "random Llama 768 x 16, MLP 2048, 64 text tokens, AdamW"
    if not given.dry:
        save("training", {"model": model, "results": results, "gpu": GPU})


if __name__ == "__main__":
    warm_heap()
    main()
