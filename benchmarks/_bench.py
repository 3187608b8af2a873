"""What the benchmark scripts share: a warm heap, models of a given size, turns, results."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
RESULTS = Path(__file__).parent / "results"


def warm_heap() -> None:
    """Start anew with an allocator that keeps freed memory.

    On a CPU, torch hands freed memory back to the system, and the page faults that follow change
    ratios by several points.
    """
    if any(os.environ.get(name) != value for name, value in HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP})


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
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            gc.collect()
            start = time.process_time()
            contenders[name]()
            if number >= warmup:
                times[name].append(time.process_time() - start)
        print(f"round {number + 1} of {warmup + rounds}", file=sys.stderr)
    return times


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quartiles of the round-by-round ratios."""
    values = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "q25": low, "q75": high}


def machine() -> dict[str, str]:
    """What the numbers were measured on and with."""
    import torch
    import transformers

    import foveate

    version = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": f"{cpu}, {os.cpu_count()} cores shared, 1 thread used",
        "device": "cpu",
        "dtype": "float32",
        "attention": "sdpa",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": getattr(foveate, "__version__", version),
        "commit": version,
        "time": "process CPU seconds, contenders in turn, heap kept warm",
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"saved {path}")
