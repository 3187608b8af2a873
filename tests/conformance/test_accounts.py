"""Accounts of every family equal what torch counts, tower and projector included."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.engine.planning import make_plan
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account, unpruned
from foveate.measure.conventions import CONVENTIONS
from foveate.measure.flops import head_flops, kv_bytes, state_bytes
from foveate.measure.memory import cache_bytes
from foveate.measure.planned import planned
from foveate.measure.shapes import TextShape
from foveate.methods import FastV, PyramidDrop
from tests.conformance.batches import batch_of
from tests.conformance.test_families import layers_of, model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird, Forgetful, Listed

DENSE = CONVENTIONS["dense"]
PIXELS = sorted(name for name, member in MEMBERS.items() if member().pixels(1) is not None)


def counted(model, inputs):
    """FLOPs of all matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**fresh(inputs), logits_to_keep=1)
    return counter.get_total_flops()


def methods_of(name, kind):
    (first, second), early = layers_of(name)
    if kind == "nothing":
        return [EveryThird(1.0)]
    if kind == "pyramiddrop":
        return [PyramidDrop((first, second), (0.5, 0.25), "original")]
    if kind == "fastv":
        return [FastV(early + 1, 0.25)]
    if kind == "forgetful":
        return [Forgetful(second, 0.25)]
    if kind == "pre_llm":
        return [EveryThird(0.3), PyramidDrop((second,), 2, "original")]
    return [Listed(layer=1), EveryThird(0.5)]


@pytest.mark.parametrize("kind", ["pyramiddrop", "forgetful", "pre_llm"])
@pytest.mark.parametrize("name", [n for n in PIXELS if MEMBERS[n].modality == "image"])
def test_planned_cache_bytes_equal_the_cache(name, kind):
    """Also where the prompt is longer than the windows of layers."""
    member, model = MEMBERS[name](), model_of(name)
    inputs, _ = batch_of(member, model, (1,))
    family, methods = find_family(model), methods_of(name, kind)
    fed = member.batch(member.pixels(1), [1])
    text = int((inputs["input_ids"] != member.image_id).sum())
    if kind == "forgetful" and family.recurrent_layers:
        with pytest.raises(UnsupportedModelError, match="running state"):
            make_plan(family, methods)
        return
    record = planned(family, make_plan(family, methods), fed, text)
    with torch.no_grad():
        plain = model(**fresh(inputs), **member.cached(model)).past_key_values
        with foveate.use(model, methods):
            pruned = model(**fresh(inputs), **member.cached(model)).past_key_values
    mixers = [shape.mixer for shape in TextShape.all(family.config)]
    windows = any(getattr(m, "window", None) or getattr(m, "chunk", None) for m in mixers)
    for want, cache in ((unpruned(record), plain), (record, pruned)):
        held, state = cache_bytes(cache)
        assert state_bytes(family.config, 1, torch.float32) == state
        counted = kv_bytes(family.config, want.cache_slots, 1, torch.float32)
        if windows and want.evicted_before:  # what of a window is forgotten depends on the tokens
            assert counted >= held
        else:
            assert counted == held


@pytest.mark.parametrize("kind", ["nothing", "pyramiddrop", "fastv", "pre_llm", "vision"])
@pytest.mark.parametrize("name", PIXELS)
def test_accounts_equal_what_torch_counts(name, kind):
    member, methods = MEMBERS[name](), methods_of(name, kind)
    # last: members share configs, and with them the attention
    model = member.build("eager").requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the counter misses grouped products
    family = find_family(model)
    if kind == "vision" and (family.encoder is None or family.mixing("image", {})):
        pytest.skip("methods cannot act inside this encoder")
    inputs, _ = batch_of(member, model, (2,))
    session = foveate.use(model, methods)
    try:
        with session:
            got = counted(model, inputs)
    except foveate.FoveateError:
        assert kind == "vision"  # tokens of some images and videos are interpolated
        return
    want = account(session.record, family, methods, DENSE)
    assert want.tower is not None
    more = 0
    if not member.cuts_logits:
        more = head_flops(TextShape.of(family.config), inputs["input_ids"].shape[1] - 1)
    assert want.total + more == got
    plain = counted(model, inputs)
    assert account(unpruned(session.record), family, (), DENSE).total + more == plain
