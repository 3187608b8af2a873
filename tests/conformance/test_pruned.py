"""Models whose weights were pruned: accounts follow their layers, and methods work as before."""

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import get_method
from foveate.engine.planning import working_methods
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account, unpruned
from foveate.methods import YOPO, PyramidDrop, ToMe
from tests.conformance.batches import batch_of
from tests.conformance.cells import settings
from tests.conformance.test_accounts import methods_of
from tests.conformance.test_method_accounts import DENSE, apart, errors, run
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.pruned import cut_heads, cut_mlps
from tests.vision.encoders import ENCODERS

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")
FIRST = {"cosmos3_edge": "mlp.fc1"}  # of decoder layers
BOTH_TOWERS = ("llava", "llava-siglip")


def built(name):
    member = MEMBERS[name]()
    model = member.build("eager")
    inputs, _ = batch_of(member, model, (2,))
    return model, inputs, find_family(model)


def cut(name):
    """A model with another width in each layer, and fewer heads in some."""
    model, inputs, family = built(name)
    left = [96 - 7 * n for n in range(family.text_layers)]
    if name == "phi4_multimodal":  # it takes the number of heads from the config
        cut_fused(family.layers, left)
        return model, inputs
    cut_mlps(model, inputs, family.layers, FIRST.get(name, "mlp.gate_proj"), left)
    cut_heads(family.layers[1].self_attn, [0, 1], "o_proj")  # all that read their keys
    cut_heads(family.layers[3].self_attn, [1, 2], "o_proj")
    if name in BOTH_TOWERS:
        *seen, _ = family.encoder.layers  # the last is not read
        cut_mlps(model, inputs, seen, "mlp.fc1", [61 - 9 * n for n in range(len(seen))])
        for layer in family.encoder.layers:
            cut_heads(layer.self_attn, [1], "out_proj")
    return model, inputs


def cut_fused(layers, left):
    """Where one matrix makes neurons and their gates."""
    for layer, count in zip(layers, left, strict=True):
        gone = list(range(count, 96))
        both = [*gone, *(96 + n for n in gone)]
        tp.prune_linear_out_channels(layer.mlp.gate_up_proj, both)
        tp.prune_linear_in_channels(layer.mlp.down_proj, gone)


@pytest.mark.parametrize("name", BOTH_TOWERS)
def test_every_method_costs_what_torch_counts(name):
    """But for CATP, which reads all heads of two layers, and these have not as many."""
    model, inputs = cut(name)
    plain, wrong = run(model, inputs, ()), {}
    for slug in set(working_methods(find_family(model))) - {"catp", "yopo"}:
        off = errors(model, inputs, [settings(get_method(slug))], plain)
        if any(off):
            wrong[slug] = off
    assert not wrong
    heads = tuple((True, False, True, True)[: 2 if n in (1, 3) else 4] for n in range(6))
    assert errors(model, inputs, [YOPO(1, heads=heads, ffn_factor=1.7, layer=4)], plain) == (0,) * 4


@pytest.mark.parametrize("name", ["cosmos3_edge", "gemma3", "phi4_multimodal", "qwen2_vl"])
def test_accounts_of_pruned_families_equal_what_torch_counts(name):
    model, inputs = cut(name)
    plain = run(model, inputs, ())
    for kind in ("fastv", "pre_llm", "pyramiddrop"):
        assert errors(model, inputs, methods_of(name, kind), plain) == (0,) * 4


def test_the_same_report_says_less_once_weights_are_pruned():
    model, inputs, family = built("llava")

    def said():
        with torch.no_grad(), foveate.use(model, "fastv") as session:
            model(**fresh(inputs), logits_to_keep=1)
        return session.report()["flops"]

    whole = said()
    cut_mlps(model, inputs, family.layers, "mlp.gate_proj", [48] * 6)
    halved = said()
    saved = 6 * 2 * 3 * 64 * 48 * inputs["input_ids"].numel()
    assert whole["before"] - halved["before"] == saved
    assert whole["vision"] == halved["vision"]


@pytest.mark.parametrize("name", ["deit", "vit"])
def test_a_pruned_encoder_costs_what_torch_counts(name):
    """Its MLPs are halved, then its tokens merged; without merging all is equal to the bit."""
    model, inputs = encoder_of(name)
    cut_mlps(model, inputs, model.layers, "mlp.fc1", [32] * 4)
    for layer in model.layers[:2]:
        cut_heads(layer.attention, [2], "o_proj")
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        with foveate.use(model, ToMe(r=0)):
            assert torch.equal(model(**inputs).last_hidden_state, plain)
    for method in (ToMe(r=5), get_method("cls-drop")(layers=(2,), keep=0.5)):
        check_encoder(model, inputs, method)


def test_layers_that_were_taken_out_of_the_encoder_do_not_count():
    model, inputs = encoder_of("vit")
    del model.layers[-1]
    check_encoder(model, inputs, ToMe(r=5))


def encoder_of(name):
    torch.manual_seed(0)
    model = ENCODERS[name]().eval()
    model.set_attn_implementation("eager")
    return model, {"pixel_values": torch.rand(2, 3, 48, 48)}


def check_encoder(model, inputs, method):
    family, (plain, _) = find_family(model), count(model, inputs)
    with foveate.use(model, method) as session:
        got, spent = count(model, inputs, method)
    assert account(session.record, family, [method], DENSE).total == got - spent
    assert account(unpruned(session.record), family, (), DENSE).total == plain
    assert got < plain


def count(model, inputs, *methods):
    """FLOPs of an encoder, and those of what methods compute themselves."""
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        apart(counter, methods, ()) as spent,
    ):
        model(**inputs)
    return counter.get_total_flops(), sum(spent)


@pytest.mark.parametrize("method", ["pyramiddrop", "tome", "visionzip"])
def test_keeping_all_changes_no_bit_of_a_pruned_model(method):
    model, inputs = cut("llava")
    kept = {"pyramiddrop": PyramidDrop((2,), 1.0, "original"), "tome": ToMe(keep=1.0)}
    with torch.no_grad():
        plain = model(**fresh(inputs)).logits
        with foveate.use(model, kept.get(method) or get_method(method)(keep=1.0)):
            assert torch.equal(model(**fresh(inputs)).logits, plain)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("qwen3_vl_moe", "mlp.experts"),
        ("glm4v_moe", "mlp.shared_experts.down_proj"),
        ("qwen3_5", "linear_attn.out_proj"),
    ],
)
def test_what_was_pruned_and_cannot_be_counted_is_refused(name, path):
    model, inputs, family = built(name)
    with torch.no_grad(), foveate.use(model, get_method("divprune")(0.5)) as session:
        model(**fresh(inputs))
    found = {n: dict(layer.named_modules()).get(path) for n, layer in enumerate(family.layers)}
    layer, module = next((n, module) for n, module in found.items() if module is not None)
    part = "weight" if isinstance(module, nn.Linear) else "down_proj"
    less = getattr(module, part).detach()[..., :-8].clone()
    setattr(module, part, nn.Parameter(less))
    with pytest.raises(UnsupportedModelError, match=f"of decoder layer {layer} has the shape"):
        session.report()
