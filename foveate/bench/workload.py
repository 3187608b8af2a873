"""Models of known sizes with random weights, and prompts with a wished number of visual tokens.

Time does not depend on what weights say, so speed can be measured without a download.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError

TEXT = 64
"""Text tokens of a prompt."""
_LLAMA = re.compile(r"llama-(\d+)x(\d+)")
_IMAGE = 1001  # placeholder of random models; their text lies below


def known_sizes() -> tuple[str, ...]:
    """Names that `random_config` takes; `llama-768x16` stands for any width and depth."""
    return (*_SIZES, "llama-768x16")


def random_config(name: str) -> Any:
    """The config of a bundled size.

    Args:
        name: `llava-7b`, `llava-next-7b`, `qwen3-vl-4b`, or `llama-WIDTHxLAYERS`: a LLaVA with a
            Llama of that width and depth and a CLIP tower (336 pixels, 576 tokens) in the
            proportions of LLaVA-1.5: a quarter of the width, three quarters of the layers.

    Raises:
        InputError: no such size.
    """
    if found := _LLAMA.fullmatch(name):
        hidden, layers = map(int, found.groups())
        if hidden % 64 == 0 and hidden and layers > 3:
            return _llava(hidden, layers, math.ceil(hidden * 8 / 3 / 64) * 64, 1024)
        raise InputError(
            f"random:{name}: the width must be a multiple of 64, with 4 layers or more"
        )
    if name not in _SIZES:
        raise InputError(f"no random model {name!r}; known: {', '.join(known_sizes())}")
    return _SIZES[name]()


def random_model(name: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model of a bundled size with random weights, made on the device in that type."""
    from transformers import AutoModelForImageTextToText, set_seed

    config = random_config(name)
    set_seed(0)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def random_prompt(
    model: Any, tokens: int, batch: int, text: int = TEXT, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of a random model: random images amid random text, rows of equal length.

    LLaVA repeats images of its size until the tokens are there (2,880 are five of 576, the tiles
    of a LLaVA-NeXT image); LLaVA-NeXT takes the image size, and number of them, that comes
    nearest; Qwen's encoder takes one image of exactly that many tokens.

    Args:
        model: from `random_model`.
        tokens: visual tokens wished for in each row.
        batch: rows.
        text: text tokens of each row.
        seed: of text and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    images, count = _IMAGES[model.config.model_type](model.config, tokens, batch, generator)
    ids = torch.randint(3, 1000, (batch, text), generator=generator)
    half = text // 2
    visual = torch.full((batch, count), model.config.image_token_id)
    inputs = {**images, "input_ids": torch.cat((ids[:, :half], visual, ids[:, half:]), 1)}
    if model.config.model_type == "qwen3_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def repeat_rows(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """A batch of the same prompt again and again."""
    return {
        name: torch.cat([value] * batch) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def fit_images(count: Callable[[int, int], int], tokens: int) -> tuple[int, int]:
    """Side and number of square images whose visual tokens come nearest to a wish.

    Args:
        count: visual tokens of so many images of such a side in pixels.
        tokens: the wish.
    """
    side, seen = 336, {}
    for _ in range(4):
        seen[side] = count(side, 1)
        side = max(28, round(side * math.sqrt(tokens / max(seen[side], 1)) / 28) * 28)
        if side in seen or side > 4096:
            break
    best = {
        (side, number): abs(one * number - tokens)
        for side, one in seen.items()
        for number in {max(1, tokens // max(one, 1)), max(1, round(tokens / max(one, 1)))}
    }
    return min(best, key=lambda key: (best[key], key[1]))


# -- sizes


def _llava(hidden: int, layers: int, mlp: int, vocabulary: int, kind: str = "llava") -> Any:
    """LLaVA or LLaVA-NeXT in the proportions of LLaVA-1.5."""
    from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

    width = max(hidden // 256 * 64, 64)
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers * 3 // 4,
        num_attention_heads=width // 64, image_size=336, patch_size=14,
    )  # fmt: skip
    heads = 32 if hidden == 4096 else hidden // 64
    text = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=mlp, vocab_size=vocabulary, max_position_embeddings=32768,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return AutoConfig.for_model(
        kind, vision_config=vision, text_config=text, image_token_id=_IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip


def _qwen3_vl_4b() -> Any:
    """Qwen3-VL-4B: 36 layers of 2560, eight key-value heads, 24 encoder layers of 1024."""
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
            "mrope_interleaved": True}  # fmt: skip
    return Qwen3VLConfig(
        text_config={
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 262144, "rope_parameters": rope,
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "deepstack_visual_indexes": [5, 11, 17],
        },
        image_token_id=_IMAGE, tie_word_embeddings=True,
    )  # fmt: skip


_SIZES: dict[str, Callable[[], Any]] = {
    "llava-7b": lambda: _llava(4096, 32, 11008, 32064),
    "llava-next-7b": lambda: _llava(4096, 32, 11008, 32064, "llava_next"),
    "qwen3-vl-4b": _qwen3_vl_4b,
}

# -- images: model inputs, and the visual tokens of a row

Images = tuple[dict[str, Tensor], int]


def _tiles(config: Any, tokens: int, batch: int, generator: torch.Generator) -> Images:
    """Images of the tower's size."""
    vision = config.vision_config
    each = (vision.image_size // vision.patch_size) ** 2
    number = max(1, round(tokens / each))
    shape = batch * number, 3, vision.image_size, vision.image_size
    return {"pixel_values": torch.randn(shape, generator=generator)}, number * each


def _anyres(config: Any, tokens: int, batch: int, generator: torch.Generator) -> Images:
    """Images of LLaVA-NeXT that fill their tiles: thumbnail, tiles, a newline for every row."""
    vision = config.vision_config
    tile, side = vision.image_size, vision.image_size // vision.patch_size

    def cost(size: tuple[int, int]) -> int:
        height, width = (edge // tile * side for edge in size)
        return side**2 + height * (width + 1)

    choices = {
        (tuple(size), number): abs(number * cost(size) - tokens)
        for size in config.image_grid_pinpoints
        for number in {max(1, tokens // cost(size)), max(1, round(tokens / cost(size)))}
    }
    (height, width), number = min(choices, key=lambda key: (choices[key], key[1]))
    count = 1 + height // tile * (width // tile)
    shape = batch * number, count, 3, tile, tile
    pixels = torch.randn(shape, generator=generator)
    sizes = torch.tensor([[height, width]] * batch * number)
    return {"pixel_values": pixels, "image_sizes": sizes}, number * cost((height, width))


def _packed(config: Any, tokens: int, batch: int, generator: torch.Generator) -> Images:
    """One image of exactly so many tokens in a Qwen encoder, as square as can be."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    grid = torch.tensor([[1, height * merge, tokens // height * merge]] * batch)
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn((batch * tokens * merge**2, patch), generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}, tokens


_IMAGES: dict[str, Callable[[Any, int, int, torch.Generator], Images]] = {
    "llava": _tiles,
    "llava_next": _anyres,
    "qwen3_vl": _packed,
}
