"""Checks of a device: does it answer as the CPU does, and how often does the host wait for it?

The reference is the same model, with the same weights, on the CPU in float32 with eager attention.
What makes it a reference is the test suite, which holds it to a full-length model with masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _waits import Cuda, StandIn, machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveate import methods, tiny, use
from foveate.bench.workload import random_config, random_prompt
from foveate.core import Keep, Method, Scorer, Step

STEPS = 4
"""Cached decoding steps after each prompt."""
NEAREST = 1e-4
"""Distance below which answers count as equal."""
TIMES = 2.0
"""How much further from the reference than the bare model an answer may be."""
SAME = 0.95
"""Share of tokens that a method has to choose as on the CPU, in float32."""
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Spaced(Scorer):
    """Keep positions 0, 3, 6, ... first, then 1, 4, ...: a choice that reads no values."""

    place: str = "pre_llm"
    layer: int | None = None
    keep: Keep = 0.5
    positions: str = "original"
    slug, needs, paper = "spaced", (), ""

    @property
    def stage(self):
        return self.place

    def steps(self, model):
        layer = self.layer
        if self.place == "llm":
            layer = max(layer or 0, model.first_llm_layer)
        return (Step(self.place, layer),)

    def scores(self, tokens):
        position = tokens.index.float()
        return -(position % 3) * 1e5 - position


FIXED: dict[str, Method] = {
    "vision": Spaced("vision", 1),
    "pre_llm": Spaced(),
    "llm": Spaced("llm", 2),
}
LANGUAGE = (
    methods.DivPrune(keep=0.5),
    methods.PyramidDrop(layers=(3, 4, 5)),
    methods.FastV(layer=3, keep=0.5),
    methods.DART(layer=3, keep=0.5),
)
READING: dict[str, tuple[Method, ...]] = {
    "llava": (methods.ToMe(keep=0.5), methods.VisionZip(keep=0.5), *LANGUAGE),
    "qwen3_vl": LANGUAGE,
}
"""Methods that read values, by model type."""


# -- models


def embedded() -> tuple[Any, dict[str, Tensor]]:
    """The embedded model, with two scenes and a question for each."""
    model, processor = tiny.load()
    images = [tiny.draw_scene(seed).image for seed in (7, 8)]
    text = ["<image> " + tiny.draw_scene(7).questions[0].text] * 2
    return model, dict(processor(images=images, text=text, return_tensors="pt"))


def small_qwen() -> tuple[Any, dict[str, Tensor]]:
    """A small random Qwen3-VL: M-RoPE, DeepStack, key-value heads that are shared."""
    from transformers import AutoModelForImageTextToText, set_seed

    config = random_config("qwen3-vl-4b")
    text, vision = config.text_config, config.vision_config
    text.update({
        "num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
        "initializer_range": 0.1, "layer_types": ["full_attention"] * 6,
        "rope_parameters": {**text.rope_parameters, "mrope_section": [12, 10, 10]},
    })  # fmt: skip
    vision.update({
        "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
        "out_hidden_size": 256, "deepstack_visual_indexes": [0, 1, 2],
    })  # fmt: skip
    set_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    return model.eval(), random_prompt(model, 64, 2, text=16)


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "the embedded LLaVA": embedded,
    "a small random Qwen3-VL": small_qwen,
}


# -- answers


@dataclass(frozen=True)
class Kernel:
    """How a model attends on the device.

    Args:
        name: in results.
        attention: of transformers.
        dtype: of weights.
        backends: what torch may use; `None` for anything.
    """

    name: str
    attention: str
    dtype: torch.dtype
    backends: tuple[SDPBackend, ...] | None = None

    def only(self) -> Any:
        return nullcontext() if self.backends is None else sdpa_kernel(list(self.backends))


KERNELS = (
    Kernel("sdpa, float32", "sdpa", torch.float32),
    Kernel("sdpa flash, bfloat16", "sdpa", torch.bfloat16, (SDPBackend.FLASH_ATTENTION,)),
    Kernel("flash_attention_2, bfloat16", "flash_attention_2", torch.bfloat16),
)
REFERENCE = Kernel("eager, float32, CPU", "eager", torch.float32)


def copy_of(model: Any, kernel: Kernel, device: torch.device) -> Any:
    """A copy with weights that bfloat16 can hold, so that only the arithmetic differs."""
    made = deepcopy(model).to(torch.bfloat16).to(device, kernel.dtype).eval()
    made.set_attn_implementation(kernel.attention)
    return made


@torch.inference_mode()
def answer(model: Any, inputs: Mapping[str, Tensor], method: Any) -> tuple[Tensor, list[Any]]:
    """Logits (B, 1 + STEPS, vocabulary) of a prefill and cached steps, and what was kept."""
    from transformers import DynamicCache

    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    rows = len(given["input_ids"])
    with nullcontext() if method is None else use(model, method) as session:
        cache = DynamicCache(config=model.config.get_text_config())
        logits = [model(**given, past_key_values=cache, logits_to_keep=1).logits]
        kept = [] if session is None else session.kept
        for step in range(STEPS):
            token = torch.full((rows, 1), 5 + step, device=model.device)
            logits.append(model(input_ids=token, past_key_values=cache).logits[:, -1:])
    return torch.cat(logits, 1).float().cpu(), kept


def distance(got: Tensor, want: Tensor) -> float:
    """Length of the difference, as a share of the reference's length."""
    return float((got - want).norm() / want.norm())


