"""A packed forward pass for training: one image, many questions, one sequence.

All questions share the image's keys and values, and none sees another. The modules and weights
are those of the transformers model; only the order of the work differs, and in fp32 the results
agree with the model's own forward pass.

Shapes: `B` images, `T` tokens, `V` visual tokens, `P` = 1 + `V` prefix tokens (`<bos>` first),
`S` slots of `C` text tokens each, `D` hidden, `H` heads.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from foveate.tiny.build import BOS, EARLY


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, H, T, D / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def see(vision: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Run the vision tower.

    Args:
        vision: a `CLIPVisionModel`.
        pixels: (B, 3, height, width) normalised pixels.

    Returns:
        Hidden states after the last layer but one, (B, 1 + V, D), and the normalised class token
        after the last layer, (B, D).
    """
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    before = x
    for layer in vision.encoder.layers:
        before = x
        attention = layer.self_attn
        h = layer.layer_norm1(x)
        q, k, v = (
            _split(project(h), attention.num_heads)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (q * attention.scale @ k.mT).softmax(-1).to(v.dtype)
        x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    return before, vision.post_layernorm(x[:, 0])


def project(model: LlavaForConditionalGeneration, states: Tensor) -> Tensor:
    """Turn vision states (B, 1 + V, D) into visual tokens (B, V, D) of the language model."""
    return model.model.multi_modal_projector(states[:, 1:])


def read(
    model: LlavaForConditionalGeneration,
    visual: Tensor,
    positions: Tensor,
    words: Tensor,
    start: int,
    skip: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run the language model over `<bos>`, the visual tokens, and S slots of text.

    Args:
        model: the tiny VLM.
        visual: (B, V, D) projected visual tokens.
        positions: (B, V) their positions, counted from 1 (`<bos>` is 0).
        words: (B, S, C) token ids; every slot is causal and sees the image but no other slot.
        start: position of the first token of every slot.
        skip: layers to leave out at the bottom.

    Returns:
        (B, S * C, vocabulary) logits, and the mean share of attention that text tokens pay to
        visual tokens in the first `EARLY` layers.
    """
    text: Any = model.model.language_model
    slots, length = words.shape[1:]
    bos = text.embed_tokens(words.new_full((len(words), 1), BOS))
    x = torch.cat([bos, visual.to(bos.dtype), text.embed_tokens(words.flatten(1))], 1)
    prefix = 1 + visual.shape[1]
    place = torch.arange(start, start + length).repeat(slots).expand(len(words), -1)
    place = torch.cat([torch.zeros_like(positions[:, :1]), positions, place], 1)
    rotary = text.rotary_emb(x, place)
    looks = [x.new_zeros(())]
    for index, layer in enumerate(text.layers[skip:-1], skip):
        h = layer.input_layernorm(x)
        change, look = _attend(layer.self_attn, h, rotary, prefix, length, prefix_too=True)
        x = x + change
        if index < EARLY:
            looks.append(look / EARLY)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    last = text.layers[-1]
    h = last.input_layernorm(x)
    change, _ = _attend(last.self_attn, h, rotary, prefix, length, prefix_too=False)
    x = x[:, prefix:] + change
    x = x + last.mlp(last.post_attention_layernorm(x))
    return model.lm_head(text.norm(x)), torch.stack(looks).sum()


def _causal(scores: Tensor) -> Tensor:
    size = scores.shape[-1]
    return scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf)


def _attend(
    attention: Any,
    h: Tensor,
    rotary: tuple[Tensor, Tensor],
    prefix: int,
    length: int,
    prefix_too: bool,
) -> tuple[Tensor, Tensor]:
    """Attention without any question-to-question block; also the share paid to visual tokens."""
    heads = attention.config.num_attention_heads
    q = _split(attention.q_proj(h), heads)
    k = _split(attention.k_proj(h), heads)
    v = _split(attention.v_proj(h), heads)
    cos, sin = (part.to(q.dtype) for part in rotary)
    q, k = apply_rotary_pos_emb(q * attention.scaling, k, cos, sin)
    seen_k, seen_v = k[:, :, :prefix], v[:, :, :prefix]
    own = [part[:, :, prefix:].unflatten(2, (-1, length)) for part in (q, k, v)]
    to_image = (q[:, :, prefix:] @ seen_k.mT).unflatten(2, (-1, length))
    to_own = _causal(own[0] @ own[1].mT)
    weights = torch.cat([to_image, to_own], -1).softmax(-1).to(v.dtype)
    out = (weights[..., prefix:] @ own[2]).flatten(2, 3)
    out = out + weights[..., :prefix].flatten(2, 3) @ seen_v
    if prefix_too:
        before = _causal(q[:, :, :prefix] @ seen_k.mT).softmax(-1).to(v.dtype) @ seen_v
        out = torch.cat([before, out], 2)
    look = weights[..., 1:prefix].float().sum(-1).mean()
    return attention.o_proj(out.transpose(1, 2).flatten(2)), look
