"""Serving in vLLM: requests per second, time to first token and between tokens, with fewer tokens.

    build/vllm/bin/python benchmarks/vllm_serving.py [--method fastervlm] [--rounds 2] [--scale 1]

A random LLaVA-1.5 of 512 x 8 with 576 visual tokens an image is served by vLLM's asynchronous
engine. Every request has images of its own, so that no cache helps. In each round all budgets are
measured one after another, in turn; ratios are those of a round. 8 new tokens, greedy, float32.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image

RESULT = Path(__file__).parent / "results" / "vllm_serving.json"
KEEPS = (1.0, 0.5, 0.25, 0.125)
TOKENS = 8
REQUESTS = {(1, 1): 4, (1, 8): 16, (1, 32): 32, (4, 1): 2, (4, 8): 8, (4, 32): 32}
"""(images of a request, requests in flight) -> requests of a measurement."""
WORDS = " ".join(f"w{i}" for i in range(48))


def checkpoint(folder: Path) -> None:
    """Save the model, with a small tower whose grid is that of LLaVA-1.5."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1376,
        vocab_size=1000, max_position_embeddings=8192, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        image_size=336, patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=999, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    words = {f"w{i}": i for i in range(3, 999)}
    words |= {"<pad>": 0, "w1": 1, "w2": 2, "<image>": 999}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w1", eos_token="w2", pad_token="<pad>",
        extra_special_tokens=["<image>"],
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def engine(folder: Path) -> Any:
    """The asynchronous engine of vLLM."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {
        "dtype": "float32", "max_model_len": 4096, "max_num_batched_tokens": 4096,
        "max_num_seqs": 32, "enforce_eager": True, "limit_mm_per_prompt": {"image": 4},
    }  # fmt: skip
    return AsyncLLM.from_engine_args(AsyncEngineArgs(str(folder), **settings))


class Load:
    """Requests, each with images that no other has.

    Args:
        llm: the engine.
        method: what removes tokens.
    """

    def __init__(self, llm: Any, method: str) -> None:
        self.llm, self.method = llm, method
        self._number = itertools.count()

    async def measure(self, keep: float, images: int, flying: int, requests: int) -> dict:
        """Requests per second, and medians of milliseconds to the first token and between tokens.

        Args:
            keep: what survives of each image; 1.0 asks for nothing.
            images: of each request.
            flying: requests at a time.
            requests: how many in all.
        """
        turn = asyncio.Semaphore(flying)
        prompts = [self._prompt(keep, images) for _ in range(requests)]

        async def one(prompt: dict) -> list[float]:
            async with turn:
                return [time.perf_counter(), *[at async for at in self._tokens(prompt)]]

        start = time.perf_counter()
        times = await asyncio.gather(*(one(prompt) for prompt in prompts))
        seconds = time.perf_counter() - start
        first = [(of[1] - of[0]) * 1e3 for of in times]
        between = [(of[-1] - of[1]) * 1e3 / (TOKENS - 1) for of in times]
        return {
            "requests_per_s": requests / seconds,
            "ttft_ms": statistics.median(first),
            "between_tokens_ms": statistics.median(between),
        }

    def _prompt(self, keep: float, images: int) -> dict:
        generator = np.random.default_rng(next(self._number))
        pictures = [
            Image.fromarray(generator.integers(0, 255, (336, 336, 3), dtype=np.uint8))
            for _ in range(images)
        ]
        made: dict = {
            "prompt": f"{'<image> ' * images}{WORDS}",
            "multi_modal_data": {"image": pictures},
        }
        if keep < 1:
            asked = {"foveate_method": self.method, "foveate_keep": keep}
            made["mm_processor_kwargs"] = asked
        return made

    async def _tokens(self, prompt: dict) -> AsyncIterator[float]:
        """Seconds at which each token has come."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        seen = 0
        async for output in self.llm.generate(prompt, sampling, f"r{next(self._number)}"):
            for _ in range(len(output.outputs[0].token_ids) - seen):
                yield time.perf_counter()
            seen = len(output.outputs[0].token_ids)


async def measure(method: str, rounds: int, scale: float) -> list[dict]:
    """Rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        llm = engine(Path(folder))
        load = Load(llm, method)
        for keep in KEEPS:
            await load.measure(keep, 1, 2, 2)
        rows = []
        for (images, flying), requests in REQUESTS.items():
            count = max(flying, round(requests * scale))
            found: dict[float, list[dict]] = {keep: [] for keep in KEEPS}
            for number in range(rounds):
                shift = number % len(KEEPS)
                for keep in (*KEEPS[shift:], *KEEPS[:shift]):
                    found[keep].append(await load.measure(keep, images, flying, count))
            rows += [summary(images, flying, count, keep, found) for keep in KEEPS]
            for row in rows[-len(KEEPS) :]:
                print(json.dumps(row), file=sys.stderr, flush=True)
        llm.shutdown()
    return rows


def summary(images: int, flying: int, requests: int, keep: float, found: dict) -> dict:
    """A row: medians over rounds, and ratios within rounds."""
    mine, full = found[keep], found[1.0]

    def ratio(name: str) -> list[float]:
        return [a[name] / b[name] for a, b in zip(mine, full, strict=True)]

    speed = ratio("requests_per_s")
    return {
        "images": images,
        "in_flight": flying,
        "requests": requests,
        "keep": keep,
        **{name: statistics.median(of[name] for of in mine) for name in mine[0]},
        "speedup": {"median": statistics.median(speed), "least": min(speed), "most": max(speed)},
        "ttft_ratio": statistics.median(ratio("ttft_ms")),
    }


def table(rows: list[dict]) -> str:
    """The rows as the docs show them."""
    head = [
        "images",
        "in flight",
        "keep",
        "requests/s",
        "speed-up",
        "first token",
        "between tokens",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        speed = row["speedup"]
        faster = f"{speed['median']:.2f}x ({speed['least']:.2f} to {speed['most']:.2f})"
        cells = [
            row["images"], row["in_flight"], "all" if row["keep"] == 1 else row["keep"],
            f"{row['requests_per_s']:.2f}", "" if row["keep"] == 1 else faster,
            f"{row['ttft_ms']:.0f} ms", f"{row['between_tokens_ms']:.0f} ms",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="fastervlm")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of requests")
    arguments = parser.parse_args()
    # Before anything is measured, or a missing package would be found when all is over.
    from foveate.measure.machine import describe_machine

    note = describe_machine()
    rows = asyncio.run(measure(arguments.method, arguments.rounds, arguments.scale))
    save(rows, note, arguments.method, arguments.rounds)


def save(rows: list[dict], machine: dict, method: str, rounds: int) -> None:
    """Write the result file, and print the table."""
    machine = {
        **machine,
        "dtype": "float32",
        "vllm": importlib.metadata.version("vllm-cpu"),
        "time": "wall clock on a shared machine; compare ratios, which are taken within a round",
    }
    head = {"model": "random LLaVA-1.5, llama 512 x 8, 576 visual tokens", "new_tokens": TOKENS}
    result = {"machine": machine, "method": method, "rounds": rounds, **head, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
