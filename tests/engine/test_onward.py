"""Decoding after a pruned cache: what each layer is told, against positions counted by hand."""

import gc
import types
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import foveate
from foveate.methods import PyramidDrop
from tests.engine.test_oracle import TOLERANCE
from tests.tinies import prompts, row_of, tiny_llava

SCALED = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    # Of both the frequencies depend on the largest position, which differs between layers.
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7],
        "original_max_position_embeddings": 30,
    },
}  # fmt: skip
METHOD = PyramidDrop(layers=(2, 4), keep=(0.5, 0.2), positions="renumbered")


def model_with(rope):
    """A LLaVA whose text model was trained for 40 positions, which prompts exceed before cuts."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = tiny_llava()
    text = model.model.language_model
    text.config.rope_parameters = dict(SCALED[rope])
    text.config.max_position_embeddings = 40
    text.rotary_emb = LlamaRotaryEmbedding(text.config)
    return model


def step(model, cache, token=7):
    """What every layer's attention is handed in a decoding step."""
    told, hooks = [], []
    for layer in model.model.language_model.layers:
        hooks.append(
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: told.append(kwargs), with_kwargs=True
            )
        )
    model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return told


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("rope", SCALED)
@torch.no_grad()
def test_renumbered_layers_rotate_by_the_slots_they_hold(rope, static):
    model, inputs = model_with(rope), prompts([(3, 6)])
    cache = DynamicCache(config=model.config.text_config)
    if static:
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with foveate.use(model, METHOD) as run:
        model(**inputs, past_key_values=cache)
        held = run.record.cache_slots
        for later in range(3):
            for number, kwargs in enumerate(step(model, cache)):
                place = torch.tensor([[held[number] + later]])
                fresh = type(model.model.language_model.rotary_emb)(model.config.text_config)
                want = fresh(torch.zeros(1), place)
                for got, part in zip(kwargs["position_embeddings"], want, strict=True):
                    torch.testing.assert_close(got, part, rtol=0, atol=1e-6)
    assert len(set(held)) == 3


@torch.no_grad()
def test_rows_of_unlike_length_decode_as_they_do_alone(llava):
    """Renumbering shifts each row by what that row has lost; padding is never seen."""
    inputs = prompts([(3, 6), (2, 9, 4)])
    with foveate.use(llava, METHOD):
        cache = DynamicCache(config=llava.config.text_config)
        llava(**inputs, past_key_values=cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        got = llava(
            input_ids=torch.tensor([[7], [9]]), attention_mask=mask, past_key_values=cache
        ).logits
        for row, token in enumerate((7, 9)):
            alone = DynamicCache(config=llava.config.text_config)
            llava(**row_of(inputs, row), past_key_values=alone)
            want = llava(input_ids=torch.tensor([[token]]), past_key_values=alone).logits
            torch.testing.assert_close(got[row], want[0], rtol=0, atol=TOLERANCE)


def test_layers_below_the_first_cut_are_told_nothing(llava):
    cache = DynamicCache(config=llava.config.text_config)
    with torch.no_grad(), foveate.use(llava, METHOD):
        llava(**prompts([(3, 6)]), past_key_values=cache)
        told = step(llava, cache)
    assert all(kwargs["position_ids"] is not None for kwargs in told[:2])
    assert all(kwargs["position_ids"] is None for kwargs in told[2:])


def test_a_cache_is_freed_with_its_last_reference(llava):
    """Slots that layers share must not hold on to the forward that made them."""
    cache = DynamicCache(config=llava.config.text_config)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), foveate.use(llava, METHOD):
            llava(**prompts([(3, 6)]), past_key_values=cache)
            llava(input_ids=torch.tensor([[7]]), past_key_values=cache)
            keys = weakref.ref(cache.layers[3].keys)
            cache = None
            assert keys() is None
    finally:
        gc.enable()


def test_a_layer_whose_class_changes_later_runs_the_new_forward():
    """As under FSDP2, which shards layers after methods are attached."""
    model, inputs, ran = tiny_llava(), prompts([(3, 6)]), []
    layer = model.model.language_model.layers[3]
    with torch.no_grad(), foveate.use(model, METHOD):
        want = model(**inputs).logits
        plain = type(layer)

        def forward(self, *args, **kwargs):
            ran.append(self)
            return plain.forward(self, *args, **kwargs)

        layer.__class__ = types.new_class(
            "Sharded", (plain,), {}, lambda body: body.update(forward=forward)
        )
        assert torch.equal(model(**inputs).logits, want)
    assert ran == [layer]
    assert "forward" not in vars(layer)


def test_a_decoding_step_makes_its_rotary_embeddings_once(llava, monkeypatch):
    kind, made = type(llava.model.language_model.rotary_emb), []
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kw: made.append(1) or plain(*args, **kw))
    cache = DynamicCache(config=llava.config.text_config)
    with torch.no_grad(), foveate.use(llava, METHOD):
        llava(**prompts([(3, 6)]), past_key_values=cache)
        made.clear()
        llava(input_ids=torch.tensor([[7]]), past_key_values=cache)
    assert len(made) == 1
