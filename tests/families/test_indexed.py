"""Layers that attend to what an indexer chooses: what they can rank, hold and rotate."""

import pytest
import torch

import foveate
from foveate.errors import LayerError
from foveate.families import find_family
from foveate.methods import FastV
from tests.conformance.test_families import model_of
from tests.conformance.test_full_size import family_of, why_not
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird, Forgetful, readers_methods

WORK = {
    "cdpruner", "dart", "divprune", "downsample", "evs", "fastvid", "fopru", "hiprune", "holitom",
    "holov", "idpruner", "m3", "ordered-queries", "pixelprune", "prunesid", "random", "scope",
    "todre", "tokenflex", "tome", "uniform", "vflowopt", "vidcom2", "visionselector", "visionzip",
    "vispruner",
}  # fmt: skip
REASONS = ("rank", "class token", "encoder", "choose for", "whole sequence", "not made like")


@pytest.mark.parametrize("method", readers_methods())
def test_methods_plan_on_the_published_layers_or_say_why_not(method):
    reason = why_not(family_of("dots3_note"), method)
    assert (reason is None) == (method in WORK)
    assert reason is None or any(part in reason for part in REASONS)
    assert reason is None or "give layers" not in reason  # which would be refused too


def test_no_published_layer_sees_the_whole_sequence():
    family = family_of("dots3_note")
    assert set(family.layer_kinds) == {"indexed_attention", "sliding_attention"}
    assert family.text_layers == len(family.keyed_layers) == 46
    assert family.attention_layers == ()
    model = model_of("dots3_note")
    with pytest.raises(LayerError, match=r"sees only what an indexer chooses .* of 1, 4"):
        foveate.use(model, FastV(layer=4))
    with pytest.raises(LayerError, match="layer 2, which sees only a window of the sequence"):
        foveate.use(model, FastV(layer=3))


@torch.no_grad()
def test_keys_of_the_indexer_are_shortened_with_the_slots():
    """Where tokens were removed, and where a layer forgets them."""
    model, inputs = model_of("dots3_note"), MEMBERS["dots3_note"]().inputs([[5, 7], [4]])
    for method in (EveryThird(4), Forgetful(4, 4)):
        with foveate.use(model, method):
            cache = model(**fresh(inputs), use_cache=True).past_key_values
            cache.reorder_cache(torch.tensor([1, 0]))
        for number in (0, 3):
            layer = cache.layers[number]
            assert layer.keys.shape[2] == layer.indexer_keys.shape[1] == 5 + 4 + 7
            assert layer.get_seq_length() == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_an_error_leaves_the_keys_of_the_indexer_alone():
    model, inputs = model_of("dots3_note"), MEMBERS["dots3_note"]().inputs([[5, 7]])
    with foveate.use(model, EveryThird(4)):
        cache = model(**fresh(inputs), use_cache=True).past_key_values
        before = cache.layers[0].indexer_keys.clone()
        more = torch.tensor([[7, 8]])
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long)
        broken = model.model.language_model.layers[5].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=more, attention_mask=mask, past_key_values=cache)
        broken.remove()
        assert torch.equal(cache.layers[0].indexer_keys, before)
        assert cache.layers[0].keys.shape[2] == len(before[0])
        model(input_ids=more, attention_mask=mask, past_key_values=cache)


def test_layers_with_an_indexer_rotate_in_32_bits():
    family, positions = find_family(model_of("dots3_note")), torch.arange(3)[None]
    hidden = torch.zeros(1, 3, 64, dtype=torch.bfloat16)
    kinds = [family.rotary(hidden, positions, layer)[0].dtype for layer in range(3)]
    assert kinds == [torch.float32, torch.bfloat16, torch.bfloat16]
