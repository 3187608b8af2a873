"""Configs of real checkpoints, built on the meta device: methods attach and plan as published.

Tiny configs hide what depends on the number of layers, on layer patterns and on towers. That the
numbers are the checkpoint's is checked by its published count of parameters. A checkpoint is one
entry of `CHECKPOINTS`; one whose family is not known yet is skipped.
"""

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import foveate
from foveate.errors import LayerError
from foveate.methods import DivPrune, FastV, PyramidDrop

CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    "projection_dim": 768,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
VICUNA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32064,
}  # fmt: skip
VICUNA_13B = {
    **VICUNA_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40,
}  # fmt: skip
QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
    },
}  # fmt: skip
QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}  # fmt: skip

# name -> (model type, config, parameters in billions, FastV's first layer, with the error of its
# default if that does not work, PyramidDrop's layers)
CHECKPOINTS = {
    "LLaVA-1.5-7B": (
        "llava", {"vision_config": CLIP, "text_config": VICUNA_7B}, 7.06, 2, (8, 16, 24),
    ),
    "LLaVA-1.5-13B": (
        "llava", {"vision_config": CLIP, "text_config": VICUNA_13B}, 13.35, 2, (10, 20, 30),
    ),
    "LLaVA-NeXT-7B": (
        "llava_next", {"vision_config": CLIP, "text_config": VICUNA_7B}, 7.06, 2, (8, 16, 24),
    ),
    "LLaVA-OneVision-7B": (
        "llava_onevision",
        {
            "vision_config": {**SIGLIP, "num_hidden_layers": 26, "image_size": 384},
            "text_config": {
                "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
                "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                "vocab_size": 152000,
            },
        },
        8.03, 2, (7, 14, 21),
    ),
    "InternVL3-8B": (
        "internvl",
        {
            "vision_config": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
                "attention_bias": True,
            },
            "text_config": {
                "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
                "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                "vocab_size": 151674,
            },
            "tie_word_embeddings": False,
        },
        7.94, 2, (7, 14, 21),
    ),
    "SmolVLM-2.2B": (
        "idefics3",
        {
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
            },
            "text_config": {
                "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
                "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32,
                "vocab_size": 49155,
            },
            "scale_factor": 3,
        },
        2.25, 2, (6, 12, 18),
    ),
    "Qwen2-VL-7B": (
        "qwen2_vl",
        {
            "vision_config": {
                "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4,
                "num_heads": 16, "patch_size": 14,
            },
            "text_config": QWEN2_7B,
        },
        8.29, 2, (7, 14, 21),
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        {
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "out_hidden_size": 3584, "patch_size": 14, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            "text_config": QWEN2_7B,
        },
        8.29, 2, (7, 14, 21),
    ),
    "Qwen3-VL-4B": (
        "qwen3_vl",
        {
            "vision_config": {
                "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
                "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17],
            },
            "text_config": {**QWEN3_8B, "hidden_size": 2560, "intermediate_size": 9728},
            "tie_word_embeddings": True,
        },
        4.44, (3, "first layer before which tokens may be removed is 3"), (9, 18, 27),
    ),
    "Qwen3-VL-8B": (
        "qwen3_vl",
        {
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24],
            },
            "text_config": QWEN3_8B,
        },
        8.77, (3, "first layer before which tokens may be removed is 3"), (9, 18, 27),
    ),
    # The defaults of these configs are those of the checkpoint.
    "GLM-4.1V-9B": ("glm4v", {"text_config": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12],
            "partial_rotary_factor": 0.5,
        },
    }}, 10.29, 2, (10, 20, 30)),
    "Gemma3-4B": (
        "gemma3",
        {
            "vision_config": {**SIGLIP, "image_size": 896},
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                "sliding_window": 1024, "vocab_size": 262208,
            },
        },
        4.30, (6, "only a window of the sequence; layers that see all of it are 5, 11, 17, 23, 29"),
        (5, 17, 23),
    ),
    "PaliGemma2-3B": (
        "paligemma",
        {
            "vision_config": {**SIGLIP, "image_size": 224},
            "text_config": {
                "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
                "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                "head_dim": 256, "vocab_size": 257216, "sliding_window": 4096,
            },
            "projection_dim": 2304, "image_token_index": 257152,
        },
        3.03, 2, (5, 13, 19),
    ),
    "Aya-Vision-8B": (
        "aya_vision",
        {
            "vision_config": {**SIGLIP, "image_size": 364},
            "text_config": {
                "model_type": "cohere2", "hidden_size": 4096, "intermediate_size": 14336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                "sliding_window": 4096, "sliding_window_pattern": 4, "vocab_size": 256000,
            },
            "alignment_intermediate_size": 28672,
        },
        8.63, (4, "sees only a window of the sequence; layers that see all of it are 3, 7, 11, 15"),
        (7, 15, 23),
    ),
}  # fmt: skip


@functools.cache
def model_of(name):
    model_type, parts, *_ = CHECKPOINTS[name]
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **parts))


def planned(model, method):
    """Where a method acts; it is attached, and taken off again."""
    with foveate.use(model, method) as session:
        assert session.report() is not None
        steps = [*session.plan.pre_llm, *session.plan.llm]
    return [step.step.place for step in steps]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_methods_plan_on_a_real_checkpoint(name):
    model = model_of(name)
    _, _, billions, fastv, layers = CHECKPOINTS[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    assert planned(model, DivPrune()) == ["pre_llm"]
    assert planned(model, PyramidDrop()) == [f"llm:{layer}" for layer in layers]
    first, message = (fastv, None) if isinstance(fastv, int) else fastv
    if message is not None:
        with pytest.raises(LayerError, match=message):
            foveate.use(model, FastV())
    assert planned(model, FastV(layer=first)) == [f"llm:{first}"]
    assert not [n for n, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
