"""YOPO end to end: against layers that compute everything and mask it, with and without a cache."""

import pytest
import torch

import foveate
from foveate.calibration.yopo_heads import head_mask
from foveate.core import PartialCompute
from foveate.errors import BudgetError, FoveateError, LayerError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.measure.shapes import TextShape
from foveate.methods import FastV
from foveate.methods.yopo import YOPO
from tests.masked_layer import masked
from tests.tinies import IMAGE, LAYERS, prompts, row_of, tiny_llava

HEADS = tuple((True, i % 2 == 0, i % 3 != 0, i != 2) for i in range(LAYERS))
METHODS = {
    "default": YOPO(),
    "heads": YOPO(window=3, layer=4, heads=HEADS, ffn_factor=3),
    "no-cut": YOPO(layer=LAYERS, heads=HEADS),
    "released": YOPO(window=3, layer=4, heads=HEADS, as_released=True),
    "released-no-cut": YOPO(layer=LAYERS, heads=HEADS, as_released=True),
}
ROWS = {"one": [[5, 7]], "two-images": [[3, 2, 6]], "ragged": [[5, 7], [4], [2, 3, 9]]}
STEPS = 5


@torch.no_grad()
def expected(model, method, ids, features):
    """Logits of a row whose continuation is given, at full length, everything computed."""
    text = model.model.language_model
    hidden = text.embed_tokens(ids)
    columns = (ids == IMAGE).nonzero()[:, 0]
    hidden[columns] = torch.cat([hidden[:0], *features])
    images = [(part, torch.arange(36)) for part in columns.split(36)] if len(columns) else []
    work = {
        work.layer: work for work in method.partial_compute(foveate.families.find_family(model))
    }
    rotary = text.rotary_emb(hidden[None], torch.arange(len(ids))[None])
    cos, sin = (part[0] for part in rotary)
    unseen = PartialCompute(0, 1, heads=(False,) * 4)  # after the cut, for what text makes of it
    real = torch.ones(len(ids), dtype=torch.bool)
    for number, layer in enumerate(text.layers):
        hidden = masked(
            layer, hidden, (cos, sin), images, work.get(number, unseen), real, (6, 6)
        )  # fmt: skip
    return model.lm_head(text.norm(hidden))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_generation_equals_the_masked_model(any_llava, method, rows):
    inputs = prompts(rows)
    with torch.no_grad():
        plain = any_llava(**inputs).logits[:, -1]
    with foveate.use(any_llava, method):
        out = any_llava.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    for row, pieces in enumerate(rows):
        alone = row_of(inputs, row)
        features = []
        if len(pieces) > 1:
            features = any_llava.model.get_image_features(alone["pixel_values"]).pooler_output
        prompt = alone["input_ids"].shape[1]
        ids = torch.cat((alone["input_ids"][0], out.sequences[row, inputs["input_ids"].shape[1] :]))
        want = expected(any_llava, method, ids, list(features))[prompt - 1 : -1]
        got = torch.stack(out.logits, dim=1)[row]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        if features != []:
            assert (plain[row] - want[0]).abs().max() > 0.05, "the test does not bite"


