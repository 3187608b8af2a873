"""Methods inside a ViT-S/16 at 224 px: measured speed-up over what FLOPs predict.

    python benchmarks/encoders.py [--batch 16] [--rounds 9]

A random encoder, SDPA on. Predictions count the encoder's own products on the rows that each layer
sees; what methods compute to choose or merge is not predicted, so it counts against them. With
r = 0 and keep = 1.0 nothing is removed. Three methods run beside plain transcriptions of their
cards, and logits of both are compared.
"""

from __future__ import annotations

import argparse

from _bench import ratios, save, turns, warm_heap

warm_heap()

import torch  # noqa: E402
from transcriptions import _encoders as plain  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification  # noqa: E402

import foveate  # noqa: E402
from foveate.core import Method  # noqa: E402
from foveate.methods import GTPViT, TokenTransforming, ToMe, ZeroTPrune  # noqa: E402

METHODS = {
    "tome, r = 0": ToMe(r=0),
    "tome, keep = 1.0": ToMe(keep=1.0),
    "tome, r = 8": ToMe(r=8),
    "tome, r = 13": ToMe(r=13),
    "gtp-vit, r = 8": GTPViT(r=8),
    "gtp-vit, r = 8, token_scale": GTPViT(r=8, token_scale=True),
    "zero-tprune": ZeroTPrune(),
    "token-transforming": TokenTransforming(),
}
TRANSCRIPTIONS = {
    "gtp-vit, r = 8": plain.gtp_vit,
    "zero-tprune": plain.zero_tprune,
    "token-transforming": plain.token_transforming,
}


def vit_small() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536,
        image_size=224, patch_size=16, num_labels=1000,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def measure(batch: int, rounds: int) -> dict:
    model = vit_small()
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))

    def whole() -> None:
        model(pixels)

    def transcribed(name: str):
        return lambda: TRANSCRIPTIONS[name](model, pixels)

    def reduced(method: Method):
        def run() -> None:
            with foveate.use(model, method):
                model(pixels)

        return run

    result = {}
    with torch.inference_mode():
        for name, method in METHODS.items():
            with foveate.use(model, method) as session:
                logits = model(pixels).logits
            rows, ratio = session.record.encoder_tokens, session.report()["flops"]["ratio"]
            result[name] = {"rows left": rows[-1][1], "FLOPs": ratio, "predicted": 1 / ratio}
            if name in TRANSCRIPTIONS:
                apart = (transcribed(name)() - logits).abs().max()
                result[name]["apart from the transcription"] = apart.item()
        times = turns(
            {"all tokens": whole}
            | {name: reduced(method) for name, method in METHODS.items()}
            | {("transcription", name): transcribed(name) for name in TRANSCRIPTIONS},
            rounds,
        )
    for name, found in result.items():
        found["speed-up"] = ratios(times["all tokens"], times[name])
        found["measured / predicted"] = found["speed-up"]["median"] / found["predicted"]
        if name in TRANSCRIPTIONS:
            found["over the transcription"] = ratios(times["transcription", name], times[name])
    return {"batch": batch, "rounds": rounds, "rows": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    result = measure(arguments.batch, arguments.rounds)
    for name, row in result["rows"].items():
        s = row["speed-up"]
        print(
            f"  {name:28} FLOPs {row['FLOPs'] - 1:+.1%}, {s['median']:5.2f}x ({s['q25']:.2f} to "
            f"{s['q75']:.2f}), predicted {row['predicted']:.2f}x, ratio "
            f"{row['measured / predicted']:.3f}"
        )
        if "over the transcription" in row:
            s, apart = row["over the transcription"], row["apart from the transcription"]
            print(
                f"{'':30} over its transcription {s['median']:5.2f}x ({s['q25']:.2f} to "
                f"{s['q75']:.2f}), logits {apart:.1e} apart"
            )
    save("encoders", {"model": "random ViT-S/16, 224 px, 12 layers", "results": result})


if __name__ == "__main__":
    main()
