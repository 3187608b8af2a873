"""ToMe on a ViT-S/16 at 224 px: measured speed-up over what FLOPs predict, and the cost of r = 0.

    python benchmarks/tome.py [--r 8 13] [--batch 16] [--rounds 9]

A random encoder, SDPA on, proportional attention on. Predictions count the encoder's own products
on the rows that each layer sees; matching and merging are not predicted, so they count against us.
"""

from __future__ import annotations

import argparse

from _bench import ratios, save, turns, warm_heap

warm_heap()

import torch  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification  # noqa: E402

import foveate  # noqa: E402
from foveate.methods import ToMe  # noqa: E402


def vit_small() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536,
        image_size=224, patch_size=16, num_labels=1000,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def measure(rs: list[int], batch: int, rounds: int) -> dict:
    model = vit_small()
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    methods = {f"r = {r}": ToMe(r=r) for r in (0, *rs)} | {"keep = 1.0": ToMe(keep=1.0)}

    def plain() -> None:
        model(pixels)

    def merged(method: ToMe):
        def run() -> None:
            with foveate.use(model, method):
                model(pixels)

        return run

    with torch.inference_mode():
        rows, flops_ratio = {}, {}
        for name, method in methods.items():
            with foveate.use(model, method) as session:
                model(pixels)
            rows[name] = session.record.encoder_tokens
            flops_ratio[name] = session.report()["flops"]["ratio"]
        contenders = {"all tokens": plain} | {n: merged(m) for n, m in methods.items()}
        times = turns(contenders, rounds)
    result = {}
    for name in methods:
        speedup = ratios(times["all tokens"], times[name])
        predicted = 1 / flops_ratio[name]
        result[name] = {
            "rows left": rows[name][-1][1],
            "speed-up": speedup,
            "predicted": predicted,
            "measured / predicted": speedup["median"] / predicted,
        }
    return {"batch": batch, "rounds": rounds, "rows": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--r", type=int, nargs="+", default=[8, 13])
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    results = [measure(arguments.r, batch, arguments.rounds) for batch in arguments.batch]
    for result in results:
        print(f"\nbatch {result['batch']}, {result['rounds']} rounds")
        for name, row in result["rows"].items():
            s = row["speed-up"]
            print(
                f"  {name:10} {s['median']:5.2f}x ({s['q25']:.2f} to {s['q75']:.2f}), predicted "
                f"{row['predicted']:.2f}x, ratio {row['measured / predicted']:.3f}"
            )
    save("tome", {"model": "random ViT-S/16, 224 px, 12 layers", "results": results})


if __name__ == "__main__":
    main()
