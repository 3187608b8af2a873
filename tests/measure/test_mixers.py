"""Every kind of decoder layer costs what torch counts, and holds what its cache holds."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Dots3NoteForCausalLM,
    Dots3NoteTextConfig,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.measure import flops
from foveate.measure.checkpoints import checkpoints
from foveate.measure.latents import IndexedAttention
from foveate.measure.mamba import Mamba2
from foveate.measure.memory import cache_bytes
from foveate.measure.mixers import GatedDeltaNet, ShortConvolution
from foveate.measure.selection import acted, decoder_flops
from foveate.measure.shapes import TextShape
from foveate.measure.trace import Shapes, skeleton
from foveate.methods import PyramidDrop
from tests.conformance.zoo.dots3_note import TEXT as DOTS
from tests.measure.test_flops import counted
from tests.records import FakeFamily, pyramid_record

SIZES = {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "pad_token_id": 0,
}  # fmt: skip
HYBRID = {
    **SIZES, "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    },
}  # fmt: skip
GEMMA = {
    **SIZES, "intermediate_size": 80, "num_hidden_layers": 6, "head_dim": 12,
    "global_head_dim": 20, "sliding_window": 9, "vocab_size_per_layer_input": 50,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip
LATENT = {
    **SIZES, "num_key_value_heads": 4, "intermediate_size": 80, "num_hidden_layers": 3,
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10,
}  # fmt: skip
MAMBA = {
    **SIZES, "head_dim": 12, "intermediate_size": 80, "mamba_num_heads": 6, "mamba_head_dim": 16,
    "ssm_state_size": 8, "n_groups": 2, "chunk_size": 32, "n_routed_experts": 5,
    "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
}  # fmt: skip
MODELS = {
    "gated delta net": (
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig(**HYBRID, intermediate_size=80),
    ),
    "gated delta net, shared expert": (
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig(
            **HYBRID, moe_intermediate_size=24, shared_expert_intermediate_size=40,
            num_experts=5, num_experts_per_tok=2,
        ),
    ),
    "short convolution": (
        Lfm2ForCausalLM,
        Lfm2Config(
            **SIZES, intermediate_size=80, block_multiple_of=16, num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"],
        ),
    ),
    "shared keys, inputs of layers": (
        Gemma4ForCausalLM,
        Gemma4TextConfig(
            **GEMMA, num_kv_shared_layers=3, use_double_wide_mlp=True,
            hidden_size_per_layer_input=7,
        ),
    ),
    "keys are values, experts beside an MLP": (
        Gemma4ForCausalLM,
        Gemma4TextConfig(
            **GEMMA, num_global_key_value_heads=1, attention_k_eq_v=True, enable_moe_block=True,
            num_experts=5, top_k_experts=2, moe_intermediate_size=24, hidden_size_per_layer_input=0,
        ),
    ),
    "mamba": (NemotronHForCausalLM, NemotronHConfig(**MAMBA)),
    "mamba, latent experts": (NemotronHForCausalLM, NemotronHConfig(**MAMBA, moe_latent_size=16)),
    "streams of states": (
        Gemma3nForCausalLM,
        Gemma3nTextConfig(
            **{**GEMMA, "intermediate_size": [48, 56, 64, 72, 80, 88]}, num_kv_shared_layers=0,
            hidden_size_per_layer_input=7, altup_num_inputs=3, laurel_rank=5,
        ),
    ),
    "compressed keys": (DeepseekV3ForCausalLM, DeepseekV3Config(**LATENT, q_lora_rank=16)),
    "compressed keys, one query matrix": (
        DeepseekV3ForCausalLM, DeepseekV3Config(**LATENT, q_lora_rank=None),
    ),
    "compressed keys, windows, indexers": (Dots3NoteForCausalLM, Dots3NoteTextConfig(**DOTS)),
}  # fmt: skip


def build(name):
    cls, config = MODELS[name]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the counter misses grouped products
    return model, config


def filled(model, tokens, rows=1):
    with torch.no_grad():
        return model(torch.ones(rows, tokens, dtype=torch.long), use_cache=True).past_key_values


@pytest.mark.parametrize(("rows", "tokens"), [(1, 2), (2, 7), (1, 64), (1, 130)])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_costs_what_torch_counts(name, rows, tokens):
    model, config = build(name)
    ids = torch.ones(rows, tokens, dtype=torch.long)
    got = counted(lambda: model(ids, logits_to_keep=1))
    first = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
    seen = [[tokens] * rows] * first  # layers that share keys are given the last token alone
    seen += [[1] * rows] * (config.num_hidden_layers - first)
    assert flops.prefill_flops(config, seen, causal=False) == got


@pytest.mark.parametrize(
    "name", ["google/gemma-4-E4B-it", "openbmb/MiniCPM-V-4.6", "LiquidAI/LFM2-VL-1.6B"]
)
def test_text_models_of_real_size_cost_what_torch_counts(name):
    """Mixtures of experts are left out: the counter misses grouped products."""
    family = skeleton(find_family(checkpoints()[name].skeleton()))

    def read():
        with Shapes():
            family.text(input_ids=torch.ones(1, 300, dtype=torch.long), use_cache=False)

    seen = [[300]] * family.text_layers  # without an end of the prompt, layers are given all of it
    want = flops.prefill_flops(family.config, seen, causal=False)
    assert counted(read) == want - flops.head_flops(TextShape.of(family.config))


def test_layers_that_share_keys_may_be_given_all_tokens():
    model, config = build("shared keys, inputs of layers")
    ids = torch.ones(1, 30, dtype=torch.long)
    got = counted(lambda: model(ids, logits_to_keep=1, output_hidden_states=True))
    assert flops.prefill_flops(config, [[30]] * 6, causal=False) == got


@pytest.mark.parametrize("past", [3, 70])
@pytest.mark.parametrize("name", MODELS)
def test_a_decoding_step_costs_what_torch_counts(name, past):
    """But for what torch does not count: the products of a step of the gated delta rule and of
    Mamba-2, which are written out; and for convolutions over a token more, which is dropped.
    """
    model, config = build(name)
    cache = filled(model, past)
    got = counted(lambda: model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache))
    shapes = TextShape.all(config)
    for shape in shapes:
        if isinstance(mixer := shape.mixer, GatedDeltaNet):
            got += mixer.value_heads * 6 * mixer.key_dim * mixer.value_dim
            got -= 2 * 4 * (2 * 2 * 8 + 6 * 12)
        elif isinstance(mixer, Mamba2):
            got += 6 * 2 * 16 * 8
            got -= 2 * 4 * (6 * 16 + 2 * 2 * 8)
        elif isinstance(mixer, ShortConvolution):
            got -= 2 * 3 * 48
        elif isinstance(mixer, IndexedAttention):  # torch masks the pairs that are not chosen
            got -= 2 * 4 * (20 + 16) * max(past + 1 - 6, 0)
    slots = [past + 1 if shape.donor is None else 1 for shape in shapes]  # as caches hold them
    assert flops.decode_flops(config, slots) == got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_equal_the_cache(name, tokens, dtype):
    model, config = build(name)
    cache = filled(model.to(dtype), tokens, rows=2)
    slots, state = cache_bytes(cache)
    layers = [tokens] * config.num_hidden_layers
    assert flops.kv_bytes(config, layers, 2, dtype) == slots
    assert flops.state_bytes(config, 2, dtype) == state
    assert (state > 0) == any(kind in name for kind in ("delta", "convolution", "mamba"))


def test_the_rule_counts_pairs_of_a_chunk_once_if_causal():
    mixer = GatedDeltaNet(48, 2, 6, 8, 12, 4)
    pairs = 64 * 65 // 2 + 6 * 7 // 2
    want = 70 * 2 * 4 * (2 * 2 * 8 + 6 * 12) + 6 * (70 * 6 * 8 * 12 + pairs * (4 * 8 + 2 * 12))
    assert mixer.mixing(70) == want
    assert mixer.mixing(70) < mixer.mixing(70, causal=False)


def test_kinds_whose_cost_is_not_known_are_refused():
    config = GraniteMoeHybridConfig(layer_types=["mamba", "attention"], num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="layer 0 of this granitemoehybrid is of kind"):
        TextShape.all(config)


def test_signals_of_compressed_keys_are_not_called_free():
    shapes = TextShape.all(DeepseekV3Config(**{**LATENT, "num_hidden_layers": 4}))
    steps = acted([PyramidDrop()], FakeFamily())
    assert decoder_flops(pyramid_record(), shapes, steps) > 0


def test_text_attention_is_of_a_layer_that_has_attention():
    """And makes a gate beside its query."""
    model, config = build("gated delta net")
    layer = model.model.layers[3].self_attn
    x = torch.rand(1, 13, 48)

    def score():
        keys = layer.k_proj(x).view(13, 2, 16).repeat_interleave(2, 1).permute(1, 2, 0)
        query = layer.q_proj(x[:, -1]).view(4, 2, 16)[:, :1]
        return query @ keys

    assert counted(score) == flops.text_attention_flops(config, 13)
