"""Re-derive the efficiency figures that papers publish, from configs and schedules alone.

python benchmarks/published.py            # print the table
python benchmarks/published.py --write    # put it into docs/numbers.md
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from foveate.core import LayerShape
from foveate.measure.account import paper_layer
from foveate.measure.checkpoints import checkpoints
from foveate.measure.conventions import CONVENTIONS
from foveate.measure.mixers import Attention
from foveate.measure.mlps import Mlp
from foveate.measure.shapes import TextShape
from foveate.measure.streams import Streams
from foveate.methods import (
    AdaToken3D,
    FastVGGT,
    HoT,
    TokenTransforming,
    ToMe,
    TransPrune,
    VFlowOpt,
    ZeroTPrune,
)
from foveate.ops.merge_map import one_of_each_cell, strided

PAGE = Path(__file__).parents[1] / "docs" / "numbers.md"
BEGIN, END = "<!-- published: begin -->\n", "<!-- published: end -->\n"
NAMES = {c.name: c for c in checkpoints().values()}
TWO, THREE = CONVENTIONS["fastv"], CONVENTIONS["pyramiddrop"]


@dataclass(frozen=True)
class Row:
    """A published figure.

    Args:
        method: whose.
        what: model, setting and unit.
        published: as printed.
        ours: what follows from the configuration; `None` where nothing does.
        why: how it was derived, or why it differs or cannot be.
        chosen: the assumption of ours that was chosen with the published figure in view, and what
            others would give; empty where there is none.
        unit: after both numbers.
        digits: after the point.
    """

    method: str
    what: str
    published: float
    ours: float | None
    why: str
    chosen: str = ""
    unit: str = "%"
    digits: int = 1

    @property
    def cells(self) -> list[str]:
        unit = f" {self.unit}"
        why = "; ".join([self.why, *([f"**chosen**: {self.chosen}"] if self.chosen else [])])
        if self.ours is None:
            return [self.method, self.what, f"{self.published}{unit}", "-", "-", why]
        off = f"{self.ours - self.published:+.{self.digits}f}"
        ours = f"{self.ours:.{self.digits}f}{unit}"
        return [self.method, self.what, f"{self.published}{unit}", ours, off, why]


def shape_of(name: str) -> TextShape:
    config = NAMES[name].config["text_config"]
    heads = config["num_attention_heads"]
    hidden, kv_heads = config["hidden_size"], config.get("num_key_value_heads", heads)
    mixer = Attention(hidden, heads, kv_heads, hidden // heads)
    layers, mlp, vocabulary = (
        config[name] for name in ("num_hidden_layers", "intermediate_size", "vocab_size")
    )
    return TextShape(layers, mixer, Mlp(hidden, mlp), vocabulary, Streams(hidden))


def paper(name: str, tokens: Sequence[float], convention=THREE) -> float:
    """FLOPs of decoder layers that see so many tokens each, as papers count them."""
    return sum(paper_layer(shape_of(name), int(n), convention) for n in tokens)


def staged(total: int, layers: int, drops: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Tokens of each layer."""
    seen, left = [], total
    after = dict(zip(drops, shares, strict=True))
    for layer in range(layers):
        left = int(total * after[layer]) if layer in after else left
        seen.append(left)
    return seen


def less(name: str, total: int, tokens: Sequence[int], convention=THREE, text: int = 0) -> float:
    """Percent of FLOPs saved."""
    whole = paper(name, [total + text] * len(tokens), convention)
    return 100 * (1 - paper(name, [n + text for n in tokens], convention) / whole)


def vit(hidden: int, rows: Sequence[tuple[int, int]], patch: int = 16) -> float:
    """Multiply-adds of a ViT, embedding and head of 1,000 classes included."""
    total = 196 * 3 * patch**2 * hidden + 1000 * hidden
    for attention, mlp in rows:
        total += 4 * attention * hidden**2 + 2 * attention**2 * hidden + 8 * mlp * hidden**2
    return total


def merging(removed: int, layers: int = 12, full: int = 197) -> list[tuple[int, int]]:
    """Rows of attention and MLP where each layer removes as many in between."""
    return [(full - removed * i, full - removed * (i + 1)) for i in range(layers)]


