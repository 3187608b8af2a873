"""Models that torchao has quantised: accounts are those of the same layers in full precision."""

import copy

import pytest
import torch

import foveate
from foveate.core import get_method
from foveate.engine.planning import working_methods
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account, unpruned
from foveate.measure.memory import cache_bytes, weight_bytes
from foveate.methods import FastV, PyramidDrop, ToMe, VisionZip
from tests.conformance.batches import batch_of
from tests.conformance.cells import settings
from tests.conformance.test_method_accounts import DENSE, errors, run
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.pruned import cut_mlps

torchao = pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.sparsity import apply_fake_sparsity  # noqa: E402

KINDS = {
    "int8 weights": lambda model: quantize_(model, Int8WeightOnlyConfig()),
    "int8 weights and activations": lambda model: quantize_(
        model, Int8DynamicActivationInt8WeightConfig()
    ),
    "int4 weights": lambda model: quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    # As dense tensors with zeros: torch packs them on CUDA alone.
    "two of four weights": apply_fake_sparsity,
}


@pytest.fixture(params=KINDS)
def models(request):
    """LLaVA, the same quantised, and a prompt."""
    member = MEMBERS["llava"]()
    plain = member.build("eager")
    inputs, _ = batch_of(member, plain, (2,))
    model = copy.deepcopy(plain)
    KINDS[request.param](model)
    return plain, model, inputs


def test_every_method_runs_and_costs_what_it_does_in_full_precision(models):
    """Layers in parts slice plain weights, which those that are quantised are not."""
    plain, model, inputs = models
    family, wrong, cost = find_family(model), {}, run(plain, inputs, ())[0]
    for slug in set(working_methods(family)) - {"yopo"}:
        method = settings(get_method(slug))
        with foveate.use(model, method) as session:
            _, held = run(model, inputs, [method])
        got = session.record
        whole = account(unpruned(got), family, (), DENSE).total
        same = account(got, family, [method], DENSE)
        want = account(got, find_family(plain), [method], DENSE)
        if same != want or whole != cost or session.report()["kv_bytes"]["after"] != held:
            wrong[slug] = same, want, whole, cost
    assert not wrong


def test_keeping_all_changes_no_bit(models):
    _, model, inputs = models
    with torch.no_grad():
        want = model(**fresh(inputs)).logits
        for method in (PyramidDrop((2,), 1.0, "original"), ToMe(keep=1.0), VisionZip(keep=1.0)):
            with foveate.use(model, method):
                assert torch.equal(model(**fresh(inputs)).logits, want)


def test_layers_in_parts_are_refused_by_name():
    member = MEMBERS["llava"]()
    model = member.build("eager")
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedModelError, match="load unquantized weights"):
        foveate.use(model, "yopo")


def test_weights_are_as_large_as_they_are_stored():
    linear = torch.nn.Linear(128, 256)
    assert weight_bytes(linear) == (128 + 1) * 256 * 4
    quantize_(linear, Int8WeightOnlyConfig())
    weight = linear.weight
    scales = weight.scale.nbytes + weight.zero_point.nbytes
    assert weight_bytes(linear) == 128 * 256 + scales + 256 * 4


def test_pruned_and_quantised_layers_cost_what_the_pruned_ones_do():
    member = MEMBERS["llava"]()
    model = member.build("eager")
    inputs, _ = batch_of(member, model, (2,))
    cut_mlps(model, inputs, find_family(model).layers, "mlp.gate_proj", [40] * 6)
    plain = run(model, inputs, ())
    assert errors(model, inputs, [FastV(3, 0.25)], plain) == (0,) * 4
    before = weight_bytes(model)
    quantize_(model, Int8WeightOnlyConfig())
    with foveate.use(model, FastV(3, 0.25)) as session, torch.no_grad():
        cache = model(**fresh(inputs)).past_key_values
    whole = account(unpruned(session.record), session.family, (), DENSE)
    assert whole.total == plain[0]
    assert session.report()["kv_bytes"]["after"] == cache_bytes(cache)[0]
    assert weight_bytes(model) < before / 2
