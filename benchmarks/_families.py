"""Random models of every family, of one size, without their checkpoints: default configs, scaled.

Features are handed in, so that the vision tower is never run; only the language model matters.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEADS = 4
VOCABULARY, IMAGE = 1000, 999
PATTERN = (  # of so many layers
    "layer_types", "rope_scaling_layers", "mlp_layer_types", "activation_sparsity_pattern",
    "intermediate_size",
)  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "depth": 2, "num_heads": 2, "embed_dim": 32,
    "image_size": 28, "patch_size": 14, "vocab_size": 40, "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1], "num_position_embeddings": 16,
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "downsample_hidden_size": 8, "adapter_in_dim": 32, "adapter_input_size": 32,
}  # fmt: skip
# Where a default tower is none that transformers itself can build, another stands in.
CLIP = {**VISION, "model_type": "clip_vision_model", "model_args": {"embed_dim": 32}}
TOWERS = {
    "perception_lm": CLIP,
    "fast_vlm": CLIP,
    "granite4_vision": {**CLIP, "hidden_size": 64},  # a head of its projectors has 64 channels
}
TYPED = ("gemma3n",)  # which take no tower but of a config class of their own, that of timm
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WINDOW = (  # sizes of layers with a window, where these have their own
    "swa_num_attention_heads", "swa_num_key_value_heads", "swa_q_lora_rank", "swa_kv_lora_rank",
    "swa_head_dim", "swa_qk_nope_head_dim", "swa_v_head_dim",
)  # fmt: skip
# Values of text models whose default config leaves them out, and builds no model without them.
TEXT = {
    "cohere_compass": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": None},
    },
    "gemma3n": {"num_kv_shared_layers": 2},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "dots3_note": dict.fromkeys(WINDOW, 0),  # to be scaled
}
TILES = {
    "granite_docling": 1344,
    "idefics3": 672,
    "smolvlm": 672,
}  # pixels of a tile of 576 tokens, where tiles are images
STACKED = (  # features of all images in one tensor, not in a list
    "aria", "aya_vision", "chameleon", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid",
    "fast_vlm", "gemma3", "gemma3n", "got_ocr2", "idefics3", "internvl", "janus", "ovis2",
    "paligemma", "perception_lm", "pp_chart2table", "qianfan_ocr", "shieldgemma2", "smolvlm",
    "video_llava", "vipllava",
)  # fmt: skip
CAUSAL = ("phi4_multimodal",)  # causal language models to transformers, and no more
CROP = 20  # side in patches of the crops of Phi-4 Multimodal


def text_sizes(hidden: int, layers: int) -> dict[str, Any]:
    """Sizes of a text model, under all the names that families have for them."""
    window = (HEADS, HEADS, hidden // 2, hidden // 2, *(hidden // HEADS * n for n in (2, 1, 1)))
    return {
        **dict(zip(WINDOW, window, strict=True)),
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2, "head_dim": hidden // HEADS,
        "query_pre_attn_scalar": hidden // HEADS, "max_position_embeddings": 8192,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        # mixtures of experts
        "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden, "n_group": 1, "topk_group": 1,
        "share_expert_dim": hidden, "top_k_experts": 2,
        # latent attention
        "q_lora_rank": hidden // 2, "kv_lora_rank": hidden // 2, "v_head_dim": hidden // HEADS,
        "qk_nope_head_dim": hidden // HEADS, "qk_rope_head_dim": hidden // HEADS,
        "index_n_heads": HEADS, "index_head_dim": hidden // HEADS,
        # inputs of layers
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": hidden // HEADS,
        # linear attention
        "linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS,
        "linear_key_head_dim": hidden // HEADS, "linear_value_head_dim": hidden // HEADS,
    }  # fmt: skip


def random_model(model_type: str, hidden: int, layers: int) -> Any:
    """A random model of a family, in float32.

    Args:
        model_type: the family.
        hidden: channels of the language model.
        layers: its layers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from foveate.families import FAMILIES

    torch.manual_seed(0)
    default = AutoConfig.for_model(model_type)
    kind, parts = type(default), {}
    vision = {**VISION, "out_hidden_size": hidden, "adapter_out_dim": hidden}
    whole = {
        "hidden_size": hidden, "projection_dim": hidden, "vocab_size": VOCABULARY,
        "image_token_id": IMAGE, "image_token_index": IMAGE, "image_patch_id": IMAGE,
        "video_token_id": 998, "video_token_index": 998, "tie_word_embeddings": False,
        "visual_indicator_token_ids": [990, 991, 992, 993, 994],
        "vocabulary_map": {"<image>": IMAGE},
        "downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1, 1, 2, 2],
    }  # fmt: skip
    for name in default.sub_configs:
        current = getattr(default, name, None)
        if current is None:
            continue
        sizes = text_sizes(hidden, layers) if name == "text_config" else vision
        if name == "adapter_config":
            sizes = {**vision, "text_hidden_size": hidden, "vision_feature_layer": [-1]}
        mrope = name == "text_config" and not FAMILIES[model_type].one_dimensional
        given = TEXT.get(model_type, {}) if name == "text_config" else {}
        parts[name] = _scaled(current, sizes, mrope, given)
        if name == "vision_config" and model_type in TILES:
            parts[name]["image_size"] = TILES[model_type]
    if "text_config" not in default.sub_configs:  # the sizes of its text model are its own
        parts = {**_scaled(default, text_sizes(hidden, layers), mrope=False), **parts}
    if model_type in CAUSAL:
        side = CROP * parts["vision_config"]["patch_size"]
        parts["vision_config"] |= {"image_size": side, "crop_size": side, "image_token_id": IMAGE}
    if model_type in TOWERS:
        parts["vision_config"] = TOWERS[model_type]
    if model_type in TYPED:
        parts["vision_config"] = _stand_in(type(default.vision_config))(**parts["vision_config"])
    known = {**inspect.signature(kind).parameters, **default.to_dict()}
    config = kind(**{**parts, **{n: v for n, v in whole.items() if n in known}})
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModelForImageTextToText
    model = auto.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def _stand_in(kind: type) -> type:
    """A config class of a tower's own kind, registered for a tower that is empty and never runs."""
    from transformers import AutoModel, PreTrainedModel

    class Config(kind):
        model_type = f"{kind.model_type}_stand_in"

    class Tower(PreTrainedModel):
        config_class = Config
        _supports_sdpa = True

    AutoModel.register(Config, Tower)
    return Config