def test_the_cache_holds_no_visual_token_after_the_cut(llava):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, YOPO(layer=4)) as run:
        cache = llava(**inputs, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [48] * 4 + [12] * 2
    assert list(run.kept[0]) == ["llm:4"]
    assert run.kept[0]["llm:4"].tolist() == []


def test_a_second_turn_goes_on_with_the_cache(any_llava):
    """Heads that read no visual token read none of the turns before either."""
    method, first = METHODS["heads"], prompts([[5, 7]])
    text = torch.tensor([[9, 30, 31]])
    whole = torch.cat((first["input_ids"], text), 1)
    with foveate.use(any_llava, method):
        cache = any_llava(**first, use_cache=True).past_key_values
        got = any_llava(
            input_ids=text, attention_mask=torch.ones_like(whole), past_key_values=cache
        ).logits
        together = {**first, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        want = any_llava(**together).logits[:, -3:]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_an_account_counts_no_more_neighbours_than_there_are_tokens(llava):
    """A window over everything costs, of 3 tokens, 9 pairs: no more than of the text and them."""
    inputs, few = prompts([[5, 7]]), foveate.get_method("divprune")(keep=3)
    methods = [few, YOPO(window=99, layer=LAYERS, ffn_factor=1)]
    with torch.no_grad(), foveate.use(llava, methods) as run:
        llava(**inputs)
    family = find_family(llava)
    shape, text, visual = TextShape.all(family.config)[0], 12, 3
    pairs = text * (text + 1) // 2 + text * visual + visual**2
    products = shape.mixer.projections(text + visual) + shape.mlp_flops(text + visual)
    want = products + 4 * shape.mixer.heads * shape.mixer.head_dim * pairs
    assert account(run.record, family, methods).layers == (want,) * LAYERS


def test_after_other_tokens_are_gone(llava):
    """A window on a grid with holes is what is left of the window."""
    inputs, drop = prompts([[5, 7]]), FastV(layer=1, keep=0.5)
    everything = YOPO(window=99, layer=LAYERS, ffn_factor=1)
    with foveate.use(llava, [drop, everything]) as run:
        wide = llava(**inputs).logits
        assert len(run.kept[0]["llm:1"]) == 18
    with foveate.use(llava, [drop, YOPO(window=3, layer=LAYERS, ffn_factor=1)]):
        narrow = llava(**inputs).logits
    assert wide.isfinite().all()
    assert narrow.isfinite().all()
    assert (wide - narrow)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_other_kernels_agree(flash_emulated, attention):
    kernel = flash_emulated if attention == "flash" else attention
    model, other = tiny_llava("llama-gqa"), tiny_llava("llama-gqa", kernel)
    inputs = prompts(ROWS["ragged"])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    for method in METHODS.values():
        with foveate.use(model, method):
            want = model.generate(**inputs, **options)
        with foveate.use(other, method):
            got = other.generate(**inputs, **options)
        distance = (torch.stack(want.logits) - torch.stack(got.logits)).abs().max()
        assert distance < 1e-4


def test_nothing_left_out_changes_nothing_but_the_order_of_attention(llava):
    """All heads and neurons, and a window of one token: text in front is read as ever."""
    inputs = prompts([[5, 7]])
    with foveate.use(llava, YOPO(layer=LAYERS, ffn_factor=1)) as run:
        got = llava(**inputs).logits
    plain = llava(**inputs).logits
    assert torch.allclose(got[:, :5], plain[:, :5], atol=1e-5)
    assert run.kept == [{}]
    assert "forward" not in vars(llava.model.language_model.layers[0])


def test_training_reaches_the_weights(llava):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, METHODS["heads"]):
        llava(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for p in llava.model.language_model.parameters()]
    llava.zero_grad()
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_the_head_mask_is_that_of_a_loop_over_maps():
    model = tiny_llava("llama-gqa")
    samples = [prompts([[5, 7]], seed=seed) for seed in range(5)]
    eager, votes = tiny_llava("llama-gqa", "eager"), torch.zeros(LAYERS, 4)
    for inputs in samples:
        maps = [m.detach() for m in eager(**inputs, output_attentions=True).attentions]
        for layer in range(LAYERS):
            for head in range(4):
                seen = other = 0.0
                for query in range(41, 48):
                    for key in range(48):
                        weight = float(maps[layer][0, head, query, key])
                        if inputs["input_ids"][0, key] == IMAGE:
                            seen += weight
                        else:
                            other += weight
                votes[layer, head] += seen / other > 1.5
    got = head_mask(model, samples, threshold=1.5, share=0.4, always=1)
    want = votes / 5 > 0.4
    want[0] = True
    assert torch.equal(torch.tensor(got), want)
    assert 0 < want[1:].sum() < want[1:].numel(), "the test does not bite"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    with foveate.use(model, YOPO(heads=got)):
        model(**samples[0])
    with pytest.raises(FoveateError, match="at least one calibration prompt"):
        head_mask(model, [])


def test_errors(llava):
    with pytest.raises(BudgetError, match=r"takes no keep; got 0.5"):
        YOPO(keep=0.5)
    with pytest.raises(FoveateError, match="window must be odd"):
        YOPO(window=4)
    with pytest.raises(FoveateError, match="ffn_factor must be at least 1"):
        YOPO(ffn_factor=0.5)
    with pytest.raises(FoveateError, match="leave positions out"):
        YOPO(positions="renumbered")
    with pytest.raises(LayerError, match="has layers 0 to 5"):
        foveate.use(llava, YOPO(layer=7))
    with pytest.raises(LayerError, match="mask of 2 layers"):
        foveate.use(llava, YOPO(heads=((True,) * 4,) * 2))
    with pytest.raises(UnsupportedModelError, match="the mask has 3 heads"):
        foveate.use(llava, YOPO(heads=((True,) * 3,) * LAYERS))
    with pytest.raises(LayerError, match="another method both say"):
        foveate.use(llava, [YOPO(), YOPO(window=3)])
