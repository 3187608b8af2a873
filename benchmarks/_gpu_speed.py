"""What a session costs and saves on a device: decoding, selection, sweeps, a training step.

Each part has two sizes: one for a CUDA card, and a tiny one with which a CPU runs the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _bench import prompt, random_llava, ratios
from _gpu_checks import Spaced
from speed import ON_GPU

from foveate import use
from foveate.bench.speed import Bench, contenders
from foveate.bench.workload import random_model, random_prompt
from foveate.cli.bench_speed import SpeedJob, bench_speed
from foveate.families import find_family
from foveate.measure.memory import peak_memory
from foveate.measure.timing import Spread, one_round
from foveate.methods import DART, FastV, PyramidDrop


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Args:
        dtype: of weights.
        decode: layers, visual tokens and new tokens of the decoding part.
        selection: model, visual tokens and text tokens of the selection part.
        training: model and visual tokens of a training step.
        rounds: timed rounds of all parts but the sweeps.
        sweeps: speed jobs by name of their result file.
    """

    dtype: torch.dtype
    decode: tuple[int, int, int]
    selection: tuple[str, int, int]
    training: tuple[str, int]
    rounds: int
    sweeps: Mapping[str, SpeedJob]


def _tiny(job: SpeedJob) -> SpeedJob:
    """The same sweep at a size for which a CPU suffices."""
    return replace(
        job, model="random:llama-64x4", tokens="576", batch="1,2", device="cpu", repeats=3,
        new_tokens=2,
    )  # fmt: skip


