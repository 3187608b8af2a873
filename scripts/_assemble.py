"""SmolLM2 from its GGUF file, and a LLaVA of it and a CLIP tower.

The projector between the two is new: `recipes.real_vlm` trains it. Prompts are ChatML without a
system turn, the images of a turn before its text.
"""

from __future__ import annotations

import sys
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModelWithProjection,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.append(str(Path(__file__).resolve().parents[1]))
from recipes.real_adapter import merge

IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def language(file: Path, gguf: Path | None = None) -> tuple[LlamaForCausalLM, Any]:
    """The language model of a GGUF file in float32, and its tokenizer.

    Args:
        file: of a Llama.
        gguf: a folder that the package gguf was installed to, where it is not in the environment.
    """
    if gguf is not None:
        sys.path.append(str(gguf))
        invalidate_caches()
    try:
        import gguf as _  # noqa: F401
    except ImportError:
        raise SystemExit(
            "reading the language model needs gguf; run `pip install --no-deps --target FOLDER "
            "gguf` and name the folder with --gguf"
        ) from None
    read = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).eval()  # the one read cannot be saved
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def assemble(
    tower: CLIPVisionModelWithProjection, text: LlamaForCausalLM, tokenizer: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of both parts, and its processor.

    The projector is random, and about as loud as the words; torch's seed decides it. `tokenizer`
    and `text` gain one token, `<image>`.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(IMAGE, special=True)]})
    tokenizer.padding_side, tokenizer.model_max_length = "left", 8192
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = tower.config
    config = LlavaConfig(
        vision_config=vision, text_config=text.config, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu",
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config).eval()
    _copy(tower, model.model.vision_tower)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    nn.init.normal_(
        model.model.multi_modal_projector.linear_2.weight,
        std=float(text.get_input_embeddings().weight.detach().std()) / text.config.hidden_size**0.5,
    )
    ends = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=8, **{f"{name}_token_id": i for name, i in ends.items()}
    )
    return model, processor(vision, tokenizer)


def _copy(tower: CLIPVisionModelWithProjection, into: nn.Module) -> None:
    """The tower's weights into a `CLIPVisionModel`, whatever transformers calls its inside."""
    weights = {
        name.removeprefix("vision_model."): value
        for name, value in tower.state_dict().items()
        if name.startswith("vision_model.")
    }
    inside = getattr(into, "vision_model", into)
    assert isinstance(inside, nn.Module)
    inside.load_state_dict(weights)


def processor(vision: Any, tokenizer: Any) -> LlavaProcessor:
    """CLIP's image processor at the tower's size, and the tokenizer."""
    edge = {"height": vision.image_size, "width": vision.image_size}
    images = CLIPImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=edge)
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=vision.patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=IMAGE, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def write(tower: Path, text: Path, out: Path, adapter: Path | None = None, seed: int = 0) -> int:
    """Assemble the parts of two folders in a third, with what training changed if it is given.

    Returns:
        The number of parameters.
    """
    torch.manual_seed(seed)
    model, both = assemble(
        CLIPVisionModelWithProjection.from_pretrained(tower),
        LlamaForCausalLM.from_pretrained(text),
        AutoTokenizer.from_pretrained(text),
    )
    if adapter is not None:
        merge(model, adapter)
    model.save_pretrained(out)
    both.save_pretrained(out)
    return model.num_parameters()
