"""Encoders that turn the patches of a batch by their places: signals are of what is multiplied."""

from dataclasses import dataclass, field

import pytest
import torch

import foveate
from foveate.core import Keep, Need, Scorer, Step
from foveate.methods import ClsDrop, ToMe
from foveate.signals.projections import Projections
from tests.methods_for_tests import Listed
from tests.vision.encoders import ENCODERS, build, images, row_of

ROWS = {"dinov3_vit": 4, "mlcd": 1}  # before the patches
EARLIER = ("cls_attention", "received_attention")


@dataclass(frozen=True)
class Peek(Scorer):
    """Keep the first patches, 20, 15 and 10; note what it is shown of layer 2, before and after."""

    keep: Keep = (20, 15, 10)
    positions: str | None = None
    seen: dict = field(default_factory=dict)
    slug, stage, needs, paper = "peek", "vision", EARLIER, ""
    step_count = 3

    def check_fields(self):
        pass

    def steps(self, model):
        earlier = tuple(Need(name, (2,)) for name in EARLIER)
        own = (Need("cls_attention", (2,)),)
        return Step("vision", 1), Step("vision", 2, own), Step("vision", 3, earlier)

    def scores(self, tokens):
        self.seen[tokens.number] = tokens.signals
        return -tokens.index.float()


@pytest.fixture(scope="module", params=ROWS)
def shown(request):
    """What a method is shown, the attention maps of the same pass, and rows before the patches."""
    model, inputs, method = build(ENCODERS, request.param, "eager"), images(2), Peek()
    with torch.no_grad(), foveate.use(model, method) as run:
        maps = model(**inputs, output_attentions=True).attentions
        assert [len(kept) for kept in run.kept[0].values()] == [20, 15, 10]
    return method.seen, maps, ROWS[request.param]


def test_signals_of_earlier_layers_are_those_of_their_maps(shown):
    """That the layer was asked ahead, for the step before it, is not noted as what it has done."""
    seen, maps, rows = shown[0][2], shown[1][2], shown[2]
    patches = slice(rows, rows + 15)
    of_class = maps[:, :, 0, patches]
    torch.testing.assert_close(seen["cls_attention"][:, 0], of_class, rtol=1e-4, atol=1e-6)
    received = maps[:, :, : rows + 15, patches].mean((1, 2))
    torch.testing.assert_close(seen["received_attention"][:, 0], received, rtol=1e-4, atol=1e-6)


def test_keys_are_handed_out_without_positions():
    query, key, plain = torch.randn(3, 2, 9, 8)
    of = Projections(query, key, None, 2, 4, plain_key=plain)
    assert torch.equal(of.patch_keys, plain[:, 4:].transpose(1, 2))


def test_a_layer_that_is_about_to_run_gives_the_attention_it_would_have(shown):
    """Of the 20 that it is shown, the 15 that survive have the shares that they have in the map."""
    seen, maps, before = shown[0][1], shown[1][2], shown[2]
    of_class = seen["cls_attention"][:, 0]
    assert of_class.shape[-1] == 20
    rows = maps[:, :, 0, before : before + 15]
    torch.testing.assert_close(
        of_class[..., :15] / of_class[..., :15].sum(-1, keepdim=True),
        rows / rows.sum(-1, keepdim=True),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("method", [ToMe(r=5), Listed(layer=1)], ids=["tome", "before"])
@pytest.mark.parametrize("name", ROWS)
def test_checkpointing_changes_no_gradient(name, method):
    found = []
    for checkpointing in (False, True):
        model = build(ENCODERS, name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # for places that are shifted in training
        with foveate.use(model, method):
            model(**images()).last_hidden_state.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert list(found[0]) == list(found[1])
    for key in found[0]:
        assert found[0][key].isfinite().all()
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_batch_equals_rows(name):
    """Each image is turned by the places of its own patches."""
    model, inputs = build(ENCODERS, name), images(4)
    with foveate.use(model, [ToMe(r=(6, 6)), ClsDrop(layers=(2,), keep=9)]):
        together = model(**inputs).last_hidden_state
        alone = torch.cat([model(**row_of(inputs, row)).last_hidden_state for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("method", [ToMe(r=5), ClsDrop(layers=(1,)), Listed(layer=1)], ids=repr)
@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_half_precision_stays_half(name, method):
    model, pixels = build(ENCODERS, name).bfloat16(), images()["pixel_values"].bfloat16()
    with foveate.use(model, method):
        got = model(pixels).last_hidden_state
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
