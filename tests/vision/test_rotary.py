"""Encoders that turn the patches of a batch by their places: signals are of what is multiplied."""

from dataclasses import dataclass, field

import pytest
import torch

import foveate
from foveate.core import Keep, Need, Scorer, Step
from foveate.signals.projections import Projections
from tests.vision.encoders import ENCODERS, build, images

ROWS = 4  # before the patches
EARLIER = ("cls_attention", "received_attention")


@dataclass(frozen=True)
class Peek(Scorer):
    """Keep the first patches, 20, 15 and 10; note what it is shown of layers 1 and 2."""

    keep: Keep = (20, 15, 10)
    positions: str | None = None
    seen: dict = field(default_factory=dict)
    slug, stage, needs, paper = "peek", "vision", EARLIER, ""
    step_count = 3

    def check_fields(self):
        pass

    def steps(self, model):
        earlier = tuple(Need(name, (1,)) for name in EARLIER)
        own = (Need("cls_attention", (2,)),)
        return Step("vision", 1), Step("vision", 2, own), Step("vision", 3, earlier)

    def scores(self, tokens):
        self.seen[tokens.number] = tokens.signals
        return -tokens.index.float()


@pytest.fixture(scope="module")
def shown():
    """What a method is shown, and the attention maps of the same pass."""
    model, inputs, method = build(ENCODERS, "dinov3_vit", "eager"), images(2), Peek()
    with torch.no_grad(), foveate.use(model, method) as run:
        maps = model(**inputs, output_attentions=True).attentions
        assert [len(kept) for kept in run.kept[0].values()] == [20, 15, 10]
    return method.seen, maps


def test_signals_of_earlier_layers_are_those_of_their_maps(shown):
    seen, maps = shown[0][2], shown[1][1]
    patches = slice(ROWS, ROWS + 15)  # those that are left, of the 20 that layer 1 had
    of_class = maps[:, :, 0, patches]
    torch.testing.assert_close(seen["cls_attention"][:, 0], of_class, rtol=1e-4, atol=1e-6)
    received = maps[:, :, : ROWS + 20, patches].mean((1, 2))
    torch.testing.assert_close(seen["received_attention"][:, 0], received, rtol=1e-4, atol=1e-6)


def test_keys_are_handed_out_without_positions():
    query, key, plain = torch.randn(3, 2, ROWS + 5, 8)
    of = Projections(query, key, None, 2, ROWS, plain_key=plain)
    assert torch.equal(of.patch_keys, plain[:, ROWS:].transpose(1, 2))


def test_a_layer_that_is_about_to_run_gives_the_attention_it_would_have(shown):
    """Of the 20 that it is shown, the 15 that survive have the shares that they have in the map."""
    seen, maps = shown[0][1], shown[1][2]
    of_class = seen["cls_attention"][:, 0]
    assert of_class.shape[-1] == 20
    rows = maps[:, :, 0, ROWS : ROWS + 15]
    torch.testing.assert_close(
        of_class[..., :15] / of_class[..., :15].sum(-1, keepdim=True),
        rows / rows.sum(-1, keepdim=True),
        rtol=1e-4,
        atol=1e-6,
    )
