"""Models and prompts that methods are checked on; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from foveate import tiny

SIDE = 6  # merged tokens along each side of the M-RoPE model's images


def llava() -> Any:
    """The packaged tiny VLM: a LLaVA with a CLIP encoder and a class token."""
    model, _ = tiny.load()
    return model


def mrope() -> Any:
    """A random Qwen2-VL with positions in time, height and width."""
    torch.manual_seed(0)
    rope: Any = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope,
            "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": 4, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 8,
        },
        image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def prompts(model: Any, rows: Sequence[Sequence[int]], seed: int = 0) -> dict[str, Any]:
    """A left-padded batch of random text around random images.

    Args:
        model: from `llava` or `mrope`.
        rows: for each row the lengths of its text pieces; an image stands between two pieces.
        seed: for text and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    moving = config.model_type == "qwen2_vl"
    count = SIDE**2 if moving else (config.vision_config.image_size // 8) ** 2
    sequences: list[list[int]] = []
    for pieces in rows:
        ids: list[int] = []
        for number, length in enumerate(pieces):
            image = [config.image_token_id] * count
            ids += ([122, *image, 123] if moving else image) if number else []
            ids += torch.randint(5, 60, (length,), generator=generator).tolist()
        sequences.append(ids)
    width = max(map(len, sequences))
    pad = [0] * width
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([(pad + ids)[-width:] for ids in sequences]),
        "attention_mask": torch.tensor([(pad + [1] * len(ids))[-width:] for ids in sequences]),
    }
    images = sum(len(pieces) - 1 for pieces in rows)
    if images:
        inputs |= pixels(model, images, generator)
    if moving:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    return inputs


def pixels(model: Any, images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random images."""
    if model.config.model_type == "qwen2_vl":
        vision = model.config.vision_config
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        values = torch.randn(images * 4 * SIDE**2, patch, generator=generator)
        return {
            "pixel_values": values,
            "image_grid_thw": torch.tensor([[1, 2 * SIDE, 2 * SIDE]] * images),
        }
    size = model.config.vision_config.image_size
    return {"pixel_values": torch.randn(images, 3, size, size, generator=generator)}


def one_row(inputs: dict[str, Any], model: Any, row: int) -> dict[str, Any]:
    """A row of `prompts` alone, without padding."""
    real = inputs["attention_mask"][row].bool()
    alone: dict[str, Any] = {
        name: inputs[name][row][real][None]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in inputs
    }
    token = model.config.image_token_id
    counts = (inputs["input_ids"] == token).sum(1)
    per_image = SIDE**2 if "image_grid_thw" in inputs else int(counts[counts > 0].min())
    before, here = int(counts[:row].sum()) // per_image, int(counts[row]) // per_image
    if here and "image_grid_thw" in inputs:
        patches = 4 * SIDE**2
        alone["pixel_values"] = inputs["pixel_values"][patches * before : patches * (before + here)]
        alone["image_grid_thw"] = inputs["image_grid_thw"][before : before + here]
    elif here:
        alone["pixel_values"] = inputs["pixel_values"][before : before + here]
    return alone
