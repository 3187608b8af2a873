"""Decoding steps that choose what they attend to, in every way of generating."""

import pytest
import torch

import foveate
from foveate.errors import InputError, LayerError
from foveate.methods import FastV
from tests import oracle
from tests.engine.test_oracle import BATCHES, TOLERANCE, drops, features_of
from tests.methods_for_tests import EveryThird, Glance
from tests.tinies import prompts, row_of, tiny_llava

STEPS = 6
GENERATE = {
    "max_new_tokens": STEPS + 1,
    "min_new_tokens": STEPS + 1,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
METHODS = {
    "alone": (Glance(), lambda n: {}),
    "at-1": (Glance(layer=1), lambda n: {}),
    "after-removal": (
        [EveryThird(keep=12), Glance()],
        lambda n: {"kept": [torch.arange(0, 36, 3)] * n},
    ),
    "after-renumbering": (
        [EveryThird(keep=12, positions="renumbered"), Glance()],
        lambda n: {"kept": [torch.arange(0, 36, 3)] * n, "renumber": True},
    ),
    "before-removal": (
        [Glance(layer=2), FastV(layer=4, keep=0.5)],
        lambda n: {"drops": drops((18,), (4,), (3,), n, False)},
    ),
}


def check(model, name, rows, **options):
    method, fields = METHODS[name]
    inputs = prompts(rows)
    with foveate.use(model, method):
        out = model.generate(**inputs, **GENERATE, **options)
    glance = next(m.layer for m in (method if isinstance(method, list) else [method])[::-1]
                  if isinstance(m, Glance))  # fmt: skip
    bite = 0.0
    for row, pieces in enumerate(rows):
        alone = row_of(inputs, row)
        features, prompt = features_of(model, alone), alone["input_ids"].shape[1]
        ids = torch.cat((alone["input_ids"][0], out.sequences[row, inputs["input_ids"].shape[1] :]))
        fields_of_row = fields(len(pieces) - 1)
        spec = oracle.Spec(**fields_of_row, glance=glance)
        want, _ = oracle.run(model, ids, features, spec, prompt)
        steps = torch.stack(out.logits, dim=1)[row]
        assert (want[prompt - 1 : -1] - steps).abs().max() <= TOLERANCE
        if features:
            plain, _ = oracle.run(model, ids, features, oracle.Spec(**fields_of_row), prompt)
            bite = max(bite, (plain[prompt:-1] - steps[1:]).abs().max().item())
    assert bite > 0.05, "the test does not bite"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", METHODS)
def test_generation_equals_the_oracle(any_llava, name, rows, cache):
    check(any_llava, name, rows, cache_implementation=cache)


@pytest.mark.parametrize("name", ["alone", "after-removal"])
def test_other_kernels_agree(flash_emulated, name):
    for attention in ("eager", flash_emulated):
        check(tiny_llava("llama-gqa", attention), name, BATCHES["ragged"])


@pytest.mark.parametrize("name", ["alone", "after-removal"])
def test_beams_carry_what_they_saw(any_llava, name):
    """The score of the best beam is that of its tokens, each choosing after the one before it."""
    method, fields = METHODS[name]
    inputs = prompts([[5, 7], [2, 9]])
    with foveate.use(any_llava, method):
        out = any_llava.generate(
            **inputs, num_beams=4, max_new_tokens=8, min_new_tokens=8, do_sample=False,
            length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    assert out.beam_indices.diff(dim=1).any(), "no beam changed its place"
    for row in range(2):
        alone = row_of(inputs, row)
        prompt = alone["input_ids"].shape[1]
        ids = torch.cat((alone["input_ids"][0], out.sequences[row, inputs["input_ids"].shape[1] :]))
        spec = oracle.Spec(**fields(1), glance=3)
        want, _ = oracle.run(any_llava, ids, features_of(any_llava, alone), spec, prompt)
        shares = want[prompt - 1 : -1].log_softmax(-1)
        score = shares.gather(1, ids[prompt:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row], score, rtol=0, atol=1e-3)


def test_every_token_stays_in_the_cache(llava):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, Glance()):
        cache = llava.generate(**inputs, **GENERATE).past_key_values
    assert {layer.keys.shape[2] for layer in cache.layers} == {5 + 36 + 7 + STEPS}


def test_more_text_after_a_prompt_sees_everything(llava):
    """A later turn is no decoding step; what follows it is one again."""
    inputs, more = prompts([[5, 7]]), torch.tensor([[9, 8, 7]])
    with foveate.use(llava, Glance()):
        cache = llava(**inputs, use_cache=True).past_key_values
        got = llava(input_ids=more, past_key_values=cache).logits
        step = llava(input_ids=torch.tensor([[6]]), past_key_values=cache).logits
    cache = llava(**inputs, use_cache=True).past_key_values
    want = llava(input_ids=more, past_key_values=cache).logits
    plain = llava(input_ids=torch.tensor([[6]]), past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    assert (step - plain).abs().max() > 0.01


def test_a_new_image_is_watched_too(llava):
    """Behind a second turn with an image, tokens of both are chosen from."""
    first, second = prompts([[5, 7]]), prompts([[3, 4]], seed=1)
    both = torch.cat((first["input_ids"], second["input_ids"]), 1)
    pixels = torch.cat((first["pixel_values"], second["pixel_values"]))
    token = torch.tensor([[6]])
    with foveate.use(llava, Glance()):
        cache = llava(**first, use_cache=True).past_key_values
        llava(input_ids=token, past_key_values=cache)  # a choice that must be forgotten
        cache = llava(**first, use_cache=True).past_key_values
        second.pop("attention_mask")
        llava(**second, past_key_values=cache)
        assert cache.layers[3].attached["candidates"].columns.shape == (1, 72)
        got = llava(input_ids=token, past_key_values=cache).logits[0, -1]
    ids = torch.cat((both[0], token[0]))
    features = features_of(llava, {"pixel_values": pixels})
    want, _ = oracle.run(llava, ids, features, oracle.Spec(glance=3), both.shape[1])
    torch.testing.assert_close(got, want[-1], rtol=0, atol=TOLERANCE)


def test_what_cannot_choose_is_refused(llava):
    inputs = prompts([[5, 7]])
    inputs["input_ids"][:, -6:] = torch.tensor([9, 8, 7, 9, 8, 7])  # something to look up
    with foveate.use(llava, Glance()):
        for options in ({"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(InputError, match="one token a step and a cache"):
                llava.generate(**inputs, **options, max_new_tokens=4, do_sample=False)
    for method in (Glance(layer=0), Glance(layer=99), [Glance(), Glance(layer=4)]):
        with pytest.raises(LayerError):
            foveate.use(llava, method)
