"""Caches of earlier layers forget what a step removes, and labels reach later steps."""

import pytest
import torch

import foveate
from foveate.errors import CacheError
from foveate.methods import FastV
from tests import oracle
from tests.engine.test_oracle import BATCHES, TOLERANCE, drops, features_of
from tests.methods_for_tests import EveryThird, Forgetful, Labelling
from tests.tinies import LAYERS, prompts, row_of

STEPS = 6
GENERATE = {
    "max_new_tokens": STEPS + 1,
    "min_new_tokens": STEPS + 1,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
METHODS = {
    "alone": ([Forgetful()], None),
    "renumbered": ([Forgetful(positions="renumbered")], None),
    "after-another": ([EveryThird(keep=36), Forgetful()], None),
    "after-removal": ([EveryThird(keep=12), Forgetful(keep=0.5)], 12),
}


def spec_of(name, images, forget):
    methods, first = METHODS[name]
    renumber = methods[-1].positions == "renumbered"
    kept = None if first is None else [torch.arange(0, 36, 3)] * images
    count = 9 if first is None else first // 2
    found = drops((count,), (3,), (3,), images, renumber)
    return oracle.Spec(kept=kept, drops=found, evict_cache=forget)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", METHODS)
def test_generation_equals_the_oracle(any_llava, name, rows, cache):
    """The prompt is read in full before the cut; tokens after it see survivors in all layers."""
    inputs = prompts(rows)
    with foveate.use(any_llava, METHODS[name][0]) as run:
        out = any_llava.generate(**inputs, **GENERATE, cache_implementation=cache)
    kept = iter(run.kept)
    worst = bite = 0.0
    for row, pieces in enumerate(rows):
        alone = row_of(inputs, row)
        features, prompt = features_of(any_llava, alone), alone["input_ids"].shape[1]
        ids = torch.cat((alone["input_ids"][0], out.sequences[row, inputs["input_ids"].shape[1] :]))
        spec = spec_of(name, len(pieces) - 1, 3)
        want, history = oracle.run(any_llava, ids, features, spec, prompt)
        steps = torch.stack(out.logits, dim=1)[row]
        worst = max(worst, (want[prompt - 1 : -1] - steps).abs().max().item())
        for image in range(len(features)):
            assert torch.equal(next(kept)["llm:3"], history[-1][image])
        if features:
            spec = spec_of(name, len(pieces) - 1, 0)
            kinder, _ = oracle.run(any_llava, ids, features, spec, prompt)
            bite = max(bite, (kinder[prompt:-1] - steps[1:]).abs().max().item())
    assert worst <= TOLERANCE
    assert bite > 0.05, "the test does not bite"


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_every_layer_is_as_short(any_llava, rows):
    inputs = prompts(rows)
    with foveate.use(any_llava, Forgetful()) as run:
        cache = any_llava(**inputs, use_cache=True).past_key_values
    longest = max(sum(pieces) + 9 * (len(pieces) - 1) for pieces in rows)
    assert [layer.keys.shape[2] for layer in cache.layers] == [longest] * LAYERS
    assert run.record.cache_slots == [longest] * LAYERS
    assert {layer.get_seq_length() for layer in cache.layers} == {inputs["input_ids"].shape[1]}
    assert cache.layers[0].slots is cache.layers[2].slots
    with pytest.raises(CacheError):
        any_llava(input_ids=torch.tensor([[5]] * len(rows)), past_key_values=cache)


@pytest.mark.parametrize("name", ["alone", "after-removal"])
def test_bytes_before_are_those_of_the_whole_cache(any_llava, name):
    """What was in the caches before the cut counts as removed by it, not as never there."""
    inputs = prompts([[5, 7], [3, 2, 4]])
    plain = any_llava(**inputs, use_cache=True).past_key_values
    with foveate.use(any_llava, METHODS[name][0]) as run:
        pruned = any_llava(**inputs, use_cache=True).past_key_values
    told = run.report()["kv_bytes"]
    for cache, said in ((plain, told["before"]), (pruned, told["after"])):
        assert said == sum(held.keys.nbytes + held.values.nbytes for held in cache.layers)


def test_beams_equal_their_rows(any_llava):
    """Beam search reorders what is left."""
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    inputs = prompts([[5, 7], [2, 9]])
    with foveate.use(any_llava, Forgetful()):
        together = any_llava.generate(**inputs, **options)
        for row in range(2):
            alone = any_llava.generate(**row_of(inputs, row), **options)
            assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_a_second_turn_sees_what_is_left(llava):
    """One forward over more text, or token by token: the same states."""
    inputs = prompts([[5, 7]])
    more = torch.tensor([[9, 8, 7, 6]])
    with foveate.use(llava, Forgetful()):
        caches = [llava(**inputs, use_cache=True).past_key_values for _ in range(2)]
        whole = llava(input_ids=more, past_key_values=caches[0]).logits
        steps = [llava(input_ids=more[:, i : i + 1], past_key_values=caches[1]) for i in range(4)]
    torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), whole, atol=3e-5, rtol=0)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("between", [[], [FastV(layer=1)]], ids=["", "fastv"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_labels_reach_later_steps(llava, ordered, between, rows):
    """Through a step of another method, too; the method checks that they are what it gave."""
    with foveate.use(llava, [Labelling(ordered=ordered), *between]) as run:
        out = llava.generate(**prompts(rows), max_new_tokens=2, num_beams=2)
    assert out.shape[0] == len(rows)
    for image in run.kept:
        places = list(image.values())
        assert places[0].tolist() == list(range(3, 36))
        assert sorted(places[-1].tolist()) == [i for i in sorted(places[-2].tolist()) if not i % 2]
