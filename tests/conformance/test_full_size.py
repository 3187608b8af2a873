"""Configs of real size, built without memory: what tiny configs could hide."""

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from foveate.core import get_method
from foveate.engine.planning import make_plan
from foveate.errors import FoveateError
from foveate.families import find_family
from foveate.signals import SIGNALS
from tests.conformance.zoo.gemma3n import TowerConfig
from tests.methods_for_tests import needed, readers_methods

# model type: decoder layers, encoder layers, the one the language model sees, class token
SIZES = {
    "cosmos3_edge": (28, 27, 26, False),
    "cosmos3_omni": (32, 27, 26, False),
    "deepseek_vl": (32, 12, 11, False),
    "ernie4_5_vl_moe": (28, 32, 31, False),
    "glm4v": (40, 24, 23, False),
    "glm_ocr": (16, 24, 23, False),
    "glmga": (40, 24, 23, False),
    "granite_docling": (28, 12, 11, False),
    "hunyuan_vl": (32, 27, 26, False),
    "hyperclovax_vision_v2": (32, 32, 31, False),
    "idefics3": (32, 12, 11, False),
    "internvl": (32, 24, 23, True),
    "kimi_k25": (61, 27, 26, False),
    "janus": (32, 24, 23, False),
    "lighton_ocr": (28, 24, 23, False),
    "llava": (32, 24, 22, True),
    "llava_next": (32, 24, 22, True),
    "llava_next_video": (32, 24, 22, True),
    "llava_onevision": (32, 26, 25, False),
    "minimax_m3_vl": (60, 32, 31, False),
    "mistral3": (40, 24, 23, False),
    "ovis2": (32, 24, 23, False),
    "paddleocr_vl": (18, 27, 26, False),
    "paligemma": (18, 27, 26, False),
    "qianfan_ocr": (32, 24, 23, True),
    "qwen2_5_omni_thinker": (28, 32, 31, False),
    "qwen2_5_vl": (80, 32, 31, False),
    "qwen2_vl": (80, 32, 31, False),
    "qwen3_omni_moe_thinker": (28, 27, 26, False),
    "qwen3_vl": (32, 27, 26, False),
    "smolvlm": (32, 12, 11, False),
    "video_llama_3": (32, 12, 11, False),
    "video_llava": (32, 24, 22, True),
    "vipllava": (32, 24, 22, True),
}
# The same of towers that methods cannot act inside: decoder layers, the first before which tokens
# may be removed, and those whose attention can rank them.
CLOSED = {
    "aria": (32, 0, range(32)),
    "chameleon": (32, 0, range(32)),
    "deepseek_ocr2": (32, 0, range(32)),
    "deepseek_vl_hybrid": (32, 0, range(32)),
    "emu3": (32, 0, range(32)),
    "gemma3n": (35, 0, range(4, 20, 5)),
    "gemma4_unified": (30, 0, range(5, 30, 6)),
    "got_ocr2": (24, 0, range(24)),
    "granite4_vision": (40, 21, range(40)),
    "idefics2": (32, 0, range(32)),
    "llama4": (48, 0, range(3, 48, 4)),
    "phi4_multimodal": (32, 0, range(32)),
    "pp_chart2table": (24, 0, range(24)),
    "step3p7": (45, 0, range(45)),
    "unlimited_ocr": (12, 0, range(12)),
}
MAMBA, MOE = "linear_attention", "moe"
MISSING = {  # what configs of these do not say of themselves
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6,
        }
    },
    "emu3": {"vocabulary_map": {"<image>": 151858}},
    "gemma3n": {"vision_config": TowerConfig()},
    "nemotron_h_omni": {
        "text_config": {
            "layers_block_type": [MAMBA, MOE, MAMBA, MOE, MAMBA, "full_attention", MOE] * 7,
            "num_experts_per_tok": 6, "n_routed_experts": 128, "hidden_size": 2688,
        }
    },
    "granite4_vision": {
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]],
        "text_config": {"num_hidden_layers": 40, "hidden_size": 2560},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 16,
        },
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [16] * 4, "rope_theta": 1e4,
            },
        }
    },
}  # fmt: skip

