"""Accounts of every family equal what torch counts, tower and projector included."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.measure.account import account, whole
from foveate.measure.conventions import CONVENTIONS
from foveate.methods import FastV, PyramidDrop
from foveate.models import find_family
from tests.conformance.batches import batch_of
from tests.conformance.test_families import layers_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird, Listed

DENSE = CONVENTIONS["dense"]
PIXELS = sorted(name for name, member in MEMBERS.items() if member().pixels(1) is not None)


def counted(model, inputs):
    """FLOPs of all matrix products but those of rotary angles, which accounts leave out."""
    angles, handles = [], []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for module in model.modules():
            if "Rotary" in type(module).__name__:
                before = lambda *_: angles.append(-counter.get_total_flops())  # noqa: E731
                behind = lambda *_: angles.append(counter.get_total_flops())  # noqa: E731
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(behind))
        model(**fresh(inputs), logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() - sum(angles)


def methods_of(name, kind):
    (first, second), early = layers_of(name)
    if kind == "nothing":
        return [EveryThird(1.0)]
    if kind == "pyramiddrop":
        return [PyramidDrop((first, second), (0.5, 0.25), "original")]
    if kind == "fastv":
        return [FastV(early + 1, 0.25)]
    if kind == "pre_llm":
        return [EveryThird(0.3), PyramidDrop((second,), 2, "original")]
    return [Listed(layer=1), EveryThird(0.5)]


@pytest.mark.parametrize("kind", ["nothing", "pyramiddrop", "fastv", "pre_llm", "vision"])
@pytest.mark.parametrize("name", PIXELS)
def test_accounts_equal_what_torch_counts(name, kind):
    member, methods = MEMBERS[name](), methods_of(name, kind)
    model = member.build("eager")  # last: members share configs, and with them the attention
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the counter misses grouped products
    family = find_family(model)
    if kind == "vision" and (family.encoder is None or family.encoder.block is None):
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
    assert want.total == got
    plain = counted(model, inputs)
    assert account(whole(session.record, family.config), family, (), DENSE).total == plain
