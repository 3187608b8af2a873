"""Depth Anything V2's small model at 518 px: how much faster merging makes it, and what it changes.

    python benchmarks/dense.py [--r 60 100] [--batch 1] [--rounds 9] [--no-picture]

A model of that size with random weights, SDPA on, proportional attention on: 1,370 rows in 12
layers of DINOv2, of which ToMe merges r pairs in each, then neck and head as they are, on feature
maps at full length. Times are of the whole model, and of the backbone alone. Predictions count the
products of the backbone on the rows that each layer sees. The picture is written to
`docs/dense.png`: what random weights make of an image is no depth, but shows where merging changes
it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _bench import ratios, save, turns, warm_heap

warm_heap()

import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from transformers import (  # noqa: E402
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
)

import foveate  # noqa: E402
from foveate.methods import ToMe  # noqa: E402

SIDE = 518
PICTURE = Path(__file__).parents[1] / "docs" / "dense.png"
PANEL, BAND = 259, 24


def depth_anything_small() -> DepthAnythingForDepthEstimation:
    """A random model of the size of Depth-Anything-V2-Small."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=SIDE,
        patch_size=14, out_features=["stage3", "stage6", "stage9", "stage12"],
        reshape_hidden_states=False, initializer_range=0.06, layerscale_value=0.3,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, patch_size=14,
        neck_hidden_sizes=[48, 96, 192, 384], fusion_hidden_size=64,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("backbone"):
            torch.nn.init.kaiming_normal_(parameter)  # or hardly anything comes through
    return model


def scene() -> Image.Image:
    """A plain drawing: a wall, a floor and three things."""
    image = Image.new("RGB", (SIDE, SIDE), (188, 200, 214))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 330, SIDE, SIDE), fill=(146, 118, 92))
    draw.rectangle((60, 180, 190, 420), fill=(70, 92, 140))
    draw.ellipse((240, 300, 360, 420), fill=(196, 70, 58))
    draw.polygon([(390, 440), (455, 240), (510, 440)], fill=(84, 140, 80))
    for x in range(0, SIDE, 37):
        draw.line((x, 330, x + (x - SIDE // 2), SIDE), fill=(120, 96, 74), width=2)
    return image


def pixels_of(image: Image.Image, batch: int) -> torch.Tensor:
    """(batch, 3, H, W) as the processor makes them."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    values = values.view(image.height, image.width, 3).permute(2, 0, 1) / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return ((values - mean) / deviation).expand(batch, -1, -1, -1).contiguous()


def measure(model: DepthAnythingForDepthEstimation, rs: list[int], batch: int, rounds: int) -> dict:
    """Speed-ups of each r, of the whole model and of its backbone."""
    pixels = pixels_of(scene(), batch)
    methods = {f"r = {r}": ToMe(r=r) for r in (0, *rs)}

    def call(module: torch.nn.Module, method: ToMe | None):
        def run() -> None:
            if method is None:
                module(pixels)
                return
            with foveate.use(model, method):
                module(pixels)

        return run

    parts = {"model": model, "backbone": model.backbone}
    contenders = {
        f"{name}, {part}": call(module, method)
        for part, module in parts.items()
        for name, method in {"all tokens": None, **methods}.items()
    }
    with torch.inference_mode():
        facts = {}
        for name, method in methods.items():
            with foveate.use(model, method) as session:
                model(pixels)
            rows = session.record.encoder_tokens
            facts[name] = rows[-1][1], 1 / session.report()["flops"]["ratio"]
        times = turns(contenders, rounds)
    result = {}
    for name, (left, predicted) in facts.items():
        speed = {
            part: ratios(times[f"all tokens, {part}"], times[f"{name}, {part}"]) for part in parts
        }
        result[name] = {"rows left": left, **speed, "backbone, predicted": predicted}
    share = ratios(times["all tokens, backbone"], times["all tokens, model"])
    return {"batch": batch, "rounds": rounds, "backbone's share of time": share, "rows": result}


def draw(model: DepthAnythingForDepthEstimation, r: int, path: Path) -> dict[str, float]:
    """Write a picture of the output without and with merging; returns how far apart they are."""
    image = scene()
    pixels = pixels_of(image, 1)
    with torch.inference_mode():
        before = model(pixels).predicted_depth[0]
        with foveate.use(model, ToMe(r=r)):
            after = model(pixels).predicted_depth[0]
    low, high = before.min(), before.max()
    apart = (after - before).abs() / (high - low)
    panels = {
        "image": image,
        "all tokens": _grey((before - low) / (high - low)),
        f"tome, r = {r}": _grey((after - low) / (high - low)),
        f"difference (white: {apart.max():.0%} of the range)": _grey(apart / apart.max()),
    }
    canvas = Image.new("RGB", (PANEL * len(panels), PANEL + BAND), "white")
    for number, (title, panel) in enumerate(panels.items()):
        canvas.paste(panel.resize((PANEL, PANEL)), (number * PANEL, BAND))
        ImageDraw.Draw(canvas).text((number * PANEL + 6, 6), title, fill="black")
    canvas.save(path)
    print(f"saved {path}")
    return {"mean difference": apart.mean().item(), "largest difference": apart.max().item()}


def _grey(values: torch.Tensor) -> Image.Image:
    """An image of (H, W) values from 0 to 1."""
    return Image.fromarray((values.clamp(0, 1) * 255).to(torch.uint8).numpy()).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--r", type=int, nargs="+", default=[60, 100])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-picture", dest="picture", action="store_false")
    arguments = parser.parse_args()
    model = depth_anything_small()
    changed = draw(model, arguments.r[-1], PICTURE) if arguments.picture else {}
    results = [measure(model, arguments.r, batch, arguments.rounds) for batch in arguments.batch]
    for result in results:
        print(f"\nbatch {result['batch']}, {result['rounds']} rounds")
        for name, row in result["rows"].items():
            whole, alone = row["model"], row["backbone"]
            print(
                f"  {name:8} model {whole['median']:5.2f}x ({whole['q25']:.2f} to "
                f"{whole['q75']:.2f}), backbone {alone['median']:5.2f}x, predicted "
                f"{row['backbone, predicted']:.2f}x"
            )
    about = f"random Depth-Anything-V2-Small, {SIDE} px, 12 layers, 1,370 rows"
    save("dense", {"model": about, "picture": changed, "results": results})


if __name__ == "__main__":
    main()
