"""Predicted FLOPs equal the ones torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from foveate.families import find_family
from foveate.measure import flops
from foveate.measure.mixers import visible_keys
from foveate.measure.shapes import TextShape
from foveate.measure.trace import freeze, trace

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
}
TEXT = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=4)),
    "llama-wide-heads": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=20),
    ),
    "qwen2-gqa": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=2)),
}
CLIP = CLIPVisionConfig(
    hidden_size=24,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)


def counted(fn) -> int:
    """FLOPs of all matrix products; needs eager attention: the counter misses the CPU's kernel."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def text_model(name: str):
    cls, config = TEXT[name]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return cls(config).eval(), config


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", TEXT)
def test_prefill_equals_counted(name, rows, tokens):
    model, config = text_model(name)
    ids = torch.ones(rows, tokens, dtype=torch.long)
    got = counted(lambda: model(ids, logits_to_keep=1))
    want = flops.prefill_flops(config, [[tokens] * rows] * 3, causal=False)
    assert got == want


@pytest.mark.parametrize("past", [1, 33])
@pytest.mark.parametrize("name", TEXT)
def test_decode_equals_counted(name, past):
    model, config = text_model(name)
    cache = model(torch.ones(1, past, dtype=torch.long)).past_key_values
    got = counted(lambda: model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache))
    want = flops.decode_flops(config, [past + 1] * 3)
    assert got == want


@pytest.mark.parametrize("layers", [-2, [0, -1]])
def test_vision_and_projector_equal_counted(layers):
    config = LlavaConfig(
        vision_config=CLIP,
        text_config=TEXT["llama"][1],
        vision_feature_layer=layers,
        image_token_index=4,
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config).eval()
    pixels = torch.rand(2, 3, 32, 32)
    got = counted(lambda: model.model.get_image_features(pixels))
    traced = trace(find_family(model), "image", {"pixel_values": pixels})
    assert got == traced.tower + traced.projector
    assert traced.embedding == 2 * 2 * 16 * 3 * 8**2 * 24


def test_causal_pairs_are_the_lower_triangle():
    for tokens, keys in [(1, 1), (5, 5), (4, 9), (1, 8)]:
        mask = torch.ones(tokens, keys).tril(keys - tokens)
        assert visible_keys(tokens, keys) == int(mask.sum())
        assert visible_keys(tokens, keys, causal=False) == tokens * keys


def test_prefill_follows_the_layers():
    """Fewer tokens in one layer save exactly that layer's difference."""
    config = TEXT["qwen2-gqa"][1]
    shape = TextShape.of(config)
    full = flops.prefill_flops(config, [[20], [20], [20]])
    less = flops.prefill_flops(config, [[20], [20], [11]])
    assert full - less == flops.layer_flops(shape, 20) - flops.layer_flops(shape, 11)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kv_bytes_equal_the_cache(name, dtype):
    model, config = text_model(name)
    cache = model.to(dtype)(torch.ones(2, 9, dtype=torch.long)).past_key_values
    real = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert flops.kv_bytes(config, [9, 9, 9], batch=2, dtype=dtype) == real


@pytest.mark.parametrize("tokens", [4, 5, 6, 9])
def test_kv_bytes_of_windows_equal_the_cache(tokens):
    """A layer with a window of five keeps four slots; without layer types all layers have it."""
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(torch.ones(2, tokens, dtype=torch.long)).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert flops.kv_bytes(config, [tokens] * 3, batch=2, dtype=torch.float32) == real
    assert [layer.keys.shape[2] for layer in cache.layers] == [min(tokens, 4)] * 3


def test_text_attention_is_key_projection_plus_one_query():
    config = TEXT["qwen2-gqa"][1]
    model, _ = text_model("qwen2-gqa")
    attention = model.model.layers[0].self_attn
    x = torch.rand(1, 13, 48)

    def score():
        keys = attention.k_proj(x).view(13, 2, 12).repeat_interleave(2, 1).permute(1, 2, 0)
        query = attention.q_proj(x[:, -1]).view(4, 1, 12)
        return query @ keys

    assert counted(score) == flops.text_attention_flops(config, 13)


def test_windows_hide_what_lies_before_them():
    for tokens, keys, window in [(7, 7, 3), (5, 9, 4), (4, 4, 9), (1, 8, 3)]:
        mask = torch.ones(tokens, keys).tril(keys - tokens).triu(keys - tokens - window + 1)
        assert visible_keys(tokens, keys, window=window) == int(mask.sum())


def test_places_of_patches_count_however_many_there_are():
    """Only masks of pixels, which no count depends on, are told by their shape."""
    places = torch.arange(-1, 5039).view(1, 2520, 2)
    assert freeze({"places": places}) != freeze({"places": places + 1})
    mask = torch.ones(1, 72, 72, dtype=torch.long)
    assert freeze({"mask": mask}) == freeze({"mask": mask.tril()})


def test_chunks_hide_what_lies_before_them():
    for tokens, keys, chunk in [(7, 7, 3), (5, 9, 4), (4, 4, 9), (1, 8, 3), (1, 9, 3)]:
        of = torch.arange(keys) // chunk
        mask = (of == of[-tokens:, None]).tril(keys - tokens)
        assert visible_keys(tokens, keys, chunk=chunk) == int(mask.sum())
