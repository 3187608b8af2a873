"""What the benchmark scripts share: a warm heap, models of a given size, turns, results."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foveate.measure import machine as machine_
from foveate.measure.timing import Spread, one_round

RESULTS = Path(__file__).parent / "results"


def warm_heap() -> None:
    """Start anew with one thread and an allocator that keeps freed memory."""
    machine_.warm_heap(threads=1)


def random_llava(hidden: int, layers: int, heads: int, mlp: int) -> Any:
    """A random LLaVA whose vision tower is never run: features are handed in."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=mlp, vocab_size=1000,
        max_position_embeddings=8192,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=999,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    model = Llava(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def prompt(model: Any, visual: int, text: int = 64) -> dict[str, Any]:
    """A prompt of `visual` image tokens amid `text` text tokens, with random features."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 900, (text,), generator=generator)
    half = text // 2
    ids = torch.cat((ids[:half], torch.full((visual,), 999), ids[half:]))[None]
    features = torch.randn(visual, model.config.text_config.hidden_size, generator=generator) * 0.02
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
    return {"input_ids": ids, "mm_encoder_outputs": encoded, "logits_to_keep": 1}


def turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Process CPU seconds of each contender, one run each in every round."""

    def clocked(run: Callable[[], object]) -> Callable[[], float]:
        def clock() -> float:
            gc.collect()
            start = time.process_time()
            run()
            return time.process_time() - start

        return clock

    times: dict[str, list[float]] = {name: [] for name in contenders}
    timed = {name: clocked(run) for name, run in contenders.items()}
    for number in range(warmup + rounds):
        for name, seconds in one_round(timed, number):
            if number >= warmup:
                times[name].append(seconds)
        print(f"round {number + 1} of {warmup + rounds}", file=sys.stderr)
    return times


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quartiles of the round-by-round ratios."""
    return Spread.of_ratios(numerator, denominator).to_dict()


def machine() -> dict[str, str]:
    """What the numbers were measured on and with."""
    return {
        **machine_.describe_machine(),
        "dtype": "float32",
        "attention": "sdpa",
        "time": "process CPU seconds, contenders in turn, heap kept warm",
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"saved {path}")
