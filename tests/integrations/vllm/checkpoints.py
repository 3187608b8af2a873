"""Tiny random checkpoints that vLLM and transformers both load, with processors made by hand."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

WORDS = 96
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEXT = {
    "vocab_size": WORDS + len(SPECIAL), "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CLIP = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 7, "initializer_factor": 4.0,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}<image> {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


def tokenizer(special=(), names=None):
    """A tokenizer of words, `w0` to `w93`."""
    words = ["user", "assistant", *(f"w{i}" for i in range(WORDS - 2))]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words, *special])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens=["<image>", *special],
        model_specific_special_tokens=names or {}, chat_template=TEMPLATE,
    )  # fmt: skip


def llava():
    """LLaVA-1.5: config and processor."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT),
        image_token_id=4, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = LlavaProcessor(
        _images(CLIPImageProcessorPil), tokenizer(), patch_size=7, chat_template=TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return config, processor


PINPOINTS = [[56, 56], [56, 112], [112, 56], [112, 112]]
SIGLIP = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 7, "vision_use_head": False,
}  # fmt: skip


def llava_siglip():
    """LLaVA-1.5 with SigLIP's tower."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**SIGLIP), text_config=LlamaConfig(**TEXT),
        image_token_id=4, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 56, "width": 56}), tokenizer(), patch_size=7,
        chat_template=TEMPLATE, vision_feature_select_strategy="full",
    )  # fmt: skip
    return config, processor


def llava_next():
    """LLaVA-NeXT."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT),
        image_token_index=4, vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    processor = LlavaNextProcessor(
        images, tokenizer(), patch_size=7, chat_template=TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return config, processor


def llava_onevision():
    """LLaVA-OneVision."""
    text = {**TEXT, "vocab_size": TEXT["vocab_size"] + 1}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SIGLIP), text_config=Qwen2Config(**text),
        image_token_index=4, video_token_index=text["vocab_size"] - 1,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS)
    processor = LlavaOnevisionProcessor(
        images, tokenizer(["<video>"]), LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=64, vision_feature_select_strategy="full", chat_template=TEMPLATE,
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return config, processor


def internvl(norms=False):
    """InternVL."""
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<image>", "video_token": "<video>",
    }  # fmt: skip
    text = {**TEXT, "vocab_size": TEXT["vocab_size"] + 3}
    vision = InternVLVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        image_size=(56, 56), patch_size=(7, 7), use_qk_norm=norms,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_id=4,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    words = tokenizer(["<img>", "</img>", "<video>"], names)
    processor = InternVLProcessor(
        images, words, InternVLVideoProcessor(size=size), image_seq_length=16,
        chat_template=TEMPLATE,
    )  # fmt: skip
    return config, processor


MAKERS = {
    "llava": llava,
    "llava-siglip": llava_siglip,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "internvl": internvl,
    "internvl-norms": lambda: internvl(norms=True),
}


def _images(kind):
    side = CLIP["image_size"]
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def save(name, folder):
    """Save a checkpoint by the name of its maker."""
    from tests.integrations.vllm import qwen  # which builds on this module

    makers = {**MAKERS, "qwen2.5-vl": qwen.qwen2_5_vl, "qwen3-vl": qwen.qwen3_vl}
    return write(*makers[name](), folder)


def write(config, processor, folder):
    """Save a checkpoint with attention that is peaked, so that answers depend on the image."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and (
                "language_model" in parameter_name or "lm_head" in parameter_name
            ):
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def older(folder):
    """Give the tower's weights the names that vLLM 0.32 knows, as older checkpoints have them."""
    path = Path(folder) / "model.safetensors"
    names = {
        name: name.replace("vision_tower.", "vision_tower.vision_model.")
        for name in load_file(path)
    }
    weights = {names[name]: weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def main(name, folder):
    save(name.removesuffix("-older"), folder)
    if name.endswith("-older"):
        older(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
