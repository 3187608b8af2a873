"""Configs of real checkpoints, built on the meta device: methods attach and plan as published.

Tiny configs hide what depends on the number of layers, on layer patterns and on towers. That the
numbers are the checkpoint's is checked by its published count of parameters.
"""

import functools

import pytest

import foveate
from foveate.errors import LayerError
from foveate.measure.checkpoints import checkpoints
from foveate.methods import DivPrune, FastV, PyramidDrop

# Hub id -> FastV's default layer, with the error of the published 2 if that does not work, and
# PyramidDrop's layers. The facts of a checkpoint are those that `foveate flops` counts with.
DEEPSTACK = "first layer before which tokens may be removed is 3"
SLIDING = "only a window of the sequence; the nearest layer that can give it is 5, of 5, 11, 17, 23"
STATE = "a running state and has no keys of single tokens; the nearest layer that can give it is "
WINDOW = "only a window of the sequence; the nearest .* is 3, of "
EXPECTED = {
    "llava-hf/llava-1.5-7b-hf": (2, (8, 16, 24)),
    "llava-hf/llava-1.5-13b-hf": (2, (10, 20, 30)),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (2, (8, 16, 24)),
    "llava-hf/llava-v1.6-mistral-7b-hf": (2, (8, 16, 24)),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (2, (7, 14, 21)),
    "OpenGVLab/InternVL3-8B-hf": (2, (7, 14, 21)),
    "HuggingFaceTB/SmolVLM-Instruct": (2, (6, 12, 18)),
    "Qwen/Qwen2-VL-7B-Instruct": (2, (7, 14, 21)),
    "Qwen/Qwen2.5-VL-7B-Instruct": (2, (7, 14, 21)),
    "Qwen/Qwen3-VL-4B-Instruct": ((3, DEEPSTACK), (9, 18, 27)),
    "Qwen/Qwen3-VL-8B-Instruct": ((3, DEEPSTACK), (9, 18, 27)),
    "Qwen/Qwen3.5-27B": (4, (15, 31, 47)),
    "Qwen/Qwen3.5-35B-A3B": (4, (11, 19, 31)),
    "zai-org/GLM-4.1V-9B-Thinking": (2, (10, 20, 30)),
    "google/gemma-3-4b-it": (
        (6, "only a window of the sequence; the nearest .* is 5, of 5, 11, 17, 23, 29"),
        (5, 17, 23),
    ),
    "google/gemma-4-E4B-it": ((6, SLIDING), (11, 17, 23)),
    "google/gemma-4-26B-A4B-it": ((6, SLIDING), (5, 17, 23)),
    "moonshotai/Kimi-K2.6": (2, (15, 30, 45)),
    "openbmb/MiniCPM-V-4.6": ((4, f"{STATE}3, of 3, 7"), (7, 11, 19)),
    "LiquidAI/LFM2-VL-1.6B": ((3, f"{STATE}2, of 2, 5"), (5, 8, 12)),
    "google/paligemma2-3b-pt-224": (2, (5, 13, 19)),
    "CohereLabs/aya-vision-8b": ((4, f"{WINDOW}3, 7, 11, 15"), (7, 15, 23)),
}
READERS = [name for name, one in checkpoints().items() if "text_config" in one.config]
READERS += [name for name in EXPECTED if name not in READERS]  # whose defaults say all


@functools.cache
def model_of(name):
    return checkpoints()[name].skeleton()


def planned(model, method):
    """Where a method acts; it is attached, and taken off again."""
    with foveate.use(model, method) as session:
        assert session.report() is not None
        steps = [*session.plan.pre_llm, *session.plan.llm]
    return [step.step.site for step in steps]


@pytest.mark.parametrize("name", READERS)
def test_methods_plan_on_a_real_checkpoint(name):
    model = model_of(name)
    billions, (fastv, layers) = checkpoints()[name].billions, EXPECTED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    assert planned(model, DivPrune()) == ["pre_llm"]
    assert planned(model, PyramidDrop()) == [f"llm:{layer}" for layer in layers]
    first, message = (fastv, None) if isinstance(fastv, int) else fastv
    if message is not None:
        with pytest.raises(LayerError, match=message):
            foveate.use(model, FastV(layer=2))
    assert planned(model, FastV()) == planned(model, FastV(layer=first)) == [f"llm:{first}"]
    assert not [n for n, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