# model type: decoder layers, every how many of them one sees all, and the first of those
HYBRID = {
    "exaone4_5": (32, 4, 3),
    "gemma4": (30, 6, 5),
    "lfm3_vl": (24, 4, 2),
    "minicpm_ocr": (32, 4, 3),
    "minicpmv4_6": (32, 4, 3),
    "minicpmv4_7": (32, 4, 3),
    "muse_glimmer": (52, 4, 3),
    "muse_spark": (62, 4, 1),
    "nemotron_h_omni": (49, 7, 5),
    "qwen3_5": (32, 4, 3),
    "qwen3_5_moe": (40, 4, 3),
}


def why_not(family, method):
    """Why a method with default settings does not work on a model, or `None` if it does."""
    try:
        make_plan(family, [get_method(method)()])
    except FoveateError as error:
        return str(error)
    return None


@functools.cache
def family_of(model_type):
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **MISSING.get(model_type, {}))
        read = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        kind = AutoModelForImageTextToText if read else AutoModelForCausalLM
        return find_family(kind.from_config(config))


@pytest.mark.parametrize("model_type", SIZES)
def test_layers_are_found(model_type):
    family = family_of(model_type)
    layers = family.text_layers, family.vision_layers, family.feature_layer
    assert (*layers, family.encoder.class_token) == SIZES[model_type]
    assert family.attention_layers == tuple(range(family.text_layers))


@pytest.mark.parametrize("model_type", HYBRID)
def test_layers_that_see_all_are_found(model_type):
    family, (layers, step, first) = family_of(model_type), HYBRID[model_type]
    assert family.text_layers == layers
    assert family.attention_layers == tuple(range(first, layers, step))
    assert family.recurrent_layers.isdisjoint(family.attention_layers)


@pytest.mark.parametrize("method", readers_methods())
@pytest.mark.parametrize("model_type", [*HYBRID, "gemma3n", "lfm2_vl"])
def test_methods_plan_on_hybrid_models_or_say_why_not(model_type, method):
    family, reason = family_of(model_type), why_not(family_of(model_type), method)
    if reason is None:
        return
    signals = [SIGNALS[need] for need in needed(get_method(method), family)]
    if any(signal.class_token for signal in signals):
        assert "no class token" in reason or "acts inside the encoder" in reason
    elif method == "yopo":
        assert "not made like those of Llama" in reason
    elif method == "transprune" and family.keyless_layers > family.recurrent_layers:
        assert "one or the other" in reason
    elif method == "prunevid" and family.recurrent_layers:
        assert "a running state" in reason
    else:
        assert "encoder" in reason


@pytest.mark.parametrize("model_type", CLOSED)
def test_methods_that_need_no_tower_plan_where_it_is_closed(model_type):
    family, (layers, first, ranking) = family_of(model_type), CLOSED[model_type]
    assert (family.text_layers, family.first_llm_layer) == (layers, first)
    assert family.attention_layers == tuple(ranking)
    for method in ("divprune", "pyramiddrop"):
        assert why_not(family, method) is None
    assert "acts inside the encoder" in why_not(family, "tome")


@pytest.mark.parametrize("method", readers_methods())
@pytest.mark.parametrize("model_type", SIZES)
def test_methods_plan_or_say_why_not(model_type, method):
    family = family_of(model_type)
    cls, reason = get_method(method), why_not(family, method)
    signals = [SIGNALS[need] for need in needed(cls, family)]
    if any(signal.class_token for signal in signals) and not SIZES[model_type][3]:
        assert "no class token" in reason
    elif family.encoder.packed is not None and not all(signal.varlen for signal in signals):
        assert "cannot give" in reason
    elif cls.stage == "vision" and family.encoder.packed is not None and reason is not None:
        assert "where images lie in one sequence or are padded" in reason
    elif method == "yopo" and reason is not None:
        assert "not made like those of Llama" in reason or not family.planar
    elif cls.stage == "vision" and not family.encoder.gridded and reason is not None:
        assert "by the grid of patches" in reason
    elif reason is not None:
        assert "DeepStack" in reason
        assert family.first_llm_layer > 0
