"""A cache of one session goes on in another: what was removed stays removed, or it is refused."""

import pytest
import torch

import foveate
from foveate.errors import CacheError
from foveate.methods import YOPO, DivPrune, FastV, PyramidDrop, Uniform
from tests.tinies import IMAGE, prompts, tiny_llava

FIRST = prompts([(3, 5)])
METHODS = {
    "fastv": FastV(layer=2, keep=0.3),
    "late": FastV(layer=4, keep=0.5),
    "pyramid": PyramidDrop(layers=(1, 3), keep=(0.5, 0.25)),
    "divprune": DivPrune(keep=0.3),
    "uniform": Uniform(keep=0.5, positions="original"),
}


@torch.no_grad()
def go_on(model, cache, tokens):
    """Logits of new tokens, and of two greedy ones after them."""
    ids, logits = torch.tensor([tokens]), []
    for _ in range(3):
        out = model(input_ids=ids, past_key_values=cache)
        logits.append(out.logits[:, -1])
        ids = out.logits[:, -1:].argmax(-1)
    return torch.stack(logits)


@torch.no_grad()
def begun(model):
    return model(**FIRST, use_cache=True).past_key_values


@pytest.mark.parametrize("tokens", [[9], [9, 9, 7]], ids=len)
@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_text_goes_on_as_in_the_first_session(llava, first, second, tokens):
    with foveate.use(llava, METHODS[first]):
        want = go_on(llava, begun(llava), tokens)
    with foveate.use(llava, METHODS[first]):
        cache = begun(llava)
    with foveate.use(llava, METHODS[second]):
        got = go_on(llava, cache, tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("second", ["fastv", "divprune", "late"])
@pytest.mark.parametrize("first", ["fastv", "divprune", "late", "pyramid"])
def test_a_new_image_is_pruned_by_the_second_session(llava, first, second):
    """With the first method's survivors before it: those of a session that has both budgets."""
    more = prompts([(2, 4)], seed=3)
    with foveate.use(llava, METHODS[first]):
        cache = begun(llava)
    before = [layer.keys.shape[2] for layer in cache.layers]
    with foveate.use(llava, METHODS[second]) as run, torch.no_grad():
        llava(**{**more, "attention_mask": None}, past_key_values=cache)
    (image,) = run.kept
    assert list(image.values())[-1].shape[0] < int((more["input_ids"] == IMAGE).sum())
    alive = run.record.layer_tokens
    for held, old, new in zip(cache.layers, before, alive, strict=True):
        assert held.keys.shape[2] == old + new[0]


def test_what_was_half_computed_is_read_by_its_own_method_alone():
    model = tiny_llava()
    half = YOPO()
    with foveate.use(model, half):
        want = go_on(model, begun(model), [9])
        cache = begun(model)
    with foveate.use(model, half):
        torch.testing.assert_close(go_on(model, cache, [9]), want, rtol=0, atol=1e-5)
    with foveate.use(model, METHODS["fastv"]), pytest.raises(CacheError, match="only a part"):
        go_on(model, cache, [9])
