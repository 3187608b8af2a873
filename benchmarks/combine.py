"""Fewer tokens and smaller weights: speed-up of a prefill by each, and of both over the product.

    python benchmarks/combine.py [--visual 576] [--rounds 9]

A random Llama of 512 x 8, 64 text tokens, batch 1. Weights: every MLP halved by torch-pruning;
quantised by torchao to int8, with activations quantised as they come or left alone.
"""

from __future__ import annotations

import argparse
import copy
from importlib.metadata import version

from _bench import prompt, random_llava, ratios, save, turns, warm_heap

warm_heap()

import torch  # noqa: E402
import torch_pruning as pruning  # noqa: E402
from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import foveate  # noqa: E402
from foveate.measure.memory import weight_bytes  # noqa: E402

METHODS = {"divprune 25 %": ("divprune", {"keep": 0.25}), "pyramiddrop": ("pyramiddrop", {})}


def halve(model) -> None:
    """Take every other neuron out of each MLP of the decoder."""
    for layer in model.model.language_model.layers:
        gone = list(range(0, layer.mlp.down_proj.in_features, 2))
        pruning.prune_linear_out_channels(layer.mlp.gate_proj, gone)
        pruning.prune_linear_out_channels(layer.mlp.up_proj, gone)
        pruning.prune_linear_in_channels(layer.mlp.down_proj, gone)


WEIGHTS = {
    "MLPs halved": halve,
    "int8 weights and activations": lambda model: quantize_(
        model.model.language_model, Int8DynamicActivationInt8WeightConfig()
    ),
    "int8 weights": lambda model: quantize_(model.model.language_model, Int8WeightOnlyConfig()),
}


def measure(visual: int, rounds: int) -> dict:
    plain = random_llava(512, 8, 8, 1408)
    inputs, models = prompt(plain, visual), {"": plain}
    for name, shrink in WEIGHTS.items():
        models[name] = copy.deepcopy(plain)
        shrink(models[name])

    def runner(model, name):
        def run() -> None:
            model(**inputs)

        def pruned() -> None:
            slug, settings = METHODS[name]
            with foveate.use(model, slug, **settings):
                model(**inputs)

        return pruned if name else run

    contenders = {
        (tokens, weights): runner(model, tokens)
        for weights, model in models.items()
        for tokens in ("", *METHODS)
    }
    with torch.inference_mode():
        times = turns(contenders, rounds)
        rows = [row(times, tokens, weights) for weights in WEIGHTS for tokens in METHODS]
    size = {name or "plain": weight_bytes(model) for name, model in models.items()}
    return {"visual tokens": visual, "rounds": rounds, "weight bytes": size, "rows": rows}


def row(times, tokens: str, weights: str) -> dict:
    """One method on one model, against the plain model with all tokens."""
    base = times["", ""]
    alone, shrunk = ratios(base, times[tokens, ""]), ratios(base, times["", weights])
    both = ratios(base, times[tokens, weights])
    product = alone["median"] * shrunk["median"]
    return {
        "tokens": tokens,
        "weights": weights,
        "speed-up by tokens": alone,
        "speed-up by weights": shrunk,
        "speed-up by both": both,
        "both / product": both["median"] / product,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visual", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    result = measure(arguments.visual, arguments.rounds)
    for name, size in result["weight bytes"].items():
        print(f"{name:30} {size / 2**20:6.1f} MiB of weights")
    for found in result["rows"]:
        parts = [found[f"speed-up by {what}"]["median"] for what in ("tokens", "weights", "both")]
        print(
            f"{found['tokens']:14} {found['weights']:30} {parts[0]:.2f}x, {parts[1]:.2f}x, both "
            f"{parts[2]:.2f}x, {found['both / product']:.3f} of the product"
        )
    packages = {name: version(name) for name in ("torch-pruning", "torchao")}
    save(
        "combine",
        {"model": "random Llama 512 x 8, MLP 1408, 64 text tokens", **packages, "results": result},
    )


if __name__ == "__main__":
    main()
