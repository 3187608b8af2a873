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

pytestmark = pytest.mark.torchao
KINDS = (
    "int8 weights", "int8 weights and activations", "int4 weights", "two of four weights",
)  # fmt: skip


def quantise(model, kind="int8 weights"):
    """Quantise a model in place; where torchao is not installed, this fails."""
    from torchao import quantization, sparsity

    if kind == "two of four weights":  # as dense tensors with zeros: torch packs them on CUDA alone
        return sparsity.apply_fake_sparsity(model)
    config = {
        "int8 weights": quantization.Int8WeightOnlyConfig,
        "int8 weights and activations": quantization.Int8DynamicActivationInt8WeightConfig,
        "int4 weights": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[kind]()
    return quantization.quantize_(model, config)


@pytest.fixture(params=KINDS)
def models(request):
    """LLaVA, the same quantised, and a prompt."""
    member = MEMBERS["llava"]()
    plain = member.build("eager")
    inputs, _ = batch_of(member, plain, (2,))
    model = copy.deepcopy(plain)
    quantise(model, request.param)
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
    quantise(model)
    with pytest.raises(UnsupportedModelError, match="load unquantized weights"):
        foveate.use(model, "yopo")


def test_weights_are_as_large_as_they_are_stored():
    linear = torch.nn.Linear(128, 256)
    assert weight_bytes(linear) == (128 + 1) * 256 * 4
    quantise(linear)
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
    quantise(model)
    with foveate.use(model, FastV(3, 0.25)) as session, torch.no_grad():
        cache = model(**fresh(inputs)).past_key_values
    whole = account(unpruned(session.record), session.family, (), DENSE)
    assert whole.total == plain[0]
    assert session.report()["kv_bytes"]["after"] == cache_bytes(cache)[0]
    assert weight_bytes(model) < before / 2