def _scaled(
    config: Any, sizes: dict[str, Any], mrope: bool, given: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """A config's values, and those given, with the sizes that it knows, as many layers of each kind
    as fit.
    """
    values = {**config.to_dict(), **given}
    everywhere, sizes = sizes, {n: v for n, v in sizes.items() if n in values}
    if "patch_sizes" in values:  # which are those of so many layers
        sizes.pop("num_hidden_layers", None)
    listed = [n for n, v in sizes.items() if isinstance(values[n], list) and isinstance(v, int)]
    several = {n: [sizes[n]] * len(values[n]) for n in listed}
    values |= sizes | several
    if isinstance(getattr(config, "image_size", None), list | tuple):
        values["image_size"] = [28, 28]
    if isinstance(getattr(config, "patch_size", None), list | tuple):
        values["patch_size"] = [14, 14]
    for name in PATTERN:
        if values.get(name) and isinstance(values[name], list):
            count = values["num_hidden_layers"]
            values[name] = (values[name] * count)[:count]
    values.pop("per_layer_config", None)  # heads of layers by number; here all are of one size
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = HEADS  # latents are expanded to all heads
    if values.get("layer_types") and "sliding_window" in values:
        values["sliding_window"] = 4096  # no prompt is longer
    for name in config.sub_configs:
        values[name] = _scaled(getattr(config, name), everywhere, mrope)
    if mrope:
        share = 0.5 if config.model_type.startswith("glm") else 1.0
        total = int(values["hidden_size"] // HEADS * share) // 2
        high = total * 3 // 8
        axes = [total - 2 * high, high, high]
        rope = values.get("rope_parameters") or {}
        sections = {
            "partial_rotary_factor": share,
            "mrope_section": axes[::-1] if config.model_type.startswith("ernie") else axes,
        }
        kinds = [kind for kind in rope if isinstance(rope[kind], dict)]
        of_kinds = {kind: {**rope[kind], **sections} for kind in kinds}
        values["rope_parameters"] = {**rope, **(of_kinds or sections)}
    return values


def _grid(model_type: str, visual: int) -> tuple[int, int]:
    """Height and width of an image of so many tokens: a square if there is one."""
    if model_type == "hunyuan_vl":  # a newline after every row, and a token at each end
        inner = visual - 2
        height = max(n for n in range(1, math.isqrt(inner) + 1) if inner % n == 0)
        return height, inner // height - 1
    side = math.isqrt(visual)
    return (side, side) if side * side == visual else (1, visual)


@functools.cache
def encoder_output() -> Any:
    """What encoders return, with all that some families' have."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    @dataclass
    class Output(BaseModelOutputWithPooling):
        deepstack_features: Any = None
        visual_indicator_features: Any = None
        router_logits: Any = None

    return Output


def _planes(family: Any, features: list[Any]) -> list[Any]:
    """Features added before the first layers; with the layer, where a config names the layers."""
    named = getattr(family.config, "spatial_target_layers", None)
    if named is None:
        return [features] * family.first_llm_layer
    return [(layer, features) for layer in sorted({0, *named})]


def _crops(model: Any, visual: int, generator: Any) -> dict[str, Any]:
    """Empty crops of an image of so many tokens of Phi-4 Multimodal, to which nothing but them
    brings features; instead of its tower, something random is read.
    """
    import torch

    vision, cells = model.config.vision_config, CROP // 2
    rest = visual - 1 - cells * (cells + 1)  # without the separator, the thumbnail and its newlines
    height = max(n for n in range(1, math.isqrt(rest) + 1) if rest % n == 0)
    width = rest // height - 1
    rows, columns = -(-height // cells), -(-width // cells)
    count, side = 1 + rows * columns, vision.image_size
    seen = torch.zeros(rows * CROP, columns * CROP)
    seen[: 2 * height, : 2 * width] = 1
    seen = seen.view(rows, CROP, columns, CROP).transpose(1, 2).flatten(0, 1)
    features = torch.randn(count, cells**2, vision.hidden_size, generator=generator) * 0.02
    place = model.model.embed_tokens_extend.image_embed
    place.get_img_features = lambda pixels, attention_mask: features
    return {
        "image_pixel_values": torch.zeros(1, count, 3, side, side),
        "image_sizes": torch.tensor([[rows * side, columns * side]]),
        "image_attention_mask": torch.cat((torch.ones(1, CROP, CROP), seen))[None].bool(),
    }


def prompt(model: Any, visual: int, text: int = 64) -> dict[str, Any]:
    """A prompt of `visual` image tokens amid `text` text tokens, with random features."""
    import torch

    from foveate.families import find_family

    family = find_family(model)
    token = family.placeholder_ids["image"]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 900, (text,), generator=generator)
    half = text // 2
    ids = torch.cat((ids[:half], torch.full((visual,), token), ids[half:]))[None]
    if family.model_type in CAUSAL:
        return {"input_ids": ids, "logits_to_keep": 1, **_crops(model, visual, generator)}
    hidden = model.config.get_text_config().hidden_size
    late = family.late_projector("image")
    width = hidden if late is None else next(late.parameters()).shape[1]
    features = torch.randn(1, visual, width, generator=generator) * 0.02
    stacked = family.model_type in STACKED
    output = encoder_output()(
        last_hidden_state=None if late is None else features,
        pooler_output=features if stacked else list(features),
        deepstack_features=_planes(family, list(features)),
        visual_indicator_features=torch.randn(5, hidden, generator=generator) * 0.02,
    )
    inputs = {"input_ids": ids, "mm_encoder_outputs": {"image": output}, "logits_to_keep": 1}
    names = inspect.signature(family.base.forward).parameters
    visible = (ids == token).int()
    if "mm_token_type_ids" in names:
        inputs["mm_token_type_ids"] = visible
    if "moe_mm_token_type_ids" in names:
        inputs["moe_mm_token_type_ids"] = visible
    if "token_type_ids" in names:
        inputs["token_type_ids"] = visible
    if "image_grid_thw" in names:
        height, width = _grid(family.model_type, visual)
        merge = family.side("image")
        inputs["image_grid_thw"] = torch.tensor([[1, height * merge, width * merge]])
    return inputs
