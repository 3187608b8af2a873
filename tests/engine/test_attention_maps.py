"""Attention maps that come back: of logical size, and right."""

import pytest
import torch

import foveate
from foveate.errors import FoveateError, InputError
from foveate.methods import LVLMCSP, YOPO, DivPrune, FastV, PyramidDrop
from tests.methods_for_tests import EveryThird, Forgetful, Glance
from tests.tinies import IMAGE, PATCHES, prompts, tiny_llava

SETTINGS = {
    "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_attentions": True,
    "return_dict_in_generate": True,
}  # fmt: skip


def alive_in(run, ids, placeholder, row, layer):
    """Logical positions of a row's tokens that are alive in a decoder layer, padding included."""
    images = [image for image in run.record.images if image.row == row]
    visual = (ids[row] == placeholder).nonzero()[:, 0].tolist()
    alive = set(range(ids.shape[1])) - set(visual)
    for image in images:
        mine, visual = visual[: image.total], visual[image.total :]
        left = torch.arange(image.total)
        for entry, kept in image.kept.items():
            stage, _, number = entry.partition(":")
            if stage != "llm" or int(number.partition("#")[0]) <= layer:
                left = kept
        alive |= {mine[n] for n in left.tolist()}
    return sorted(alive)


@pytest.fixture(scope="module")
def model():
    return tiny_llava(attention="eager")


