"""Quantised layers: a projection is called, never read."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveate
from foveate.core import get_method
from foveate.errors import UnsupportedModelError
from foveate.methods import YOPO
from tests.conformance.batches import batch_of
from tests.conformance.cells import settings
from tests.conformance.test_families import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import readers_methods
from tests.tinies import prompts, tiny_llava


class Hidden(nn.Module):
    """Computes what a linear layer does, of which it shows nothing: as GPTQ and AWQ layers."""

    def __init__(self, linear):
        super().__init__()
        self.inner = [copy.deepcopy(linear)]

    def forward(self, x):
        return self.inner[0](x)


class Packed(Hidden):
    """Its weight is packed in bytes, as bitsandbytes does it."""

    def __init__(self, linear):
        super().__init__(linear)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None


class Integers(Hidden):
    """Its weight has the shape of the plain one, but other values."""

    def __init__(self, linear):
        super().__init__(linear)
        self.register_buffer("weight", torch.ones_like(linear.weight, dtype=torch.int8))


class Opaque(Hidden):
    """Its weight is no tensor."""

    def __init__(self, linear):
        super().__init__(linear)
        self.weight = object()


class Called(Hidden):
    """Its weight is a method, as in `torch.ao`."""

    def weight(self):
        """What nobody should ask for."""
        raise AssertionError("a weight was read")

    bias = weight


class Sub(nn.Linear):
    """A linear layer by inheritance, with a weight that only its own forward understands."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.inner = [copy.deepcopy(linear)]
        self.weight = nn.Parameter(
            torch.ones_like(self.weight, dtype=torch.int8), requires_grad=False
        )

    def forward(self, x):
        return self.inner[0](x)


def replaced(linear):
    """A plain linear layer whose forward was replaced, and whose weight is another one now."""
    made, inner = copy.deepcopy(linear), copy.deepcopy(linear)
    made.weight.data.zero_()
    made.forward = inner.forward
    return made


class Disguised(Tensor):
    """A weight that only `linear` understands, as torchao's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].inner, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


def disguised(linear):
    """A plain linear layer with such a weight."""
    made = copy.deepcopy(linear)
    weight = torch.zeros_like(linear.weight).as_subclass(Disguised)
    weight.inner = linear.weight.detach().clone()
    made._parameters["weight"] = weight
    return made


def low_bits(linear):
    """A plain linear layer with a weight in integers, and a forward for that."""
    made = replaced(linear)
    made.weight = nn.Parameter(torch.ones_like(made.weight, dtype=torch.int8), requires_grad=False)
    return made


KINDS = {
    "hidden": Hidden,
    "packed": Packed,
    "integers": Integers,
    "opaque": Opaque,
    "called": Called,
    "sub": Sub,
    "replaced": replaced,
    "low bits": low_bits,
    "disguised": disguised,
}


def quantised(model, kind):
    """A copy of a model whose linear layers are all of a kind, but those in heads that pool."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        if isinstance(parent, nn.MultiheadAttention | Sub | Hidden):
            continue
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and "forward" not in vars(child):
                setattr(parent, name, kind(child))
    return model


FEW = ("fastv", "sparsevlm", "visionzip", "llava-prumerge")


@pytest.fixture(scope="module")
def plain():
    return tiny_llava()


def outcome(model, method, inputs):
    """Logits of two steps, survivors and report of a session."""
    steps = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    with foveate.use(model, method) as run:
        out = model.generate(
            **fresh(inputs), **steps, output_logits=True, return_dict_in_generate=True
        )
        kept = [{e: i.tolist() for e, i in image.items()} for image in run.kept]
        return torch.stack(out.logits), kept, dict(run.report())


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_does_on_quantised_layers_what_it_does_on_plain_ones(plain, kind):
    model, inputs = quantised(plain, KINDS[kind]), prompts([[4, 5, 3], [6, 2]])
    for slug in readers_methods() if kind in ("called", "sub") else FEW:
        method = settings(get_method(slug))
        if isinstance(method, YOPO):
            continue
        logits, kept, report = outcome(plain, method, inputs)
        got, mine, told = outcome(model, method, inputs)
        torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)
        assert mine == kept, slug
        assert told == report, slug


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "molmo2", "aya_vision", "internvl-norms"])
def test_so_it_is_on_other_families(name):
    member, model = MEMBERS[name](), model_of(name)
    inputs, _ = batch_of(member, model, (2,))
    for kind in ("called", "packed"):
        other = quantised(model, KINDS[kind])
        for slug in ("fastv", "pyramiddrop", "sparsevlm", "dart", "feather", "visionzip"):
            method = settings(get_method(slug))
            try:
                logits, kept, report = outcome(model, method, inputs)
            except foveate.FoveateError:
                continue
            got, mine, told = outcome(other, method, inputs)
            torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)
            assert (mine, told) == (kept, report), slug


@pytest.mark.parametrize("part", ["q_proj", "o_proj", "gate_proj", "down_proj"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_would_be_sliced_are_refused(plain, kind, part):
    """Each projection by itself: its weight would be read, and not understood."""
    model = copy.deepcopy(plain)
    layer = model.model.language_model.layers[2]
    module = layer.mlp if part in ("gate_proj", "down_proj") else layer.self_attn
    setattr(module, part, KINDS[kind](getattr(module, part)))
    with pytest.raises(UnsupportedModelError, match=rf"{part} .*sliced"):
        foveate.use(model, YOPO(layer=4))


def test_norms_without_a_weight_of_their_own():
    """Norms of queries and keys of which nothing shows are taken to be over each head."""
    plain = model_of("qwen3_vl")
    member = MEMBERS["qwen3_vl"]()
    model = copy.deepcopy(plain)
    for layer in model.model.language_model.layers:
        for name in ("q_norm", "k_norm"):
            setattr(layer.self_attn, name, Hidden(getattr(layer.self_attn, name)))
    inputs, _ = batch_of(member, plain, (1,))
    method = settings(get_method("fastv"))
    assert torch.equal(outcome(model, method, inputs)[0], outcome(plain, method, inputs)[0])


def test_attention_without_projections_says_so(plain):
    """As fused modules are."""
    model = copy.deepcopy(plain)
    attention = model.model.language_model.layers[1].self_attn
    projections = [attention.q_proj, attention.k_proj]
    del attention.q_proj, attention.k_proj

    def fused(hidden_states, **kwargs):
        attention.q_proj, attention.k_proj = projections
        try:
            return type(attention).forward(attention, hidden_states, **kwargs)
        finally:
            del attention.q_proj, attention.k_proj

    attention.forward = fused
    with (
        torch.no_grad(),
        foveate.use(model, settings(get_method("fastv"))),
        pytest.raises(UnsupportedModelError, match=r"no k_proj|no q_proj"),
    ):
        model(**prompts([[4, 5]]))


def test_layers_that_torch_quantises(plain):
    """`torch.ao` quantises activations by their range, so that survivors may differ; all runs."""
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, torch.qint8)
    inputs = prompts([[4, 5]])
    for slug in readers_methods():
        method = settings(get_method(slug))
        if isinstance(method, YOPO):
            with pytest.raises(UnsupportedModelError, match="sliced"):
                foveate.use(model, method)
            continue
        _, kept, report = outcome(plain, method, inputs)
        logits, mine, told = outcome(model, method, inputs)
        assert logits.isfinite().all()
        if not method.adaptive:
            assert [{e: len(i) for e, i in image.items()} for image in mine] == [
                {e: len(i) for e, i in image.items()} for image in kept
            ]
            assert told["flops"] == report["flops"]
