"""Somebody may hand each decoder layer a mask of its own, as hooks that move tensors do.

Such a mask is gone once its layer has run, unless we hold it; another mask may then get its `id`.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

import foveate
from tests.methods_for_tests import EveryThird, Glance
from tests.tinies import prompts, tiny_llava

WINDOW = 30  # more than a cache holds after a cut, less than the prompt is long
ROWS = [[5, 7], [2, 9]]


@pytest.fixture
def model():
    """Every other decoder layer sees a window, so that layers have two masks."""
    model = tiny_llava("qwen2")
    text = model.model.language_model
    text.config.layer_types = ["full_attention", "sliding_attention"] * 3
    text.config.sliding_window = WINDOW
    text.has_sliding_layers = True
    for layer, kind in zip(text.layers, text.config.layer_types, strict=True):
        layer.attention_type = kind
        layer.self_attn.sliding_window = WINDOW if kind == "sliding_attention" else None
    return model


@contextmanager
def renewed_masks(model):
    """Hand each layer a copy of its mask, with the `id` of one that is gone if it can be had."""
    text, used = model.model.language_model, set()

    def renew(module, args, kwargs):
        spare = []
        for _ in range(500):
            mask = kwargs["attention_mask"].clone()
            if id(mask) in used:
                break
            spare.append(mask)
        used.add(id(mask))
        return args, {**kwargs, "attention_mask": mask}

    hooks = [layer.register_forward_pre_hook(renew, with_kwargs=True) for layer in text.layers]
    yield
    for hook in hooks:
        hook.remove()


def prefill(model, around):
    with around():
        return model(**prompts(ROWS)).logits


def go_on(model, around, tokens, steps):
    """Logits of forwards over a cache that the prompt has filled."""
    inputs = prompts(ROWS)
    mask, cache = inputs["attention_mask"], model(**inputs, use_cache=True).past_key_values
    said = []
    for step in range(steps):
        more = torch.tensor([[7, 8, 9], [9, 6, 5]])[:, :tokens] + step
        mask = torch.cat((mask, torch.ones_like(more)), 1)
        with around():
            out = model(input_ids=more, attention_mask=mask, past_key_values=cache)
        said.append(out.logits)
    return torch.cat(said, 1)


CASES = {
    "forward": (EveryThird(keep=12), prefill),
    "forward-renumbered": (EveryThird(keep=12, positions="renumbered"), prefill),
    "cached": (EveryThird(keep=12), partial(go_on, tokens=3, steps=1)),
    "cached-steps": (EveryThird(keep=12), partial(go_on, tokens=1, steps=3)),
    "decode-choice": (Glance(layer=1), partial(go_on, tokens=1, steps=3)),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_masks_of_single_layers_are_told_apart(model, name):
    method, play = CASES[name]
    with foveate.use(model, method):
        want = play(model, nullcontext)
        got = play(model, partial(renewed_masks, model))
    assert torch.equal(got, want)
