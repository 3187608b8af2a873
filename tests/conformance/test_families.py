"""Every family keeps the engine's promises: each cell passes, or raises a documented error."""

import functools

import pytest
import torch

import foveate
from foveate.families import find_family
from foveate.methods import FastV, PyramidDrop
from tests.conformance import oracle
from tests.conformance.tolerance import states_of, tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird, Forgetful
from tests.oracle import Drop, Spec

STEPS = 8
BATCHES = {"one": [[5, 7]], "two-images": [[3, 2, 6]], "ragged": [[5, 7], [4], [2, 3, 9]]}


@functools.cache
def model_of(name, attention="sdpa"):
    return MEMBERS[name]().build(attention)


def layers_of(name):
    """Two layers at which tokens may be ranked and removed, and one whose attention ranks FastV."""
    family = find_family(model_of(name))
    legal = [i for i in family.attention_layers if i >= family.first_llm_layer]
    early = next(i for i in legal if i + 1 >= max(1, family.first_llm_layer))
    return (legal[0] or legal[1], legal[-1]), early


def case(name, kind, images):
    """A method and what the oracle must do for it."""
    visual = MEMBERS[name].visual
    (first, second), early = layers_of(name)
    third = [torch.arange(0, visual, 3)] * images
    half, few, six = visual // 2, visual // 4, (visual + 2) // 3
    if kind == "pyramiddrop":
        drops = [Drop(first, first, [half] * images), Drop(second, second, [few] * images)]
        return PyramidDrop((first, second), (half, few), "original"), Spec(drops=drops)
    if kind == "renumbered":
        drops = [Drop(first, first, [half] * images, True)]
        return PyramidDrop((first,), half, "renumbered"), Spec(drops=drops)
    if kind == "fastv":
        return FastV(early + 1, few), Spec(drops=[Drop(early + 1, early, [few] * images)])
    if kind == "forgetful":
        return Forgetful(second, few), Spec(
            drops=[Drop(second, second, [few] * images)], evict_cache=second
        )
    if kind == "pre_llm":
        return EveryThird(six), Spec(kept=third)
    if kind == "pre_llm-renumbered":
        return EveryThird(six, "renumbered"), Spec(kept=third, renumber=True)
    drops = [Drop(second, second, [3] * images)]
    methods = [EveryThird(six), PyramidDrop((second,), 3, "original")]
    return methods, Spec(kept=third, drops=drops)


def refused(model, kind):
    """Why a family refuses a case, or nothing."""
    family = find_family(model)
    if kind.endswith("renumbered") and not family.one_dimensional:
        return "M-RoPE"
    if kind == "forgetful" and family.recurrent_layers:
        return "recurrent layers of this .* have mixed them into a running state"
    return ""


KINDS = (
    "pyramiddrop",
    "renumbered",
    "fastv",
    "forgetful",
    "pre_llm",
    "pre_llm-renumbered",
    "composed",
)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_prefill_and_decoding_equal_the_oracle(name, kind, batch):
    member, model = MEMBERS[name](), model_of(name)
    if why := refused(model, kind):
        with pytest.raises(foveate.FoveateError, match=why):
            foveate.use(model, case(name, kind, 1)[0])
        return
    rows = BATCHES[batch]
    inputs = member.inputs(rows)
    with foveate.use(model, case(name, kind, 1)[0]) as run:
        states, out = states_of(member, model, inputs, STEPS + 1)
    kept = iter(run.kept)
    worst = bite = 0.0
    for row, pieces in enumerate(rows):
        alone = member.row(inputs, row)
        prompt = alone["input_ids"].shape[1]
        more = out[row : row + 1, inputs["input_ids"].shape[1] : -1]
        whole = member.continued(alone, more)
        images = len(pieces) - 1
        eager = model_of(name, "eager")
        want, history = oracle.run(member, eager, whole, case(name, kind, images)[1], prompt)
        plain, _ = oracle.run(member, eager, member.continued(alone, more), Spec(), prompt)
        worst = max(worst, (want[prompt - 1 :] - states[row]).abs().max().item())
        if images:
            bite = max(bite, (plain[prompt - 1 :] - states[row]).abs().max().item())
        for image in range(images):
            for place, indices in zip(next(kept).values(), history, strict=True):
                assert torch.equal(place, indices[image])
    print(f"{name} {kind}: distance to the oracle {worst:.1e}, to the unpruned model {bite:.2f}")
    assert worst <= tolerance_of(name, model)
    assert bite > 0.02, "the test does not bite"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_keeping_everything_changes_no_bit(name, batch):
    member, model = MEMBERS[name](), model_of(name)
    inputs = member.inputs(BATCHES[batch])
    options = {
        "max_new_tokens": 4, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    want = model.generate(**fresh(inputs), **options)
    (first, _), early = layers_of(name)
    for method in (FastV(early + 1, 1.0), PyramidDrop((first,), 1.0), EveryThird(1.0)):
        with foveate.use(model, method):
            got = model.generate(**fresh(inputs), **options)
        assert torch.equal(got.sequences, want.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize("kind", ["pyramiddrop", "pre_llm"])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_beams_repeat_what_greedy_search_removes(name, kind):
    member, model = MEMBERS[name](), model_of(name)
    rows = BATCHES["ragged"] if member.beams_of_many else [[5, 7], [4], [2, 12]]
    inputs = member.inputs(rows)
    method, _ = case(name, kind, 1)
    with foveate.use(model, method) as run:
        model.generate(**fresh(inputs), max_new_tokens=2, do_sample=False)
        once = run.kept
        out = model.generate(
            **fresh(inputs), max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False
        )
        twice = run.kept
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    assert len(twice) == 2 * len(once)
    flat = [image for image in once for _ in range(2)]
    # Rows with several images repeat as a whole; every row here has one image or two.
    for image in flat:
        assert any(all(torch.equal(image[p], other[p]) for p in image) for other in twice)


@pytest.mark.parametrize("kind", ["pyramiddrop", "pre_llm"])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_cache_is_really_smaller(name, kind):
    member, model = MEMBERS[name](), model_of(name)
    inputs = member.inputs([[5, 7]])
    method, _ = case(name, kind, 1)
    with foveate.use(model, method) as run:
        out = model.generate(
            **fresh(inputs), max_new_tokens=3, min_new_tokens=3, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
    tokens = [row[0] for row in run.record.layer_tokens]
    length = inputs["input_ids"].shape[1]
    assert tokens[-1] < length
    for number, layer in enumerate(out.past_key_values.layers):
        if number not in find_family(model).keyed_layers:
            continue
        window = getattr(layer, "sliding_window", None) or 10**9
        assert layer.get_seq_length() == length + 2
        assert layer.keys.shape[2] == min(tokens[number] + 2, window - 1)


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_removal_restores_the_model(name):
    member, model = MEMBERS[name](), model_of(name)
    inputs = member.inputs([[5, 7]])
    before = model(**fresh(inputs)).logits
    with foveate.use(model, case(name, "composed", 1)[0]):
        pruned = model(**fresh(inputs)).logits
    assert not torch.equal(before, pruned)
    assert torch.equal(model(**fresh(inputs)).logits, before)
    assert not [n for n, m in model.named_modules() if m._forward_pre_hooks]