SIZES = {
    "cuda": Sizes(torch.bfloat16, (32, 576, 100), ("qwen3-vl-4b", 1920, 75), ("llava-7b", 576),
                  9, ON_GPU),
    "cpu": Sizes(torch.float32, (4, 36, 4), ("llama-64x4", 576, 16), ("llama-64x4", 576),
                 3, {name: _tiny(job) for name, job in ON_GPU.items()}),
}  # fmt: skip


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to(device: torch.device, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of `_bench.prompt` on a device."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    encoded = moved["mm_encoder_outputs"]["image"]
    encoded.pooler_output = [x.to(device, dtype) for x in encoded.pooler_output]
    return moved


# -- decoding


@torch.inference_mode()
def decoding(device: torch.device) -> dict[str, Any]:
    """Microseconds per decoder layer and new token that a session adds.

    The model is so narrow that Python and launches fill the time. The bare model starts from a
    prompt of as many visual tokens as the session leaves in the average layer.
    """
    size = SIZES[device.type]
    layers, visual, new = size.decode
    model = random_llava(64, layers, 2, 128).to(device, size.dtype)
    inputs = to(device, size.dtype, prompt(model, visual))
    rows = {}
    for method in (FastV(layer=2, keep=0.25), PyramidDrop(layers=_quarters(layers))):
        with use(model, method) as session:
            model(**inputs)
            left = [row for layer in session.report()["layers"] for row in layer["visual_tokens"]]
        native = to(device, size.dtype, prompt(model, round(sum(left) / len(left))))
        extra, plain = [], []
        for number in range(size.rounds + 1):
            without = _decode_us(model, native, layers, new)
            with use(model, method):
                within = _decode_us(model, inputs, layers, new)
            if number:  # the first round warms up
                extra.append(within - without)
                plain.append(without)
        rows[method.slug] = {
            "overhead_us": Spread.of(extra).to_dict(), "plain_us": Spread.of(plain).to_dict(),
        }  # fmt: skip
    return {"model": f"random Llama 64 x {layers}", "new_tokens": new, "rows": rows}


def _quarters(layers: int) -> tuple[int, ...]:
    return tuple(layers * n // 4 for n in (1, 2, 3))


def _decode_us(model: Any, inputs: Mapping[str, Any], layers: int, new: int) -> float:
    """Wall-clock microseconds per layer and token of single-token forwards after a prompt."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    token = torch.tensor([[7]], device=model.device)
    wait(model.device)
    start = time.perf_counter()
    for _ in range(new):
        model(input_ids=token, past_key_values=cache)
    wait(model.device)
    return (time.perf_counter() - start) / new / layers * 1e6


# -- selection


@torch.inference_mode()
def selection(device: torch.device) -> dict[str, Any]:
    """The prefill with DART at 50 %, and how long choosing takes.

    Choosing is what DART's prefill takes beyond one that drops as many tokens before the same layer
    without looking at any.
    """
    size = SIZES[device.type]
    name, visual, text = size.selection
    model = random_model(name, device, size.dtype)
    inputs = random_prompt(model, visual, 1, text)
    dart = DART(keep=0.5)
    layer = dart.steps(find_family(model))[0].layer
    entrants = contenders(model, [dart, Spaced("llm", layer)])
    bench = Bench(model, 0, cpu_time=False)

    def runner(entrant: Any) -> Callable[[], float]:
        def run() -> float:
            with entrant.setting():
                return bench.run(inputs)["prefill"]

        return run

    runs: dict[str, list[float]] = {entrant: [] for entrant in entrants}
    runners = {entrant: runner(of) for entrant, of in entrants.items()}
    with bench.watching():
        for number in range(3 + size.rounds):
            for entrant, ms in one_round(runners, number):
                if number >= 3:
                    runs[entrant].append(ms)
    chosen = [a - b for a, b in zip(runs["dart"], runs["spaced"], strict=True)]
    return {
        "model": name,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "prefill_ms": {entrant: Spread.of(ms).to_dict() for entrant, ms in runs.items()},
        "speed_up": ratios(runs["all tokens"], runs["dart"]),
        "selection_ms": Spread.of(chosen).to_dict(),
    }


# -- training


def training(device: torch.device) -> dict[str, Any]:
    """A step of full fine-tuning with PyramidDrop over one with all tokens; the tower is frozen.

    Layers are checkpointed. The optimizer is SGD without momentum, which keeps no state, so that
    7B fits on one card.
    """
    size = SIZES[device.type]
    name, visual = size.training
    model = random_model(name, device, size.dtype).train()
    model.gradient_checkpointing_enable()
    model.model.vision_tower.requires_grad_(False)
    inputs = random_prompt(model, visual, 1)
    labels = inputs["input_ids"].clone()
    labels[:, :-16] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6)
    method = PyramidDrop(layers=_quarters(find_family(model).text_layers))
    settings = {"all tokens": nullcontext, "pyramiddrop": lambda: use(model, method)}

    def step() -> None:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def runner(setting: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            with setting():
                wait(device)
                start = time.perf_counter()
                step()
                wait(device)
                return (time.perf_counter() - start) * 1e3

        return run

    runs: dict[str, list[float]] = {arm: [] for arm in settings}
    for number in range(1 + size.rounds):
        for arm, ms in one_round({a: runner(s) for a, s in settings.items()}, number):
            if number:
                runs[arm].append(ms)
    peaks = {}
    for arm, setting in settings.items():
        with setting():
            peaks[arm] = peak_memory(step, device)
    return {
        "model": name,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "step_ms": {arm: Spread.of(ms).to_dict() for arm, ms in runs.items()},
        "speed_up": ratios(runs["all tokens"], runs["pyramiddrop"]),
        "peak_bytes": peaks,
    }


# -- sweeps


def sweep(name: str, device: torch.device, folder: Path, minutes: float) -> dict[str, Any]:
    """One sweep over batch sizes; its file keeps finished cells, and the next run goes on there."""
    job = SIZES[device.type].sweeps[name]
    if device.type == "cuda":
        job = replace(job, device=str(device))
    result = bench_speed(replace(job, minutes=minutes, json_path=folder / f"{name}.json"))
    return {"file": f"{name}.json", "cells": len(result["cells"])}
