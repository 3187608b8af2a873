"""Reports of every family: predicted FLOPs and bytes against what torch counts and caches hold."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.measure import flops
from tests.conformance.test_families import case, model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh


def cached_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("kind", ["pyramiddrop", "forgetful", "pre_llm"])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_cache_bytes_equal_the_cache(name, kind):
    member, model = MEMBERS[name](), model_of(name)
    inputs = member.inputs([[5, 7]])
    with torch.no_grad():
        whole = cached_bytes(model(**fresh(inputs), use_cache=True).past_key_values)
        with foveate.use(model, case(name, kind, 1)[0]) as run:
            pruned = cached_bytes(model(**fresh(inputs), use_cache=True).past_key_values)
    report = run.report()
    assert report["kv_bytes"]["before"] == whole
    assert report["kv_bytes"]["after"] == pruned < whole
    assert report["flops"]["after"] < report["flops"]["before"]
    assert str(report)
    uncounted = any("not counted" in note for note in report["notes"])
    assert uncounted == (report["flops"]["vision"] is None)


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_prefill_flops_equal_the_counted_ones(name):
    """All but routers and rotary embeddings, which are below one percent."""
    member = MEMBERS[name]()
    model = member.build("eager")
    model.set_experts_implementation("eager")  # the counter misses grouped products
    inputs = member.inputs([[5, 7]])
    tokens = inputs["input_ids"].shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**fresh(inputs), logits_to_keep=1)
    layers = len(member.text(model).layers)
    want = flops.prefill_flops(model.config, [[tokens]] * layers, causal=False)
    if not member.some_logits:
        want += flops.head_flops(flops.TextShape.of(model.config), tokens - 1)
    assert counter.get_total_flops() == pytest.approx(want, rel=0.01)
