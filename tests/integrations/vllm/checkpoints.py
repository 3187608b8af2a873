"""Tiny random checkpoints that vLLM and transformers both load, with processors made by hand."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
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


def tokenizer(special=()):
    """A tokenizer of words, `w0` to `w95`."""
    words = ["user", "assistant", *(f"w{i}" for i in range(WORDS - 2))]
    names = [*SPECIAL, *special]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words, *special])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=[n for n in names if n not in SPECIAL[:4]],
        chat_template=TEMPLATE,
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


MAKERS = {"llava": llava}


def _images(kind):
    side = CLIP["image_size"]
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def save(name, folder):
    """Save a checkpoint with attention that is peaked, so that answers depend on the image."""
    config, processor = MAKERS[name]()
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


def image(seed, size=(80, 64)):
    """A random image that is smooth enough for patches to differ a lot."""
    generator = np.random.default_rng(seed)
    width, height = size
    coarse = generator.integers(0, 200, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    noise = generator.integers(0, 55, (height, width, 3))
    return Image.fromarray((coarse + noise).astype(np.uint8))