def pyramiddrop() -> list[Row]:
    name, rows = "LLaVA-1.5-7B", []
    vanilla = paper(name, [576] * 32) / 1e12
    rows.append(Row("PyramidDrop", f"{name}, all tokens", 3.82, vanilla, "3ndm", "", "TFLOPs", 2))

    def with_drops(drops: Sequence[int]) -> float:
        shares = [0.5 ** (i + 1) for i in range(len(drops))]
        return paper(name, staged(576, 32, drops, shares)) / 1e12

    for stages, published in ((3, 2.13), (4, 1.78), (5, 1.38)):
        drops, nearest = (
            [int(step * i + half) for i in range(1, stages)]
            for step, half in ((32 // stages, 0.0), (32 / stages, 0.5))
        )
        why, chosen = f"drops before {', '.join(map(str, drops))}", ""
        if drops == nearest:
            why += ", as released"
        else:
            chosen = (
                "the paper's stages are even, but their layers are not public; "
                f"{_listed(nearest)} are closer to even and give {with_drops(nearest):.2f}"
            )
        what = f"{name}, {stages} stages"
        rows.append(
            Row("PyramidDrop", what, published, with_drops(drops), why, chosen, "TFLOPs", 2)
        )
    seen = staged(2880, 32, (8, 16, 24), (0.5, 0.25, 0.125))
    ours = less("LLaVA-NeXT-7B", 2880, seen)
    return [*rows, Row("PyramidDrop", "LLaVA-NeXT-7B, saved", 55, ours, "2,880 visual tokens")]


def _listed(layers: Sequence[int]) -> str:
    return f"{', '.join(map(str, layers[:-1]))} and {layers[-1]}"


def encoders() -> list[Row]:
    def saved(hidden: int, removed: int) -> float:
        return 100 * (1 - vit(hidden, merging(removed)) / vit(hidden, merging(0)))

    def others(hidden: int) -> str:
        given = " and ".join(f"{saved(hidden, n):.1f}" for n in (7, 9))
        return f"8 tokens per layer; the abstract gives no setting; 7 and 9 give {given} %"

    def stages(method: ZeroTPrune | TokenTransforming, after: int) -> float:
        """Percent saved by a method that acts so many layers after its own."""
        assert isinstance(method.keep, tuple)
        left = dict(zip(method.published_layers, method.keep, strict=True))
        rows, seen = 197, []
        for layer in range(12):
            if (share := left.get(layer - after)) is not None:
                rows = 1 + round(share * 196)
            seen.append((rows, rows))
        return 100 * (1 - vit(384, seen) / vit(384, merging(0)))

    def tome(r: int) -> float:
        return vit(384, [(197 - a, 197 - b) for a, b in _tome(r)]) / 1e9

    return [
        Row("ToMe", "DeiT-S, all tokens, multiply-adds", 4.6, vit(384, merging(0)) / 1e9,
            "class token, 12 layers; reported by DeiT's authors", "", "G"),
        Row("ToMe", "DeiT-S, r = 13, multiply-adds", 2.7, tome(13),
            "merges between attention and MLP; as in listings of the paper's results; their "
            f"3.4 and 2.3 for r = 8 and 16 are {tome(8):.1f} and {tome(16):.1f} here", "", "G"),
        Row("GTP-ViT", "DeiT-S, saved", 26, saved(384, 8), "class token, 12 layers", others(384)),
        Row("GTP-ViT", "DeiT-B, saved", 26, saved(768, 8), "the same", others(768)),
        Row("Zero-TPrune", "DeiT-S, saved", 34.7, stages(ZeroTPrune(), 1),
            "drops after blocks 2, 5 and 8", "shares of .8, .54 and .3; no rates are public; "
            f".8, .56 and .34 give {stages(ZeroTPrune(keep=(0.8, 0.56, 0.34)), 1):.1f} %"),
        Row("Token Transforming", "DeiT-S, saved", 40, stages(TokenTransforming(), 0),
            "mixes before blocks 3, 6 and 9", "shares of .7, .46 and .27; no setting is public; "
            f".7, .5 and .35 give {stages(TokenTransforming(keep=(0.7, 0.5, 0.35)), 0):.1f} %"),
    ]  # fmt: skip


def layers_attended() -> list[Row]:
    """FastVGGT on VGGT-1B at 1,000 images of 37 x 28 patches and five special tokens."""
    width, images, patches, special = 1024, 1000, 37 * 28, 5
    length, total = patches + special, images * (patches + special)
    method = FastVGGT(as_released=True)
    shape = LayerShape(total, 0, (28, 37), images, width)
    chosen = one_of_each_cell(shape.grid, 2, method.draw(shape), sheared=True)
    start = length * torch.arange(1, images)[:, None]
    specials = start + torch.arange(special)
    into = torch.cat((torch.arange(length), (start + special + chosen).flatten(),
                      specials.flatten()))  # fmt: skip
    copies = strided(total, method.protect)
    free = total - len(torch.cat((into, copies)).unique())
    left = len(into) + len(copies)
    merged = 4 * width * left**2
    # Layers of the encoder of images, of each image alone, and of all images: 24 each.
    others = 24 * (3 * 24 * width**2 * total + 2 * 4 * width * total * length)
    whole = others + 24 * 4 * width * total**2

    def faster(attending: int) -> float:
        return whole / (others + 24 * attending)

    why = (
        "the 24 layers that attend to all images, plus the other 48; all tokens that may merge "
        f"do, {100 * left / total:.0f} % are left; {faster(merged):.1f} x without the similarities"
    )
    ours = faster(merged + 2 * width * free * len(into))
    return [Row("FastVGGT", "VGGT-1B, 1,000 images, times faster", 4, ours, why, "", "x")]


def poses() -> list[Row]:
    """HoT on 243 frames: weights alone, each of which a token of every joint passes once."""
    frames, kept = 243, HoT().kept_of(243)

    def saved(
        width: int, block: int, depth: int, layer: int, tail: int = 0, back: int = 1
    ) -> float:
        """Percent saved by layers of so many weights from one on, with weights after the last."""
        whole = frames * (depth * block + tail)
        seen = layer * frames + (depth - layer) * kept
        way = back * 2 * (frames + kept) * width**2
        return 100 * (1 - (seen * block + way + frames * tail) / whole)

    mixste, motionbert = 512, 256
    two, four = 2 * 8 * mixste**2, 4 * 12 * motionbert**2  # blocks of a layer; MLPs of 2 and 4
    counted = "weights alone, as the release counts; the abstract says nearly"
    return [
        Row("HoT", "MixSTE, 81 of 243 frames, saved", 40, saved(mixste, two, 8, 3),
            f"from layer 3 of 8; {counted}; {saved(mixste, two, 8, 3, back=0):.1f} % without the "
            "attention that brings frames back"),
        Row("HoT", "MotionBERT, 81 of 243 frames, saved", 50,
            saved(motionbert, four, 5, 1, tail=512 * motionbert),
            f"from layer 1 of 5, as released; {counted}"),
    ]  # fmt: skip


def scans() -> list[Row]:
    """ToP-ViM: a layer that scans does as much for each token, however many there are."""

    def saved(shares: Sequence[float]) -> float:
        return 100 * (1 - sum(staged(196, 36, (12, 24), shares)) / (36 * 196))

    rows, seen = 197, []
    for layer in range(24):
        if layer in (5, 10, 15):  # an odd number in all, with the class token in the middle
            rows = math.ceil(0.8 * (rows - 1)) // 2 * 2 + 1
        seen.append(rows)
    small = 100 * (1 - sum(seen) / (24 * 197))
    return [
        Row("ToP-ViM", "PlainMamba-L3, saved", 41.6, saved((0.5, 0.25)),
            "36 layers of equal cost for each token, the stem left out; the only released setting, "
            f"ViM-S after layers 5, 10 and 15, gives {small:.1f} %",
            "half of the tokens before layers 12 and 24; no setting is public; .7 of them give "
            f"{saved((0.7, 0.49)):.1f} %"),
    ]  # fmt: skip


def _tome(r: int) -> list[tuple[int, int]]:
    """Tokens that are gone before the attention and the MLP of each layer of a ViT."""
    schedule = ToMe(r=r).schedule(12)
    gone = [sum(schedule[:i]) for i in range(13)]
    return [(gone[i], gone[i + 1]) for i in range(12)]


def decoders() -> list[Row]:
    half = staged(576, 40, (2,), (0.5,))
    fastv = staged(576, 32, (3,), (0.5,))
    trans = TransPrune()
    seen = staged(576, 32, trans.published_layers, trans.keep)
    layers = (4, 8, 12, 16, 18, 20, 22, 24, 26, 28)
    shares = (0.9, 0.8, 0.75, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.25)
    ada = AdaToken3D(layers=layers, keep=shares)
    steps = staged(576, 32, ada.layers, ada.keep)
    return [
        Row("FastV", "LLaVA-1.5-13B, K = 2, R = 50 %, saved", 45,
            less("LLaVA-1.5-13B", 576, half, TWO, text=64), "2ndm",
            "64 text tokens; visual tokens alone save "
            f"{less('LLaVA-1.5-13B', 576, half, TWO):.1f} %"),
        Row("FastV", "LLaVA-1.5-7B, K = 3, R = 50 %, left", 57,
            100 - less("LLaVA-1.5-7B", 576, fastv, TWO, text=35),
            "35 text tokens, as the release assumes"),
        Row("TransPrune", "LLaVA-1.5-7B, saved, at least", 50, less("LLaVA-1.5-7B", 576, seen),
            "drops before 7, 9, 12; the paper says more than half"),
        Row("AdaToken-3D", "LLaVA-3D-7B, saved", 63, less("LLaVA-1.5-7B", 576, steps),
            "the released schedule, which cannot give the figure; the paper's is not public"),
        Row("LVLM_CSP", "7B, saved", 65, None,
            "block boundaries and counts are not public"),
        *yopo(),
    ]  # fmt: skip


def yopo() -> list[Row]:
    """Visual tokens only: windows of 5 x 5, some heads, half the MLP, half the layers."""
    shape, rows = shape_of("LLaVA-1.5-13B"), []
    width = shape.hidden
    full = 2 * 576 * (4 * width**2 + 3 * width * shape.mlp.neurons) + 4 * width * 576**2
    for heads in (20, 30):
        part = heads / shape.mixer.heads
        neurons = shape.mlp.neurons / 2
        linear = 2 * 576 * (4 * width**2 * part + 3 * width * neurons)
        layer = linear + 4 * width * part * 576 * 5**2
        saved = 100 * (1 - 20 * layer / (40 * full))
        why = f"20 of 40 layers, {heads} of 40 heads, half the MLP: the released script's plan"
        rows.append(Row("YOPO", f"LLaVA-1.5-13B, {heads} heads, saved", 88, saved, why))
    return rows


def videos() -> list[Row]:
    name, total = "LLaVA-OneVision-7B", 32 * 196
    holitom = staged(total, 28, (0, 18), (0.1, 0.05))
    fastvid = [int(total * 0.097)] * 28
    shares = (0.1166, 0.1166, 0.1166 * 0.6011)
    flow = VFlowOpt(keep=shares)
    seen = staged(2916, 28, (0, 9, 18), flow.keep)
    return [
        Row("HoliTom", f"{name}, 32 frames, left", 6.9, 100 - less(name, total, holitom),
            "a tenth, half of it from layer 18"),
        Row("FastVID", f"{name}, 32 frames, left", 8.3, 100 - less(name, total, fastvid),
            "9.7 % of the tokens"),
        Row("VFlowOpt", f"{name}, 10 %, KV bytes saved", 89,
            100 * (1 - sum(n + 40 for n in seen) / (28 * (2916 + 40))),
            "2,916 visual tokens", "40 text tokens; visual tokens alone save 90 %"),
        Row("PruneVid", "PLLaVA-7B, 16.2 % kept, left", 23, None,
            "the number of remaining tokens depends on the videos"),
    ]  # fmt: skip


def selections() -> list[Row]:
    name = "LLaVA-1.5-7B"
    return [
        Row("HiPrune", f"{name}, 192 tokens, saved", 58.7, less(name, 576, [192] * 32, text=70),
            "3ndm",
            f"70 text tokens; visual tokens alone save {less(name, 576, [192] * 32):.1f} %"),
        Row("DivPrune", f"{name}, 9.8 % kept, left", 15.6,
            100 - less(name, 576, [56] * 32, TWO, text=40), "2ndm",
            "40 text tokens; visual tokens alone leave "
            f"{100 - less(name, 576, [56] * 32, TWO):.1f} %"),
    ]  # fmt: skip


def rows() -> list[Row]:
    """All published figures."""
    return [
        *pyramiddrop(), *encoders(), *layers_attended(), *poses(), *scans(), *decoders(),
        *videos(), *selections(),
    ]  # fmt: skip


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| method | what | published | ours | difference | how, or why not |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/numbers.md")
    if parser.parse_args().write:
        page = PAGE.read_text(encoding="utf-8")
        pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
        PAGE.write_text(
            re.sub(pattern, lambda _: BEGIN + table() + END, page, flags=re.DOTALL),
            encoding="utf-8",
        )
    else:
        print(table())


if __name__ == "__main__":
    main()
