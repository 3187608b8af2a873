"""Prefill: measured speed-up over the speed-up that FLOPs predict, and the cost of idle hooks.

    python benchmarks/prefill.py [--visual 576 2880] [--rounds 9]

A random Llama of 768 x 16, 64 text tokens, batch 1. Predictions count causal attention by halves
and include the score. `native` is a prompt that has 64 visual tokens to begin with.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from _bench import prompt, random_llava, ratios, save, turns, warm_heap

warm_heap()

import torch  # noqa: E402

import foveate  # noqa: E402
from foveate.core import Keep, Scorer, Step  # noqa: E402
from foveate.measure import flops  # noqa: E402
from foveate.methods import FastV, PyramidDrop  # noqa: E402


@dataclass(frozen=True)
class First(Scorer):
    """Keep the first tokens: a pre_llm method that costs nothing, so that only the engine shows."""

    keep: Keep = 64
    positions: str = "renumbered"
    slug, stage, needs, paper = "first", "pre_llm", (), ""

    def steps(self, model):
        return (Step("pre_llm"),)

    def scores(self, tokens):
        return -tokens.index.float()


METHODS = {
    "pyramiddrop": PyramidDrop(),
    "fastv 50 %": FastV(layer=2, keep=0.5),
    "fastv 25 %": FastV(layer=2, keep=0.25),
    "pre_llm to 64": First(keep=64),
    "hooks, keep all": PyramidDrop(keep=(1.0, 1.0, 1.0)),
}


def measure(visual: int, rounds: int) -> dict:
    model = random_llava(768, 16, 12, 2048)
    text = model.config.text_config
    inputs, native = prompt(model, visual), prompt(model, 64)

    def plain() -> None:
        model(**inputs)

    def small() -> None:
        model(**native)

    def pruned(method):
        def run() -> None:
            with foveate.use(model, method):
                model(**inputs)

        return run

    contenders = {"all tokens": plain, "native 64": small}
    contenders |= {name: pruned(method) for name, method in METHODS.items()}
    with torch.inference_mode():
        records = {}
        for name, method in METHODS.items():
            with foveate.use(model, method) as session:
                model(**inputs)
            records[name] = session.record
        times = turns(contenders, rounds)
    before = flops.prefill_flops(text, [[visual + 64]] * 16)
    rows = {}
    for name, method in METHODS.items():
        after = flops.prefill_flops(text, records[name].layer_tokens)
        for step in method.steps(foveate.families.find_family(model)):
            layers = [layer for need in step.needs for layer in need.layers]
            after += sum(
                flops.text_attention_flops(text, records[name].layer_tokens[max(i - 1, 0)][0])
                for i in layers
            )
        speedup = ratios(times["all tokens"], times[name])
        rows[name] = {
            "speed-up": speedup,
            "predicted": before / after,
            "measured / predicted": speedup["median"] / (before / after),
        }
    rows["pre_llm to 64"]["time / native 64"] = ratios(times["pre_llm to 64"], times["native 64"])
    return {"visual tokens": visual, "rounds": rounds, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    results = [measure(visual, arguments.rounds) for visual in arguments.visual]
    for result in results:
        print(f"\n{result['visual tokens']} visual tokens, {result['rounds']} rounds")
        for name, row in result["rows"].items():
            s = row["speed-up"]
            print(
                f"  {name:16} {s['median']:6.2f}x ({s['q25']:.2f} to {s['q75']:.2f}), predicted "
                f"{row['predicted']:.2f}x, ratio {row['measured / predicted']:.3f}"
            )
        native = result["rows"]["pre_llm to 64"]["time / native 64"]
        print(f"  pre_llm to 64 takes {native['median']:.3f} of a native prompt of 64")
    save(
        "prefill", {"model": "random Llama 768 x 16, MLP 2048, 64 text tokens", "results": results}
    )


if __name__ == "__main__":
    main()
