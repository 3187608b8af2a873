"""Backbones, and models with dense outputs around them."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BeitBackbone,
    BeitModel,
    ConvNextBackbone,
    ConvNextConfig,
    Dinov2Backbone,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    SwinBackbone,
    SwinConfig,
)

import foveate
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.measure.trace import trace
from foveate.methods import ClsDrop, ToMe
from tests.methods_for_tests import Listed
from tests.vision.dense import DENSE, OWN, STAGES, beit, build, depth_anything, dinov2
from tests.vision.encoders import dinov3

ENCODERS = {
    "beit": partial(BeitModel, add_pooling_layer=False),
    "dinov2": Dinov2Model,
    "dinov3_vit": DINOv3ViTModel,
}
METHODS = {
    "tome": ToMe(r=5),
    "cls-drop": ClsDrop(layers=(1,), keep=10),
    "before": Listed(layer=2),
}


def pixels(height=48, width=48):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def dense(output):
    return output.predicted_depth if "predicted_depth" in output else output.logits


REGISTERS = 2
BACKBONES = {
    "beit": (BeitBackbone, ENCODERS["beit"], beit),
    "dinov2": (Dinov2Backbone, Dinov2Model, dinov2),
    "registers": (
        Dinov2WithRegistersBackbone,
        Dinov2WithRegistersModel,
        partial(dinov2, Dinov2WithRegistersConfig, num_register_tokens=REGISTERS),
    ),
    "dinov3": (DINOv3ViTBackbone, DINOv3ViTModel, partial(dinov3, out_features=STAGES)),
}


def maps_by_hand(backbone, kind, method, given):
    """Feature maps cut by plain code from the states of the encoder alone, merged or dropped in."""
    alone = kind(backbone.config).eval()
    alone.load_state_dict(getattr(backbone, "beit", backbone).state_dict())
    alone.set_attn_implementation("eager")
    with foveate.use(alone, method):
        states = alone(given, output_hidden_states=True).hidden_states
    norm = getattr(backbone, "layernorm", getattr(backbone, "norm", torch.nn.Identity()))
    maps = [norm(states[number]) for number in (1, 2, 3, 4)]
    rows, columns = given.shape[-2] // 8, given.shape[-1] // 8
    patches = [of[:, -rows * columns :] for of in maps]
    if not backbone.config.reshape_hidden_states:
        return patches if kind is DINOv3ViTModel else maps
    return [of.unflatten(1, (rows, columns)).permute(0, 3, 1, 2) for of in patches]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
@pytest.mark.parametrize("reshaped", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_feature_maps_are_those_of_the_states_at_full_length(name, reshaped, size, method):
    kind, encoder, config = BACKBONES[name]
    backbone = build(lambda: kind(config(reshape_hidden_states=reshaped)))
    given = pixels(*size)
    with torch.no_grad():
        plain = backbone(given).feature_maps
        with foveate.use(backbone, method) as run:
            got = backbone(given).feature_maps
            assert run.record.images[0].grid == (size[0] // 8, size[1] // 8)
            assert run.record.pixels.shape == given.shape
        want = maps_by_hand(backbone, encoder, method, given)
        again = backbone(given).feature_maps
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert (got[-1] - plain[-1]).abs().max() > 0.1
    assert all(map(torch.equal, again, plain))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", DENSE)
def test_dense_outputs_are_those_of_the_plain_neck_and_head(name, method, monkeypatch):
    model, given = build(DENSE[name]), pixels()
    with torch.no_grad():
        plain = dense(model(given))
        with foveate.use(model, method):
            got = dense(model(given))
        kind = ENCODERS[model.backbone.config.model_type]
        maps = maps_by_hand(model.backbone, kind, method, given)
        output = model.backbone(given)
        output.feature_maps = tuple(maps)
        monkeypatch.setattr(model.backbone, "forward_with_filtered_kwargs", lambda *a, **k: output)
        want = dense(model(given))
    assert got.shape == plain.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (got - plain).abs().max() > 1e-3, "the test does not bite"


@pytest.mark.parametrize("method", [ToMe(r=0), ToMe(keep=1.0), Listed(keep=1.0)])
@pytest.mark.parametrize("name", DENSE)
def test_keeping_everything_changes_no_bit(name, method):
    model, given = build(DENSE[name]), pixels()
    with torch.no_grad():
        want = dense(model(given))
        with foveate.use(model, method):
            got = dense(model(given))
    assert torch.equal(got, want)


def test_states_and_attention_maps_are_returned_at_full_length():
    model, given = build(depth_anything), pixels()
    with torch.no_grad(), foveate.use(model, ToMe(r=5)):
        out = model(given, output_hidden_states=True, output_attentions=True)
        depth, states, maps = model(
            given, output_hidden_states=True, output_attentions=True, return_dict=False
        )
    assert {of.shape[1] for of in out.hidden_states} == {37}
    assert {tuple(of.shape[-2:]) for of in out.attentions} == {(37, 37)}
    assert torch.equal(depth, out.predicted_depth)
    assert all(map(torch.equal, states, out.hidden_states))
    assert all(map(torch.equal, maps, out.attentions))


@pytest.mark.parametrize("method", [None, Listed(layer=0), Listed(layer=2, inside=True)])
def test_predicted_flops_of_the_backbone_equal_the_ones_torch_counts(method):
    model, given = build(depth_anything), pixels()
    with foveate.use(model, method or Listed(keep=1.0)) as run, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model.backbone(given)
        assert account(run.record, run.family, run.methods).total == counter.get_total_flops()
    traced = trace(run.family, "image", {"pixel_values": given})
    patches = 2 * given.numel() * model.backbone.config.hidden_size
    assert traced.embedding == patches


@pytest.mark.parametrize("name", DENSE)
def test_batch_equals_rows(name):
    """In double precision, as convolutions of heads amplify rounding."""
    model, given = build(DENSE[name]).double(), pixels().double()
    with torch.no_grad(), foveate.use(model, ToMe(r=5)):
        together = dense(model(given))
        alone = torch.cat([dense(model(row[None])) for row in given])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_other_backbones_are_refused_with_the_reason():
    around = build(depth_anything)
    around.backbone = SwinBackbone(
        SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1])
    )
    with pytest.raises(UnsupportedModelError, match=r"type 'swin'.*: its layers cut a map"):
        foveate.use(around, ToMe())
    around.backbone = ConvNextBackbone(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(UnsupportedModelError, match=r"type 'convnext'.* DINOv2 and BEiT work"):
        foveate.use(around, ToMe())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", OWN)
def test_dense_outputs_around_an_own_encoder_are_those_of_the_plain_neck_and_head(name, method):
    model, given = build(OWN[name]), pixels()
    alone = find_family(model).base
    with torch.no_grad():
        plain = dense(model(given))
        with foveate.use(model, ToMe(r=0)):
            kept = dense(model(given))
        with foveate.use(model, method):
            got = dense(model(given))
            rows = torch.cat([dense(model(row[None])) for row in given])
        with foveate.use(alone, method):
            states = list(alone(given, output_hidden_states=True).hidden_states[1:])
            taken = [states[number] for number in model.config.backbone_out_indices]
        want = neck_and_head(model, taken)
    assert torch.equal(kept, plain)
    assert got.shape == plain.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (got - rows).abs().max() < 5e-6 * plain.abs().max()  # the neck alone differs by as much
    assert (got - plain).abs().max() > 1e-3, "the test does not bite"


def neck_and_head(model, states):
    """What a plain DPT makes of the states of four layers."""
    return model.head(model.neck(states, None, None))
