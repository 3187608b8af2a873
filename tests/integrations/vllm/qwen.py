"""Tiny random checkpoints of Qwen2.5-VL and Qwen3-VL."""

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.integrations.vllm.checkpoints import TEXT, tokenizer

SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
NAMES = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
VOCABULARY = TEXT["vocab_size"] + len(SPECIAL)
IDS = {name: TEXT["vocab_size"] + i for i, name in enumerate(NAMES)}
LANGUAGE = {**TEXT, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
VISION = {
    "depth": 3, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "intermediate_size": 96, "out_hidden_size": 64,
    "initializer_range": 0.15,
}  # fmt: skip
SIZE = {"shortest_edge": 28 * 28, "longest_edge": 560 * 560}
PIXELS = {"size": SIZE, "patch_size": 14, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def rope(*sections, **more):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}


def qwen2_5_vl():
    """Qwen2.5-VL: the second of three layers of the tower sees whole images, others windows."""
    config = Qwen2_5_VLConfig(
        vision_config={**VISION, "window_size": 56, "fullatt_block_indexes": [1],
                       "tokens_per_second": 2},
        text_config={**LANGUAGE, "rope_parameters": rope(4, 6, 6)}, **IDS,
    )  # fmt: skip
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(size=SIZE), tokenizer(SPECIAL), Qwen2VLVideoProcessor(size=SIZE),
        chat_template="",
    )  # fmt: skip
    return config, processor


def qwen3_vl():
    """Qwen3-VL, with two DeepStack planes."""
    config = Qwen3VLConfig(
        vision_config={**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        text_config={**LANGUAGE, "head_dim": 32,
                     "rope_parameters": rope(6, 5, 5, mrope_interleaved=True)},
        **IDS,
    )  # fmt: skip
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**PIXELS), tokenizer(SPECIAL), Qwen3VLVideoProcessor(**PIXELS),
        chat_template="",
    )  # fmt: skip
    return config, processor