def hidden_from(inputs, gone, length):
    """A 4-D mask (B, 1, T, T) that hides some positions of each row, and padding, from others."""
    real = torch.nn.functional.pad(inputs["attention_mask"].bool(), (0, length), value=True)
    total = real.shape[1]
    seen = torch.ones(total, total, dtype=torch.bool).tril() & (real & ~gone)[:, None]
    seen = (seen | torch.eye(total, dtype=torch.bool))[:, None]
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("side", ["left", "right"])
def test_maps_equal_those_of_the_whole_model_with_removed_tokens_masked(model, side):
    inputs = prompts([[4, 5, 3], [6, 2]], side=side)
    with torch.no_grad(), foveate.use(model, EveryThird(12)) as run:
        got = model(**inputs, output_attentions=True)
    gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row in range(2):
        alive = alive_in(run, inputs["input_ids"], IMAGE, row, 0)
        gone[row] = True
        gone[row, alive] = False
    mask = hidden_from(inputs, gone, 0)
    position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(
            **{**inputs, "attention_mask": mask}, position_ids=position, output_attentions=True
        )
    real = inputs["attention_mask"].bool() & ~gone
    rows = (real[:, :, None] & real[:, None])[:, None]
    for mine, theirs in zip(got.attentions, want.attentions, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs * rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_maps_of_decoding_equal_those_of_one_forward(model, cache):
    """Rows of tokens that follow see the survivors, at their places."""
    inputs = prompts([[4, 5]])
    method = PyramidDrop(layers=(1, 3), keep=(0.5, 0.25), positions="original")
    with torch.no_grad(), foveate.use(model, method):
        out = model.generate(**inputs, **SETTINGS, cache_implementation=cache)
    with torch.no_grad():
        bare = model.generate(**inputs, **SETTINGS, cache_implementation=cache)
    prompt = inputs["input_ids"].shape[1]
    for step, (maps, plain) in enumerate(zip(out.attentions, bare.attentions, strict=True)):
        for mine, theirs in zip(maps, plain, strict=True):
            assert mine.shape == theirs.shape
            total = torch.ones(mine.shape[:2])
            torch.testing.assert_close(mine[:, :, -1].sum(-1), total)
            assert not mine[..., prompt + step :].any()
    for layer in range(6):
        seen = [maps[layer][0, :, -1, :prompt] > 0 for maps in out.attentions]
        assert all(torch.equal(of, seen[0]) for of in seen)


@pytest.mark.parametrize(
    "method", [DivPrune(keep=1.0), FastV(layer=3, keep=1.0), PyramidDrop(layers=(2,), keep=1.0)]
)
def test_keeping_everything_changes_no_map(model, method):
    inputs = prompts([[4, 5, 3], [6, 2]])
    with torch.no_grad():
        want = model.generate(**inputs, **SETTINGS).attentions
        with foveate.use(model, method):
            got = model.generate(**inputs, **SETTINGS).attentions
    for mine, theirs in zip(got, want, strict=True):
        assert all(map(torch.equal, mine, theirs))


def test_parked_tokens_are_missing_where_they_are_parked(model):
    inputs = prompts([[4, 5]])
    with torch.no_grad(), foveate.use(model, LVLMCSP(layers=(1, 2, 3))) as run:
        maps = model(**inputs, output_attentions=True).attentions
    for layer, of in enumerate(maps):
        seen = of[0].sum((0, 1)).nonzero()[:, 0].tolist()
        assert seen == alive_in(run, inputs["input_ids"], IMAGE, 0, layer)
        assert of[0].sum((0, 2)).nonzero()[:, 0].tolist() == seen


def test_what_caches_forget_is_zero_in_the_maps_that_follow(model):
    inputs = prompts([[4, 5]])
    with torch.no_grad(), foveate.use(model, Forgetful(3, 9)) as run:
        maps = model.generate(**inputs, **SETTINGS).attentions
    left = alive_in(run, inputs["input_ids"], IMAGE, 0, 5)
    prompt = inputs["input_ids"].shape[1]
    for layer in range(6):
        assert maps[2][layer][0, 0, 0].nonzero()[:, 0].tolist() == [*left, prompt, prompt + 1]
    assert int((maps[0][0][0, 0, -1] > 0).sum()) == prompt


def test_what_a_decoding_step_does_not_choose_is_zero(model):
    inputs = prompts([[4, 5]])
    with torch.no_grad(), foveate.use(model, [DivPrune(keep=20), Glance(3)]) as run:
        maps = model.generate(**inputs, **SETTINGS).attentions
    kept = run.kept[0]["pre_llm"] + 4
    for layer in range(6):
        of = maps[1][layer][0, 0, 0]
        assert of.shape[-1] == inputs["input_ids"].shape[1] + 1
        assert int((of[kept] > 0).sum()) == (20 if layer < 3 else 10)
        assert int((of > 0).sum()) == (30 if layer < 3 else 20)


def test_maps_of_a_window_show_the_window():
    model = tiny_llava("mistral", "eager", window=24)
    inputs = prompts([[4, 5], [9, 2]])
    with torch.no_grad():
        bare = model.generate(**inputs, **SETTINGS).attentions
        with foveate.use(model, DivPrune(keep=18)):
            got = model.generate(**inputs, **SETTINGS).attentions
    for mine, theirs in zip(got, bare, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape
            assert not ((a > 0) & (b == 0)).any()  # nothing from outside the window
            torch.testing.assert_close(a[:, :, -1].sum(-1), torch.ones(a.shape[:2]))


def test_later_turns_and_beams(model):
    inputs = prompts([[4, 5]])
    with torch.no_grad(), foveate.use(model, DivPrune(keep=18)):
        first = model.generate(**inputs, **SETTINGS)
        more = torch.cat((first.sequences, torch.tensor([[7, 8, 9]])), 1)
        mask = torch.ones_like(more)
        again = model(
            input_ids=more[:, -4:], attention_mask=mask, past_key_values=first.past_key_values,
            output_attentions=True,
        )  # fmt: skip
        whole = model(
            input_ids=more, attention_mask=mask, pixel_values=inputs["pixel_values"],
            output_attentions=True,
        )  # fmt: skip
        beams = model.generate(**inputs, **SETTINGS, num_beams=3)
    for mine, full in zip(again.attentions, whole.attentions, strict=True):
        torch.testing.assert_close(mine, full[:, :, -4:], rtol=1e-4, atol=1e-5)
    total = inputs["input_ids"].shape[1]
    assert {maps[0].shape for maps in beams.attentions[1:2]} == {(3, 4, 1, total + 1)}


def test_assisted_decoding_hands_out_maps_of_logical_size(model):
    inputs = prompts([[4, 5]])
    total = inputs["input_ids"].shape[1]
    with torch.no_grad(), foveate.use(model, DivPrune(keep=18)):
        maps = model.generate(**inputs, **SETTINGS, prompt_lookup_num_tokens=2).attentions
    assert all(of.shape[-1] >= total for step in maps[total:] for of in step)


def test_gradients_reach_what_made_the_maps(model):
    inputs = prompts([[4, 5]])
    weight = model.model.language_model.layers[3].self_attn.q_proj.weight
    with foveate.use(model, FastV(layer=2, keep=9)):
        maps = model(**inputs, output_attentions=True).attentions
        maps[3][..., :4].sum().backward()
    assert weight.grad.abs().sum() > 0
    model.zero_grad()


def test_layers_that_make_no_map_are_refused_before_they_run(model):
    inputs = prompts([[4, 5]])
    text = prompts([[6]])
    heads = ((True, False, False, True),) * 6
    with torch.no_grad(), foveate.use(model, YOPO(heads=heads, layer=4)):
        with pytest.raises(InputError, match=r"yopo.*attention map"):
            model(**inputs, output_attentions=True)
        with pytest.raises(InputError, match=r"yopo.*attention map"):
            model.generate(**inputs, **SETTINGS)
        cache = model(**inputs, use_cache=True).past_key_values
        more = {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
        with pytest.raises(InputError, match=r"yopo.*attention map"):
            model(**more, output_attentions=True)
        assert model(**more).logits.isfinite().all()  # the cache is as it was
        assert len(model(**text, output_attentions=True).attentions) == 6


def test_caches_of_text_alone_show_no_visual_token(model):
    inputs = prompts([[4, 5]])
    with torch.no_grad(), foveate.use(model, YOPO(layer=2)):
        cache = model(**inputs, use_cache=True).past_key_values
        more = {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
        maps = model(**more, output_attentions=True).attentions
    total = inputs["input_ids"].shape[1] + 1
    for layer, of in enumerate(maps):
        seen = cache.layers[layer].keys.shape[2]
        assert of.shape[-1] == total
        assert int((of > 0).any(1).sum()) == seen == (total if layer < 2 else total - PATCHES)


def test_kernels_without_maps_return_none():
    model = tiny_llava()
    with torch.no_grad(), foveate.use(model, DivPrune(keep=18)):
        assert not model(**prompts([[4, 5]]), output_attentions=True).attentions
    with torch.no_grad(), foveate.use(model, YOPO(layer=2)):
        assert not model(**prompts([[4, 5]]), output_attentions=True).attentions


def test_maps_that_cannot_be_told_apart_are_refused(model, monkeypatch):
    attention = type(model.model.language_model.layers[2].self_attn)
    forward = attention.forward

    def mute(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        return (out[0], None) if self.layer_idx == 2 else out

    monkeypatch.setattr(attention, "forward", mute)
    with (
        torch.no_grad(),
        foveate.use(model, DivPrune(keep=18)),
        pytest.raises(FoveateError, match="which is which"),
    ):
        model(**prompts([[4, 5]]), output_attentions=True)
