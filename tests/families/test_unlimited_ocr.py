"""Unlimited-OCR beyond its window: layers see the first prompt and the last tokens after it."""

import functools
from contextlib import contextmanager

import pytest
import torch

import foveate
from foveate.errors import CacheError
from foveate.methods import PyramidDrop
from tests.conformance import oracle
from tests.conformance.test_families import BATCHES
from tests.conformance.tolerance import TOLERANCE, states_of
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.unlimited_ocr import UnlimitedOCR
from tests.methods_for_tests import EveryThird, Forgetful
from tests.oracle import Drop, Spec

WINDOW, STEPS = 4, 9
THIRD = torch.arange(0, 16, 3)
KINDS = {
    "pre_llm": lambda n: (EveryThird(6), Spec(kept=[THIRD] * n)),
    "pre_llm-renumbered": lambda n: (
        EveryThird(6, "renumbered"), Spec(kept=[THIRD] * n, renumber=True),
    ),
    "llm": lambda n: (PyramidDrop((2,), 4, "original"), Spec(drops=[Drop(2, 2, [4] * n)])),
    "llm-renumbered": lambda n: (
        PyramidDrop((1,), 4, "renumbered"), Spec(drops=[Drop(1, 1, [4] * n, True)]),
    ),
    "forgetful": lambda n: (
        Forgetful(2, 4), Spec(drops=[Drop(2, 2, [4] * n)], evict_cache=2),
    ),
}  # fmt: skip


class Narrow(UnlimitedOCR):
    window = WINDOW


@functools.cache
def model_of(attention="sdpa"):
    return Narrow().build(attention)


@contextmanager
def windowed(model, prompt):
    """While open, layers see of what follows the prompt a window alone, without a cache too."""

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"]
        order = torch.arange(mask.shape[-1])
        hidden = (order >= prompt) & (order[:, None] - order >= WINDOW)
        return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo().min)}

    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expected(whole, spec, prompt):
    """States of a row by the oracle, with the window and without."""
    member, model = Narrow(), model_of("eager")
    with windowed(model, prompt):
        want, _ = oracle.run(member, model, fresh(whole), spec, prompt)
    return want, oracle.run(member, model, fresh(whole), spec, prompt)[0]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_beyond_the_window_equals_the_oracle(kind, batch):
    """Also of padded rows, which the bare model lets see their padding once the window moves."""
    member, model, rows = Narrow(), model_of(), BATCHES[batch]
    inputs = member.inputs(rows)
    with foveate.use(model, KINDS[kind](1)[0]):
        states, out = states_of(member, model, inputs, STEPS)
    for row, pieces in enumerate(rows):
        alone = member.row(inputs, row)
        prompt = alone["input_ids"].shape[1]
        whole = member.continued(alone, out[row : row + 1, inputs["input_ids"].shape[1] : -1])
        want, unbound = expected(whole, KINDS[kind](len(pieces) - 1)[1], prompt)
        distance = (want[prompt - 1 :] - states[row]).abs().max().item()
        print(f"{kind} {batch}: distance to the oracle {distance:.1e}")
        assert distance <= TOLERANCE
        assert (unbound[-1] - states[row, -1]).abs().max() > 0.02, "the window does not bite"


@pytest.mark.parametrize("kind", ["pre_llm", "llm", "forgetful"])
def test_a_second_turn_of_text_sees_the_first_prompt_and_a_window(kind):
    """Several tokens at once, each with a window of its own."""
    member, model = Narrow(), model_of()
    first, question = member.inputs([[5, 7]]), torch.tensor([[11, 12, 13, 14, 15, 16, 17]])
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    method, spec = KINDS[kind](1)
    states = []
    with torch.no_grad(), foveate.use(model, method):
        answer = model.generate(**fresh(first), **steps, return_dict_in_generate=True)
        ids = torch.cat((answer.sequences, question), 1)
        hook = model.lm_head.register_forward_pre_hook(lambda m, args: states.append(args[0]))
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **steps,
            past_key_values=answer.past_key_values,
        )  # fmt: skip
        hook.remove()
    prompt = first["input_ids"].shape[1]
    kept = {"pre_llm": (6, 6), "llm": (16, 4), "forgetful": (4, 4)}[kind]
    whole = member.continued(first, out[:, prompt:-1])
    want, _ = expected(whole, spec, prompt)
    got = torch.cat([state[0, -1:] for state in states])
    torch.testing.assert_close(got, want[ids.shape[1] - 1 :], rtol=0, atol=TOLERANCE)
    layers = answer.past_key_values.layers
    for layer, left in ((layers[0], kept[0]), (layers[-1], kept[1])):
        assert layer.get_seq_length() == out.shape[1] - 1
        assert layer.keys.shape[2] == layer.slots.count == prompt - 16 + left + WINDOW - 1


def test_beams_go_their_own_ways_beyond_the_window():
    """A beam scores what greedy steps along it would."""
    member, model = Narrow(), model_of()
    inputs = member.inputs(BATCHES["ragged"])
    method, _ = KINDS["llm"](1)
    with torch.no_grad(), foveate.use(model, method):
        out = model.generate(
            **fresh(inputs), max_new_tokens=STEPS, min_new_tokens=STEPS, num_beams=3,
            do_sample=False, output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
        )  # fmt: skip
    for row, pieces in enumerate(BATCHES["ragged"]):
        alone = member.row(inputs, row)
        prompt = alone["input_ids"].shape[1]
        said = out.sequences[row : row + 1, inputs["input_ids"].shape[1] :]
        spec = KINDS["llm"](len(pieces) - 1)[1]
        states, _ = expected(member.continued(alone, said), spec, prompt)
        logits = model.lm_head(states)[prompt - 1 : -1].log_softmax(-1)
        score = logits.gather(1, said[0, :, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row], score, rtol=0, atol=1e-4)


def test_what_a_window_cannot_keep_is_refused():
    """New images after the first prompt, static caches, and cropping; the cache stays as it was."""
    member, model = Narrow(), model_of()
    first = member.inputs([[5, 7]])
    with torch.no_grad(), foveate.use(model, EveryThird(6)):
        said = model.generate(**fresh(first), max_new_tokens=3, return_dict_in_generate=True)
        cache = said.past_key_values
        length, held = cache.get_seq_length(), cache.layers[0].keys
        more = member.continued(said_with(first, said), first["input_ids"][:, 5:])
        more["mm_encoder_outputs"] = first["mm_encoder_outputs"]
        with pytest.raises(CacheError, match="see the first prompt and a window"):
            model.generate(**fresh(more), max_new_tokens=2, past_key_values=cache)
        assert cache.get_seq_length() == length
        assert cache.layers[0].keys is held
        with pytest.raises(CacheError, match="StaticReferenceSlidingWindowLayer"):
            model.generate(**fresh(first), max_new_tokens=2, cache_implementation="static")
        with pytest.raises(CacheError, match="cannot be cropped"):
            cache.crop(-1)


def said_with(inputs, said):
    """A prompt with its answer."""
    ids = said.sequences
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
