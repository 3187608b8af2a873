"""A forward that dies leaves the cache as it found it; so going on is right."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate.families.qwen3_5 import Qwen35
from foveate.methods import LVLMCSP, DivPrune, DyCoke, FastV, PruneVid, PyramidDrop
from foveate.testing import models
from tests.conformance.zoo import MEMBERS
from tests.tinies import LAYERS, prompts, tiny_llava

SETTINGS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
METHODS = [
    FastV(layer=2, keep=0.3),
    PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)),
    DivPrune(keep=0.3),
]
INPUTS = prompts([(3, 5), (2, 7)])


class Killed(BaseException):
    """Ctrl-C, or memory that has run out."""


def killed(layer, call, mlp="mlp"):
    """Run a call that dies in the MLP of a layer, after its attention and its cache."""

    def die(*_):
        raise Killed

    hook = getattr(layer, mlp).register_forward_pre_hook(die)
    try:
        with pytest.raises(Killed):
            call()
    finally:
        hook.remove()


def state(cache):
    """What a cache holds."""
    return [
        (type(layer), layer.get_seq_length(), None if layer.keys is None else layer.keys.shape[2])
        for layer in cache.layers
    ]


@torch.no_grad()
def go_on(model, cache, past, tokens=4):
    """Logits of new tokens after a cache."""
    batch = len(INPUTS["input_ids"])
    ids = torch.arange(20, 20 + tokens).expand(batch, -1)
    mask = torch.cat((INPUTS["attention_mask"], torch.ones(batch, past, dtype=torch.long)), 1)
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("number", range(LAYERS))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_going_on_after_a_forward_that_died_is_right(llava, method, number, tokens):
    with foveate.use(llava, method), torch.no_grad():
        cache = llava(**INPUTS, use_cache=True).past_key_values
        want = go_on(llava, copy.deepcopy(cache), tokens, tokens)
        before = state(cache)
        layer = llava.model.language_model.layers[number]
        killed(layer, lambda: go_on(llava, cache, tokens, tokens))
        assert state(cache) == before
        got = go_on(llava, cache, tokens, tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [0, 2, LAYERS - 1])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_prompt_whose_forward_died_can_be_run_again(llava, method, kind, number):
    """On the same cache, which is as empty as before."""
    from transformers import DynamicCache, StaticCache

    def empty():
        if kind == "dynamic":
            return DynamicCache(config=llava.config.text_config)
        return StaticCache(config=llava.config.text_config, max_cache_len=96)

    with foveate.use(llava, method), torch.no_grad():
        first = llava(**INPUTS, past_key_values=empty())
        want = first.logits, go_on(llava, first.past_key_values, 4)
        cache = empty()
        layer = llava.model.language_model.layers[number]
        killed(layer, lambda: llava(**INPUTS, past_key_values=cache))
        assert cache.get_seq_length() == 0
        got = llava(**INPUTS, past_key_values=cache).logits, go_on(llava, cache, 4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [1, 4])
def test_a_static_cache_goes_on_after_a_decoding_step_that_died(llava, number):
    from transformers import StaticCache

    with foveate.use(llava, METHODS[0]), torch.no_grad():
        cache = StaticCache(config=llava.config.text_config, max_cache_len=96)
        llava(**INPUTS, past_key_values=cache)
        want = go_on(llava, copy.deepcopy(cache), 1, 1)
        layer = llava.model.language_model.layers[number]
        killed(layer, lambda: go_on(llava, cache, 1, 1))
        torch.testing.assert_close(go_on(llava, cache, 1, 1), want, rtol=0, atol=1e-5)


def test_a_cache_with_windows_goes_on_after_a_step_that_died():
    model = tiny_llava("mistral", window=24)
    with foveate.use(model, DivPrune(keep=0.3)), torch.no_grad():
        cache = model(**INPUTS, use_cache=True).past_key_values
        want = go_on(model, copy.deepcopy(cache), 4)
        killed(model.model.language_model.layers[3], lambda: go_on(model, cache, 4))
        torch.testing.assert_close(go_on(model, cache, 4), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [0, 5, 11])
@pytest.mark.parametrize(
    "method", [FastV(keep=0.3), DivPrune(keep=0.3), DyCoke(), LVLMCSP(), PruneVid()], ids=str
)
@pytest.mark.parametrize("family", ["llava", "mrope"])
def test_a_second_turn_that_died_is_generated_anew(family, method, number):
    """Of every kind of step, on one-dimensional and on M-RoPE positions."""
    model = getattr(models, family)()
    inputs = models.prompts(model, [(4, 6)])
    with foveate.use(model, method):
        said = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
        cache = said.past_key_values
        ids = torch.cat((said.sequences, torch.tensor([[20, 21, 22]])), 1)

        def turn(cache):
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "mm_token_type_ids" in inputs:
                types = inputs["mm_token_type_ids"]
                zeros = torch.zeros(1, ids.shape[1] - types.shape[1], dtype=types.dtype)
                more["mm_token_type_ids"] = torch.cat((types, zeros), 1)
            return model.generate(**more, past_key_values=cache, **SETTINGS)

        want = turn(copy.deepcopy(cache))
        killed(model.model.language_model.layers[number], lambda: turn(cache))
        assert torch.equal(turn(cache), want)


def test_a_forward_that_died_outside_its_session_is_told_within():
    """The bare model extends the layers that were not pruned, before it comes to one that was."""
    model = tiny_llava()
    with foveate.use(model, METHODS[0]), torch.no_grad():
        cache = model(**INPUTS, use_cache=True).past_key_values
    with pytest.raises(foveate.errors.CacheError, match="only the session"):
        go_on(model, cache, 4)
    with (
        foveate.use(model, METHODS[0]),
        pytest.raises(foveate.errors.CacheError, match="disagree on its length"),
    ):
        go_on(model, cache, 4)


class Clones(TorchDispatchMode):
    """Counts copies of tensors, by their shape."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.clone.default:
            self.shapes[args[0].shape] += 1
        return function(*args, **(kwargs or {}))