def shared(got: list[Any], want: list[Any]) -> float:
    """Share of the reference's kept tokens that were kept too, at the worst site of all images."""
    return min(
        float(torch.isin(theirs.cpu(), ours[place].cpu()).float().mean())
        for ours, image in zip(got, want, strict=True)
        for place, theirs in image.items()
    )


def correctness(device: torch.device) -> dict[str, Any]:
    """Every stage and kernel against the reference."""
    from transformers.utils import is_flash_attn_2_available

    rows = []
    for name, make in MODELS.items():
        model, inputs = make()
        cases = {f"fixed, {stage}": method for stage, method in FIXED.items()}
        cases |= {method.slug: method for method in READING[model.config.model_type]}
        reference = copy_of(model, REFERENCE, torch.device("cpu"))
        bare, _ = answer(reference, inputs, None)
        want = {case: answer(reference, inputs, method) for case, method in cases.items()}
        for kernel in KERNELS:
            if kernel.attention == "flash_attention_2" and not is_flash_attn_2_available():
                rows.append({"model": name, "kernel": kernel.name, "skipped": "not installed"})
                continue
            copy = copy_of(model, kernel, device)
            try:
                with kernel.only():
                    rows += _compared(name, kernel, copy, inputs, cases, bare, want)
            except RuntimeError as error:  # no such kernel for this call
                line = str(error).splitlines()[0]
                rows.append({"model": name, "kernel": kernel.name, "ok": False, "error": line})
    return {"steps": STEPS, "times": TIMES, "rows": rows}


def _compared(
    name: str,
    kernel: Kernel,
    model: Any,
    inputs: Mapping[str, Tensor],
    cases: Mapping[str, Method],
    bare: Tensor,
    want: Mapping[str, tuple[Tensor, list[Any]]],
) -> Iterator[dict[str, Any]]:
    """One row for each case. Logits are compared where the same tokens were kept."""
    off = distance(answer(model, inputs, None)[0], bare)
    limit = max(TIMES * off, NEAREST)
    for case, method in cases.items():
        logits, kept = answer(model, inputs, method)
        same = shared(kept, want[case][1])
        far = distance(logits, want[case][0]) if same == 1.0 else None
        enough = same >= SAME if kernel.dtype == torch.float32 else True
        enough = same == 1.0 if case.startswith("fixed") else enough
        yield {
            "model": name, "kernel": kernel.name, "method": case, "same_tokens": same,
            "distance": far, "bare": off, "ok": enough and (far is None or far <= limit),
        }  # fmt: skip


# -- waiting


@torch.inference_mode()
def synchronisations(device: torch.device) -> dict[str, Any]:
    """Waits of one prefill: of the bare model, and of each method beyond those."""
    rows = []
    for name, make in MODELS.items():
        with machine(device) as there:
            model, inputs = map(there.put, make())
            bare = prefill_waits(there, model, inputs, None)
            rows.append({"model": name, "method": "all tokens", **bare})
            for method in READING[model.config.model_type]:
                row = prefill_waits(there, model, inputs, method)
                added = row["total"] - bare["total"]
                rows.append({"model": name, "method": method.slug, "stage": method.stage, **row,
                             "added": added})  # fmt: skip
    return {"rows": rows}


def prefill_waits(there: StandIn | Cuda, model: Any, inputs: Any, method: Any) -> dict[str, Any]:
    """Waits of one prefill with a method, or with all tokens."""
    with nullcontext() if method is None else use(model, method):
        model(**inputs, logits_to_keep=1)  # first calls wait for what later ones have
        with there.waits() as found:
            model(**inputs, logits_to_keep=1)
    return found
