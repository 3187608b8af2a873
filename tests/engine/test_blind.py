"""Decoding where some heads, or all of them, do not read visual tokens."""

import pytest
import torch
from transformers import StaticCache

import foveate
from foveate.engine.extensions.partial.decode import ROOM, Unread
from foveate.engine.hooks import ForwardPass
from foveate.methods.yopo import YOPO
from tests.methods_for_tests import Forgetful
from tests.tinies import LAYERS, prompts, tiny_llava

HEADS = tuple((True, i % 2 == 0, i % 3 != 0, i != 2) for i in range(LAYERS))
NOBODY = ((False,) * 4, (True, False, True, True)) * (LAYERS // 2)
METHODS = {
    "all-heads": YOPO(layer=LAYERS),
    "some-heads": YOPO(layer=4, heads=HEADS),
    "no-heads": YOPO(window=3, layer=LAYERS, heads=NOBODY),
    "lost-mass": YOPO(layer=4, heads=HEADS, as_released=True),
}
ROWS = {"one": [[5, 7]], "ragged": [[5, 7], [4], [2, 3, 9]]}
KERNELS = ("eager", "flash", "static")
TOKENS = torch.tensor([[9, 30, 31, 8], [11, 7, 7, 5], [6, 40, 21, 3]])


def seen_by(inputs, count):
    """The prompt's attention mask, and that of the tokens after it."""
    return torch.nn.functional.pad(inputs["attention_mask"], (0, count), value=1)


def one_by_one(model, inputs, tokens, cache=None):
    """Logits of tokens that are decoded one at a time, and the cache after them."""
    cache = model(**inputs, use_cache=True, past_key_values=cache).past_key_values
    logits = []
    for i in range(tokens.shape[1]):
        mask = seen_by(inputs, i + 1)
        step = model(input_ids=tokens[:, i : i + 1], attention_mask=mask, past_key_values=cache)
        logits.append(step.logits)
    return torch.cat(logits, 1), cache


@pytest.fixture
def turns(monkeypatch):
    """Lengths of the forwards that made a turn."""
    made, init = [], ForwardPass.__init__
    monkeypatch.setattr(ForwardPass, "__init__", lambda *a: (made.append(a[3].length), init(*a))[1])
    return made


@pytest.mark.parametrize(
    ("kernel", "rows"), [("sdpa", "one"), *((k, "ragged") for k in ("sdpa", *KERNELS))]
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_single_tokens_equal_a_longer_prompt(method, rows, kernel, flash_emulated, turns):
    """Which is held against masked layers in the tests of YOPO."""
    attention = {"flash": flash_emulated, "eager": "eager"}.get(kernel, "sdpa")
    rows = ROWS[rows]
    model, inputs = tiny_llava("llama-gqa", attention), prompts(rows)
    tokens, length = TOKENS[: len(rows)], inputs["input_ids"].shape[1]
    cache = None
    if kernel == "static":
        cache = StaticCache(model.config.get_text_config(), max_cache_len=length + 9)
    with foveate.use(model, method):
        got, _ = one_by_one(model, inputs, tokens, cache)
        assert turns == [length]
        inputs["attention_mask"] = seen_by(inputs, tokens.shape[1])
        inputs["input_ids"] = torch.cat((inputs["input_ids"], tokens), 1)
        want = model(**inputs).logits[:, -tokens.shape[1] :]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@torch.no_grad()
def test_what_is_not_read_is_written_down_once(llava, monkeypatch):
    made, of = [], Unread.of
    monkeypatch.setattr(Unread, "of", lambda *a: (made.append(a[1].layer), of(*a))[1])
    with foveate.use(llava, METHODS["some-heads"]):
        one_by_one(llava, prompts([[5, 7]]), TOKENS[:1].repeat(1, 3))
        assert made == [0, 1, 2, 3]
        one_by_one(llava, prompts([[5, 7]]), TOKENS[:1].repeat(1, ROOM // 4 + 1))
    assert made[4:] == [0, 1, 2, 3] * 2


@torch.no_grad()
def test_beams_that_change_places_take_along_what_they_do_not_read(any_llava):
    inputs = prompts(ROWS["ragged"])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with foveate.use(any_llava, METHODS["some-heads"]):
        got = any_llava.generate(**inputs, **options)
        want = any_llava.generate(**inputs, **options, use_cache=False)
    assert torch.equal(got, want)


@torch.no_grad()
def test_rows_that_change_places_take_along_what_they_do_not_read(llava):
    inputs, order = prompts(ROWS["ragged"]), torch.tensor([2, 0, 1])
    steps = []
    with foveate.use(llava, METHODS["some-heads"]):
        for places in (torch.arange(3), order):
            _, cache = one_by_one(llava, inputs, TOKENS)
            cache.batch_select_indices(places)
            mask = seen_by(inputs, TOKENS.shape[1] + 1)[places]
            token = TOKENS[places, :1]
            steps.append(llava(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(steps[1], steps[0][order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@torch.no_grad()
def test_layers_that_nobody_reads_hold_text_alone(any_llava, rows):
    inputs = prompts(rows)
    longest = max(sum(pieces) for pieces in rows)
    with foveate.use(any_llava, METHODS["no-heads"]) as run:
        _, cache = one_by_one(any_llava, inputs, TOKENS[: len(rows)])
        slots = run.record.cache_slots
        report = run.report()
    length = inputs["input_ids"].shape[1]
    assert slots == [longest, length] * (LAYERS // 2)
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [count + TOKENS.shape[1] for count in slots]
    kv = report["kv_bytes"]
    assert kv["after"] * LAYERS * length == kv["before"] * sum(slots)


@torch.no_grad()
def test_survivors_in_layers_that_forget_stay_visual(llava):
    """So that blind heads do not begin to read them."""
    with foveate.use(llava, [Forgetful(), YOPO(layer=LAYERS, heads=HEADS)]):
        cache = llava(**prompts([[5, 7]]), use_cache=True).past_key_values
    assert [int(layer.slots.all_visual.sum()) for layer in cache.layers] == [9] * LAYERS


@torch.no_grad()
def test_a_new_image_goes_on_after_layers_that_hold_text_alone(any_llava):
    method, first, second = METHODS["no-heads"], prompts([[5, 7]]), prompts([[4, 6]], seed=1)
    ids = torch.cat((first["input_ids"], TOKENS[:1], second["input_ids"]), 1)
    pixels = torch.cat((first["pixel_values"], second["pixel_values"]))
    seen = torch.ones_like(ids)
    with foveate.use(any_llava, method):
        _, cache = one_by_one(any_llava, first, TOKENS[:1])
        got = any_llava(**{**second, "attention_mask": seen}, past_key_values=cache).logits
        want = any_llava(input_ids=ids, pixel_values=pixels, attention_mask=seen).logits
    torch.testing.assert_close(got[:, -1], want[:, -1], rtol=0, atol=1e-4)
    assert [layer.keys.shape[2] for layer in cache.layers[:2]] == [26, 98]
