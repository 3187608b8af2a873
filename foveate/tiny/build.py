"""The tiny VLM's parts: configuration, tokenizer, processor, and initial weights.

Everything is a plain class of transformers, so what comes out is an ordinary LLaVA.
"""

from math import log
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from foveate.tiny.words import NUMBERS, SPECIALS, VOCABULARY

SIZE, PATCH = 128, 8
MEAN, STD = 0.35, 0.25
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIALS))
EARLY = 2
"""Layers at the bottom of the language model that are trained late, and not to look at images."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ ' <image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Images of a turn first, then its text; an assistant's turn ends with `<eos>`."""


def build_tokenizer(vocabulary: tuple[str, ...] = VOCABULARY) -> PreTrainedTokenizerFast:
    """Build the word tokenizer: lower case, "?" apart, other punctuation ignored.

    Args:
        vocabulary: every token, the special ones first; a position is a token id.

    Returns:
        A tokenizer that pads on the left. Unknown words become `<unk>`.
    """
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    words.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[.,;:!\"()]+"), " "),
            normalizers.Replace(Regex(r"\bcolour\b"), "color"),
        ]
    )
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", BOS)]
    )
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(vocabulary: tuple[str, ...] = VOCABULARY) -> LlavaProcessor:
    """Build the processor; images of any size and mode are resized to 128 x 128 RGB."""
    edge = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        do_center_crop=False,
        size=edge,
        crop_size=edge,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        resample=2,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(vocabulary),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_config(
    layers: int = 12,
    hidden: int = 160,
    vision: int = 128,
    words: int = len(VOCABULARY),
    tower: int = 6,
) -> LlavaConfig:
    """Describe the model.

    Args:
        layers: layers of the language model.
        hidden: its width, a multiple of 8.
        vision: width of the vision tower, a multiple of 16.
        words: size of the vocabulary.
        tower: layers of the vision tower.

    Returns:
        A LLaVA configuration: 256 visual tokens per image, taken from the vision tower's last
        layer but one without its class token.
    """
    return LlavaConfig(
        vision_config=_vision_config(vision, tower),
        text_config=_text_config(layers, hidden, words),
        image_token_index=IMAGE,
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def _vision_config(width: int, layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=width,
        hidden_act="gelu_pytorch_tanh",
    )


def _text_config(layers: int, width: int, words: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width + width // 2 + width // 5,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )


def build_model(
    config: LlavaConfig | None = None, *, idle: int = EARLY
) -> LlavaForConditionalGeneration:
    """Create an untrained model with the initial weights that the training relies on.

    Args:
        config: what to build; `build_config()` when left out.
        idle: how many layers at the bottom of the language model do nothing until they are trained.

    Returns:
        The model in fp32, in training mode. Seed torch first for a reproducible one.
    """
    model: Any = LlavaForConditionalGeneration(config or build_config())
    _init_words(model.get_input_embeddings().weight)
    _init_positions(model.model.vision_tower.embeddings.position_embedding.weight)
    for layer in model.model.language_model.layers:
        _init_mimetic(layer.self_attn)
    for layer in model.model.language_model.layers[:idle]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    model.generation_config = GenerationConfig(
        max_new_tokens=4, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, do_sample=False
    )
    return model.train()


@torch.no_grad()
def _init_words(weight: Tensor) -> None:
    """Random words; a two-digit number starts as a sum of a tens and a units vector."""
    weight.normal_(std=0.05)
    tens, units = torch.randn(2, 10, weight.shape[1]).mul(0.035)
    for number in NUMBERS:
        row = VOCABULARY.index(number)
        weight[row].mul_(0.3).add_(tens[int(number[0])] + units[int(number[1])])


@torch.no_grad()
def _init_positions(weight: Tensor) -> None:
    """Sines and cosines of row and column, strong enough for the place to survive the tower."""
    side, quarter = int((len(weight) - 1) ** 0.5), weight.shape[1] // 4
    rates = torch.exp(-log(4.0 * side) * torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    weight[1:] = 0.2 * torch.cat([rows, columns], 1)


@torch.no_grad()
def _init_mimetic(attention: Any) -> None:
    """Attend to similar tokens and copy them: Wk = 1.5 Wq, Wo = Wv^T, all orthogonal."""
    nn.init.orthogonal_(attention.q_proj.weight)
    nn.init.orthogonal_(attention.v_proj.weight)
    attention.k_proj.weight.copy_(1.5 * attention.q_proj.weight)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T)
