"""Backbones, and models with dense outputs around them."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BeitBackbone,
    BeitConfig,
    Dinov2Backbone,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    DPTConfig,
    DPTForDepthEstimation,
)

import foveate
from foveate.errors import UnsupportedModelError
from foveate.measure.account import account
from foveate.measure.trace import trace
from foveate.methods import ClsDrop, ToMe
from tests.methods_for_tests import Listed
from tests.vision.dense import DENSE, HIDDEN, STAGES, build, depth_anything, dinov2
from tests.vision.encoders import dinov3

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
    alone.load_state_dict(backbone.state_dict())
    alone.set_attn_implementation("eager")
    with foveate.use(alone, method):
        states = alone(given, output_hidden_states=True).hidden_states
    norm = backbone.norm if hasattr(backbone, "norm") else backbone.layernorm
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
    kind = DINOv3ViTModel if name == "upernet-dinov3" else Dinov2Model
    with torch.no_grad():
        plain = dense(model(given))
        with foveate.use(model, method):
            got = dense(model(given))
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
    model, given = build(DENSE[name]), pixels()
    with torch.no_grad(), foveate.use(model, ToMe(r=5)):
        together = dense(model(given))
        alone = torch.cat([dense(model(row[None])) for row in given])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)


def test_what_is_not_known_is_refused_with_the_reason():
    beit = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32}
    config = BeitConfig(**beit, intermediate_size=64, out_features=STAGES)
    around = build(depth_anything)
    around.backbone = BeitBackbone(config)
    with pytest.raises(UnsupportedModelError, match=r"type 'beit'.* DINOv2 backbone works"):
        foveate.use(around, ToMe())
    own = DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        image_size=48, patch_size=8, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=HIDDEN, fusion_hidden_size=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="has no backbone"):
        foveate.use(DPTForDepthEstimation(own), ToMe())
