"""Decoding: what a session costs per layer and generated token.

    python benchmarks/decode.py [--rounds 9]

A random Llama of 32 layers that is so narrow (64) that Python, not arithmetic, fills the time. Each
contender decodes 100 tokens after its prompt; the plain model starts from a native prompt of as
many tokens as the session leaves in the average layer.
"""

from __future__ import annotations

import argparse
import statistics
import time

from _bench import prompt, random_llava, save, warm_heap

warm_heap()

import torch  # noqa: E402
from prefill import First  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import foveate  # noqa: E402
from foveate.methods import FastV, PyramidDrop  # noqa: E402

LAYERS, TOKENS = 32, 100
METHODS = {
    "pre_llm, original positions": (First(keep=64, positions="original"), 64),
    "pre_llm, renumbered": (First(keep=64), 64),
    "fastv 25 %": (FastV(layer=2, keep=0.25), 180),
    "pyramiddrop": (PyramidDrop(), 270),
}


def decode_seconds(model, inputs) -> float:
    """CPU seconds of TOKENS single-token forwards after the prompt."""
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    token = torch.tensor([[7]])
    start = time.process_time()
    for _ in range(TOKENS):
        model(input_ids=token, past_key_values=cache)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    model = random_llava(64, LAYERS, 2, 128)
    inputs = prompt(model, 576)
    rows = {}
    with torch.inference_mode():
        for name, (method, visual) in METHODS.items():
            native = prompt(model, visual)
            extra, plain = [], []
            for number in range(rounds + 1):
                without = decode_seconds(model, native)
                with foveate.use(model, method):
                    within = decode_seconds(model, inputs)
                if number:  # the first round warms up
                    plain.append(without / TOKENS / LAYERS * 1e6)
                    extra.append((within - without) / TOKENS / LAYERS * 1e6)
            low, median, high = statistics.quantiles(extra, n=4)
            rows[name] = {
                "overhead_us": median, "q25": low, "q75": high,
                "plain_us": statistics.median(plain),
            }  # fmt: skip
            print(
                f"  {name:28} {median:5.1f} us per layer and token ({low:.1f} to {high:.1f}) "
                f"on top of {rows[name]['plain_us']:.0f}"
            )
    save("decode", {"model": f"random Llama 64 x {LAYERS}", "tokens": TOKENS, "rows": rows})


if __name__ == "__main__":
    main()
