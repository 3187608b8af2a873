"""Accounts of every method equal what torch counts, and KV bytes those of the cache."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import Reduction, get_method
from foveate.core.budget import per_request
from foveate.engine.planning import working_methods
from foveate.families import find_family
from foveate.measure.account import account, unpruned
from foveate.measure.conventions import CONVENTIONS
from foveate.measure.memory import cache_bytes
from foveate.methods import DART, LVLMCSP, YOPO, FastV, PyramidDrop, SparseVLM, VisionZip
from tests.conformance.batches import batch_of
from tests.conformance.cells import settings
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import readers_methods

DENSE = CONVENTIONS["dense"]
HEADS = ((True,) * 4, (True, False, False, True), (True, True, False, False)) * 2
COUNTED = (
    "llava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "gemma3", "llava_next_video-video",
    "deepseek_vl_hybrid",
)  # fmt: skip
VARIANTS = {
    "yopo: heads of one group, and a part of a neuron": [
        YOPO(3, heads=HEADS, ffn_factor=1.7, layer=4)
    ],
    "yopo: no head in one layer": [YOPO(heads=((False,) * 4, *HEADS[1:]), layer=2)],
    "yopo: as released": [YOPO(1, heads=HEADS, as_released=True)],
    "yopo: all near, of fewer tokens": [PyramidDrop((1,), 0.6, "original"), YOPO(99, layer=5)],
    "lvlm-csp: moved": [LVLMCSP(reentry="moved", select="random", keep=(0.5, 0.25))],
    "lvlm-csp: phases that touch": [LVLMCSP(layers=(1, 2, 3))],
    "sparsevlm: version 2": [SparseVLM(version=2)],
    "sparsevlm: by rank": [SparseVLM(rank=1.0)],
    "sparsevlm after others": [get_method("random")(keep=0.5), SparseVLM(keep=(0.4, 0.3, 0.2))],
    "dart: as released": [DART(as_released=True, image_pivots=1, text_pivots=1, keep=0.5)],
    "visionzip and what it leaves": [VisionZip(keep=0.5), FastV(keep=0.25)],
    "a drop that drops nothing": [PyramidDrop((1, 2, 4), (8, 8, 2))],
    "two at one layer": [PyramidDrop((2,), 0.5), FastV(layer=3, keep=8)],
    "two steps before one layer": [FastV(layer=3, keep=12), PyramidDrop((3, 4), (0.5, 0.25))],
    "the second removes nothing": [FastV(layer=3, keep=4), PyramidDrop((3,), 1.0)],
    "the second no longer removes": [FastV(layer=3, keep=4), PyramidDrop((3,), 8)],
    "two requests": [FastV(layer=3, keep=per_request([4])), PyramidDrop((3,), 1.0)],
}


@contextmanager
def apart(counter, methods, learned):
    """Sum up what methods compute of their signals, and merging and its undoing, which accounts
    leave out; but not what they have learned, which accounts count.
    """
    spent, inside = [], []

    def counted(forward):
        def call(*args, **kwargs):
            before = counter.get_total_flops()
            result = forward(*args, **kwargs)
            spent.append(before - counter.get_total_flops())
            return result

        return call

    def wrapped(function):
        def call(*args, **kwargs):
            before = counter.get_total_flops()
            inside.append(True)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    spent.append(counter.get_total_flops() - before)

        return call

    names = ("reduce", "reduce_each", "reinsert", "links", "scores")
    owners = [(type(m), name) for m in methods for name in names if hasattr(m, name)]
    owners += [(Reduction, name) for name in ("apply", "then", "recover")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in {*owners}:
            patch.setattr(owner, name, wrapped(getattr(owner, name)))
        for module in learned:
            patch.setattr(module, "forward", counted(module.forward))
        yield spent


def run(model, inputs, methods, learned=()):
    """FLOPs of a prompt but for what is computed apart, and bytes of its cache.

    The kernel that layers in parts ask for is taken apart into products, which the counter sees.
    """
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        apart(counter, methods, learned) as spent,
    ):
        cache = model(**fresh(inputs), logits_to_keep=1, use_cache=True).past_key_values
    held, _ = cache_bytes(cache)
    return counter.get_total_flops() - sum(spent), held


def errors(model, inputs, methods, plain):
    """How far an account and KV bytes are off, with methods and without."""
    family = find_family(model)
    with foveate.use(model, methods) as session:
        got, held = run(model, inputs, methods, session.learned.values())
    after = account(session.record, family, methods, DENSE).total
    before = account(unpruned(session.record), family, (), DENSE).total
    stored = session.report()["kv_bytes"]
    return after - got, before - plain[0], stored["after"] - held, stored["before"] - plain[1]


def prompt_of(name):
    """A model with two images in one row, and what it costs with all tokens."""
    member = MEMBERS[name]()
    model = member.build("eager")
    inputs, _ = batch_of(member, model, (2,))
    return model, inputs, run(model, inputs, ())


@pytest.mark.parametrize("name", COUNTED)
def test_every_method_costs_what_torch_counts(name):
    model, inputs, plain = prompt_of(name)
    works = working_methods(find_family(model))
    assert name != "llava" or set(works) == set(readers_methods())
    wrong = {}
    for slug in works:
        off = errors(model, inputs, [settings(get_method(slug))], plain)
        if slug == "tome" and find_family(model).encoder.packed is not None:
            # Once merged tokens count as often as they have sources, segments are padded to the
            # longest, and padding counts nowhere.
            assert off[0] < 0
            off = off[1:]
        if any(off):
            wrong[slug] = off
    assert not wrong


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_cost_what_torch_counts(variant, name):
    model, inputs, plain = prompt_of(name)
    if name == "qwen2_vl" and "visionzip" in variant:
        model, inputs, plain = prompt_of("internvl")
    assert errors(model, inputs, VARIANTS[variant], plain) == (0, 0, 0, 0)
