"""Reports of every family: predicted FLOPs and bytes against what torch counts and caches hold."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.measure import flops
from foveate.measure.memory import cache_bytes
from tests.conformance.test_families import case, model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh


@pytest.mark.parametrize("kind", ["pyramiddrop", "forgetful", "pre_llm"])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_cache_bytes_equal_the_cache(name, kind):
    member, model = MEMBERS[name](), model_of(name)
    inputs, methods = member.inputs([[5, 7]]), case(name, kind, 1)[0]
    if kind == "forgetful" and find_family(model).recurrent_layers:
        with pytest.raises(UnsupportedModelError, match="running state"):
            foveate.use(model, methods)
        return
    with torch.no_grad():
        whole, _ = cache_bytes(model(**fresh(inputs), **member.cached(model)).past_key_values)
        with foveate.use(model, methods) as run:
            pruned, state = cache_bytes(
                model(**fresh(inputs), **member.cached(model)).past_key_values
            )
    report = run.report()
    assert report["state_bytes"] == state
    assert ("state of recurrent layers" in str(report)) == (state > 0)
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
    with torch.no_grad(), FlopCounterMode(display=False) as of_images:
        member.encode_again(model, inputs)
    family = find_family(model)
    seen = [[tokens if n <= family.last_llm_layer else 1] for n in range(family.text_layers)]
    visual = [[min(member.visual, row[0] - 1)] for row in seen]
    want = flops.prefill_flops(model.config, seen, visual, causal=False)
    if not member.cuts_logits:
        want += flops.head_flops(flops.TextShape.of(model.config), tokens - 1)
    want += of_images.get_total_flops()
    assert counter.get_total_flops() == pytest.approx(want, rel=0.01)
