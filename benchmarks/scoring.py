"""What choosing costs: each method's selection against the prefill it leaves, at 7B widths.

    python benchmarks/scoring.py [--visual 576 2880] [--rounds 3]

One random Llama-7B layer (4096, MLP 11008) is timed at each token count that occurs, and counted as
often as the 32-layer model would run it; no 7B model is built. Selection is timed at the same
width: signals and the method's own choice. Batch 1, 64 text tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable

from _bench import ratios, save, turns, warm_heap

warm_heap()

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from foveate.core import VisualTokens  # noqa: E402
from foveate.methods import DivPrune, Downsample, FasterVLM, Random, Uniform  # noqa: E402
from foveate.signals.cls_attention import class_row  # noqa: E402
from foveate.signals.layer_view import LayerView  # noqa: E402

LAYERS, TEXT, HIDDEN = 32, 64, 4096
CONFIG = LlamaConfig(
    hidden_size=HIDDEN, num_attention_heads=32, intermediate_size=11008, vocab_size=32,
    num_hidden_layers=LAYERS, attn_implementation="sdpa",
)  # fmt: skip


class Layer:
    """One decoder layer, run or asked for the attention of the last token."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = LlamaDecoderLayer(CONFIG, 0).eval()
        self.rotary = LlamaRotaryEmbedding(CONFIG)

    def inputs(self, tokens: int):
        hidden = torch.randn(1, tokens, HIDDEN)
        return hidden, self.rotary(hidden, torch.arange(tokens)[None])

    def run(self, tokens: int) -> Callable[[], object]:
        hidden, rotary = self.inputs(tokens)
        return lambda: self.layer(hidden, position_embeddings=rotary)

    def score(self, tokens: int) -> Callable[[], object]:
        hidden, rotary = self.inputs(tokens)
        query = torch.tensor([[tokens - 1]])
        return lambda: LayerView(self.layer, hidden, rotary).attention(query)


def chosen(method, visual: int, signals=None) -> Callable[[], object]:
    """A pre_llm method's choice among `visual` tokens of width 4096."""
    side = int(visual**0.5)
    grid = (side, side) if side * side == visual else (1, visual)
    x = torch.randn(1, visual, HIDDEN)
    index = torch.arange(visual)[None]
    count = max(1, type(method).rounding(visual * method.keep))

    def choose() -> object:
        tokens = VisualTokens(lambda: x, index, grid, signals=signals() if signals else {})
        reduction = method.reduce(tokens, count)
        return reduction.apply(x)

    return choose


def plans(layer: Layer, visual: int) -> dict[str, tuple[list[Callable[[], object]], Counter]]:
    """Method -> what choosing runs, and how many layers run at each token count."""
    keep = {n: int(visual * n) for n in (0.5, 0.25, 0.125)}
    full = visual + TEXT
    q, k = torch.randn(1, visual + 1, 1024), torch.randn(1, visual + 1, 1024)

    def class_attention() -> dict[str, torch.Tensor]:
        return {"cls_attention": class_row(q, k, 16)[:, None]}

    stages = [full, *(keep[n] + TEXT for n in keep)]
    half, quarter = keep[0.5] + TEXT, keep[0.25] + TEXT
    pre = {
        "fastervlm 25 %": chosen(FasterVLM(keep=0.25), visual, class_attention),
        "divprune 9.8 %": chosen(DivPrune(), visual),
        "random 25 %": chosen(Random(), visual),
        "uniform 25 %": chosen(Uniform(), visual),
        "downsample 25 %": chosen(Downsample(), visual),
    }
    result = {
        "pyramiddrop": (
            [layer.score(n) for n in stages[:3]],
            Counter(dict.fromkeys(stages, LAYERS // 4)),
        ),
        "fastv 50 %": ([layer.score(full)], Counter({full: 2, half: LAYERS - 2})),
    }
    for name, choose in pre.items():
        left = round(visual * 0.098) + TEXT if name.startswith("divprune") else quarter
        result[name] = ([choose], Counter({left: LAYERS}))
    return result


def measure(layer: Layer, visual: int, rounds: int) -> dict:
    planned = plans(layer, visual)
    counts = sorted({n for _, layers in planned.values() for n in layers})
    contenders: dict[str, Callable[[], object]] = {f"layer {n}": layer.run(n) for n in counts}
    for name, (choices, _) in planned.items():
        contenders[name] = lambda choices=choices: [choose() for choose in choices]
    with torch.inference_mode():
        times = turns(contenders, rounds)
    rows = {}
    for name, (_, layers) in planned.items():
        prefill = [
            sum(times[f"layer {n}"][i] * repeats for n, repeats in layers.items())
            for i in range(rounds)
        ]
        share = ratios(times[name], prefill)
        rows[name] = {
            "selection_ms": statistics.median(times[name]) * 1e3,
            "prefill_ms": statistics.median(prefill) * 1e3,
            "share": share,
        }
        print(
            f"  {visual:5} {name:16} {rows[name]['selection_ms']:8.1f} ms of "
            f"{rows[name]['prefill_ms']:9.0f} ms: {share['median']:.2%}"
        )
    return {"visual tokens": visual, "rounds": rounds, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    layer = Layer()
    results = [measure(layer, visual, arguments.rounds) for visual in arguments.visual]
    save("scoring", {"model": "one Llama-7B layer, counted 32 times", "results": results})


if __name__ == "__main__":
    main()
