"""PixelPrune before a vision tower of Qwen2.5-VL's width: cells that repeat, FLOPs and time saved.

    python benchmarks/pixelprune.py [--side 560] [--rounds 3]

Pages and screens are drawn here: lines of text on white, windows with flat areas, and noise in
which nothing repeats. The tower has random weights and two layers, one with windows and one
without, of the width of Qwen2.5-VL-7B's; the share of cells does not depend on it. Times are of
features of images, the choice of cells included.
"""

from __future__ import annotations

import argparse

from _bench import ratios, save, turns, warm_heap

if __name__ == "__main__":
    warm_heap()

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLImageProcessorPil

import foveate
from foveate.methods import PixelPrune

WORDS = (
    "the", "cells", "of", "a", "page", "that", "repeat", "what", "stands", "beside", "them", "tell",
    "an", "encoder", "nothing", "new",
)  # fmt: skip
SIDES = (560, 1120, 1680)  # of images whose cells are counted


def page(side: int, seed: int) -> Image.Image:
    """Paragraphs of dark text on white, with margins."""
    picture, chance = Image.new("RGB", (side, side), "white"), torch.Generator().manual_seed(seed)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=18)
    top = 60
    while top < side - 80:
        count = int(torch.randint(0, max(2, side // 80), (1,), generator=chance))
        chosen = torch.randint(len(WORDS), (count,), generator=chance).tolist()
        draw.text((60, top), " ".join(WORDS[i] for i in chosen), fill=(20, 20, 20), font=font)
        top += 30
    return picture


def screen(side: int, seed: int) -> Image.Image:
    """Windows with a bar, a flat body and a few labels, over a flat desktop."""
    picture, chance = Image.new("RGB", (side, side), (40, 90, 140)), torch.Generator()
    chance.manual_seed(seed)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    for _ in range(max(3, side // 250)):
        left, top, width, height = (
            (torch.rand(4, generator=chance) * torch.tensor([0.6, 0.6, 0.3, 0.3]) * side)
            .long()
            .tolist()
        )
        width, height = width + side // 5, height + side // 5
        draw.rectangle((left, top, left + width, top + height), fill=(236, 236, 236))
        draw.rectangle((left, top, left + width, top + 26), fill=(70, 70, 80))
        for line in range(3):
            chosen = torch.randint(len(WORDS), (3,), generator=chance).tolist()
            label = " ".join(WORDS[i] for i in chosen)
            draw.text((left + 12, top + 40 + 26 * line), label, fill=(30, 30, 30), font=font)
    return picture


def noise(side: int, seed: int) -> Image.Image:
    """Nothing repeats."""
    values = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


DRAWN = {"a page": page, "a screen": screen, "noise": noise}


def tower() -> Qwen2_5_VLModel:
    """A random model whose vision tower is that of Qwen2.5-VL-7B, but for its depth."""
    torch.manual_seed(0)
    vision = {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 1280, "num_heads": 16,
              "intermediate_size": 3420, "out_hidden_size": 64}  # fmt: skip
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 128,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}  # fmt: skip
    ids = {"image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 97}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)).eval()


def handed(picture: Image.Image) -> dict[str, torch.Tensor]:
    """What the model's processor makes of an image, at its own size."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 2**24}
    processor = Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2)
    return dict(processor(images=[picture], size=size, return_tensors="pt"))


def kept(inputs: dict[str, torch.Tensor]) -> float:
    """Share of cells that survive."""
    _, height, width = (
        n // d for n, d in zip(inputs["image_grid_thw"][0].tolist(), (1, 2, 2), strict=True)
    )
    cells = inputs["pixel_values"].reshape(1, height * width, -1)
    tokens = foveate.core.VisualTokens(
        features=lambda: cells, index=torch.arange(height * width)[None], grid=(height, width),
        signals={"pixels": cells},
    )  # fmt: skip
    return float(PixelPrune().reduce(tokens, 1).valid.sum()) / (height * width)


def measure(side: int, rounds: int) -> dict:
    model, results = tower(), {}
    for name, draw in DRAWN.items():
        inputs = handed(draw(side, 0))

        def whole(inputs=inputs) -> None:
            model.get_image_features(**inputs)

        def pruned(inputs=inputs) -> None:
            with foveate.use(model, PixelPrune()):
                model.get_image_features(**inputs)

        grid = inputs["image_grid_thw"].prod() // 4
        ids = torch.full((1, int(grid)), 99)
        with torch.inference_mode():
            types = (ids == 99).int()
            with foveate.use(model, PixelPrune()) as session:
                model(
                    input_ids=torch.cat((ids, torch.ones(1, 4, dtype=torch.long)), 1),
                    mm_token_type_ids=torch.cat((types, torch.zeros(1, 4).int()), 1),
                    **inputs,
                )
            report = session.report()["flops"]
            times = turns({"whole": whole, "pruned": pruned}, rounds, warmup=0)
        results[name] = {
            "tokens": int(grid), "rows": session.record.encoder_tokens, "flops": report,
            "speed-up": ratios(times["whole"], times["pruned"]),
            "kept": {str(of): kept(handed(draw(of, 0))) for of in SIDES},
        }  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=560)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    results = measure(given.side, given.rounds)
    save("pixelprune", {"side": given.side, "rounds": given.rounds, "results": results})


if __name__ == "__main__":
    main()