def states(cache):
    """Copies of all running states of a cache."""
    return [
        state.clone()
        for layer in cache.layers
        for table in ("conv_states", "recurrent_states")
        for state in getattr(layer, table, {}).values()
        if state is not None
    ]


def clones(model, cache, ids):
    """Copies that one forward of text after a cache makes of tensors as large as its states."""
    shapes = {state.shape for state in states(cache)}
    with torch.no_grad(), Clones() as counted:
        model(input_ids=ids, past_key_values=cache)
    return {shape: counted.shapes[shape] for shape in shapes}


@pytest.mark.parametrize("tokens", [1, 4])
def test_running_states_are_not_copied_where_nothing_was_removed(tokens):
    model = MEMBERS["qwen3_5"]().build()
    ids = torch.arange(20, 20 + tokens)[None]
    counts = []
    for attached in (False, True):
        with foveate.use(model, DivPrune(keep=0.3)) if attached else nullcontext():
            cache = model(input_ids=torch.arange(10, 18)[None], use_cache=True).past_key_values
            counts.append(clones(model, cache, ids))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("tokens", [1, 4])
def test_running_states_that_a_model_replaces_are_not_copied(tokens):
    """Of a pruned cache; states of convolutions are, which are small."""
    model = MEMBERS["qwen3_5"]().build()
    ids = torch.arange(20, 20 + tokens)[None]
    bare = model(input_ids=torch.arange(10, 18)[None], use_cache=True).past_key_values
    want = clones(model, bare, ids)
    with foveate.use(model, DivPrune(keep=0.3)):
        inputs = MEMBERS["qwen3_5"]().inputs([[4, 6]])
        cache = model(**inputs, use_cache=True).past_key_values
        got = clones(model, cache, ids)
    large = cache.layers[0].recurrent_states[0].shape
    assert got[large] == want[large]


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("number", [0, 2, 4])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_running_states_are_brought_back_after_a_forward_that_died(
    monkeypatch, name, number, tokens, replaces
):
    """Bit for bit, copied or replaced."""
    member = MEMBERS[name]()
    model = member.build()
    if name == "qwen3_5":
        monkeypatch.setattr(Qwen35, "replaces_state", replaces)
    ids = torch.arange(20, 20 + tokens)[None]
    layer = model.model.language_model.layers[number]
    mlp = "mlp" if hasattr(layer, "mlp") else "feed_forward"
    with foveate.use(model, DivPrune(keep=0.3)), torch.no_grad():
        cache = model(**member.inputs([[4, 6]]), use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        want = model(input_ids=ids, past_key_values=twin).logits
        before = states(cache)
        killed(layer, lambda: model(input_ids=ids, past_key_values=cache), mlp)
        assert all(map(torch.equal, states(cache), before))
        assert not all(map(torch.equal, states(twin), before)), "the test does not bite"
        assert torch.equal(model(input_ids=ids, past_key_values=cache).logits, want)
