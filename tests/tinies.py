"""Tiny random LLaVA models and prompts for them."""

from functools import partial

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

IMAGE = 120  # placeholder id
PATCHES = 36
LAYERS = 6
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_llava(
    text: str = "llama",
    attention: str = "sdpa",
    seed: int = 0,
    layers: int = LAYERS,
    window: int | None = None,
    vision_layers: int = 4,
):
    """A random LLaVA with peaked attention: 36 visual tokens of a 48 x 48 image. With `mistral`,
    every layer sees a window.
    """
    torch.manual_seed(seed)
    kv_heads = 4 if text == "llama" else 2
    kind = {"qwen2": Qwen2Config, "mistral": partial(MistralConfig, sliding_window=window)}
    text_config = kind.get(text, LlamaConfig)(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=512,
        initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision_config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=vision_layers,
        num_attention_heads=4, image_size=48, patch_size=8, initializer_factor=6.0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompts(rows, seed=0, side="left", patches=PATCHES):
    """A padded batch.

    Args:
        rows: for each row the lengths of its text pieces; an image stands between two pieces.

    Returns:
        dict of input_ids, attention_mask and pixel_values.
    """
    generator = torch.Generator().manual_seed(seed)
    sequences, images = [], 0
    for pieces in rows:
        ids = []
        for number, length in enumerate(pieces):
            if number:
                ids += [IMAGE] * patches
                images += 1
            ids += torch.randint(3, 119, (length,), generator=generator).tolist()
        sequences.append(ids)
    width = max(len(ids) for ids in sequences)
    padded, mask = [], []
    for ids in sequences:
        gap = [0] * (width - len(ids))
        padded.append(gap + ids if side == "left" else ids + gap)
        ones = [1] * len(ids)
        mask.append(gap + ones if side == "left" else ones + gap)
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    if images:
        size = int(patches**0.5) * 8
        inputs["pixel_values"] = torch.randn(images, 3, size, size, generator=generator)
    return inputs


def row_of(inputs, row):
    """One row of a batch, alone and without padding."""
    keep = inputs["attention_mask"][row].bool()
    alone = {
        "input_ids": inputs["input_ids"][row][keep][None],
        "attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.long),
    }
    counts = [(ids == IMAGE).sum().item() // PATCHES for ids in inputs["input_ids"]]
    if counts[row]:
        start = sum(counts[:row])
        alone["pixel_values"] = inputs["pixel_values"][start : start + counts[row]]
    return alone


def tiny_clip(width=32):
    """A random CLIP, and a tokenizer that knows letters."""
    vocab = {letter: i for i, letter in enumerate(LETTERS)}
    vocab |= {f"{letter}</w>": 26 + i for i, letter in enumerate(LETTERS)}
    vocab |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    sizes = {
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    text = {
        **sizes, "hidden_size": 24, "vocab_size": 54, "max_position_embeddings": 12,
        "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53,
    }  # fmt: skip
    vision = {**sizes, "hidden_size": width, "image_size": 28, "patch_size": 14}
    torch.manual_seed(4)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = CLIPModel(config).eval().requires_grad_(False)
    for weight in (
        model.vision_model.post_layernorm.weight,
        model.vision_model.post_layernorm.bias,
    ):
        weight.data += torch.rand_like(weight)
    return model, CLIPTokenizer(vocab=vocab, merges=[])
