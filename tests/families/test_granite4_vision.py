"""Granite Vision 4: features that are added before several decoder layers."""

from dataclasses import dataclass

import pytest
import torch

import foveate
from foveate.core import Method, Reduction, Step
from foveate.core.tokens import Shape
from foveate.engine import features
from foveate.errors import InputError
from foveate.families import find_family
from foveate.methods import DivPrune, PyramidDrop
from foveate.training.prepare import session_of
from tests.conformance.batches import batch_of
from tests.conformance.test_families import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird

MEMBER = MEMBERS["granite4_vision"]()


@dataclass(frozen=True)
class Pairs(Method):
    """Before the language model, merge every two neighbours into their mean."""

    keep: float = 0.5
    positions: str = "renumbered"
    slug, stage, needs, paper = "pairs", "pre_llm", (), ""

    def steps(self, model):
        return (Step("pre_llm"),)

    def reduce(self, tokens, count):
        slot = torch.arange(2 * count).div(2, rounding_mode="floor").expand(len(tokens.index), -1)
        index = torch.arange(0, 2 * count, 2).expand(len(tokens.index), -1)
        return Reduction.mean(index, slot)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[[5, 7]], [[5, 7], [2, 3, 9]]], ids=["one", "ragged"])
def test_tokens_are_merged_in_what_every_layer_is_given(rows):
    """As if the prompt had had the means alone, before each of the layers."""
    model, inputs = model_of("granite4_vision"), MEMBER.inputs(rows)
    with foveate.use(model, Pairs()):
        got = model.model(**fresh(inputs)).last_hidden_state
    image = 0
    for number, pieces in enumerate(rows):
        whole = MEMBER.row(inputs, number)
        ids = whole["input_ids"][0]
        text, kept = ids != MEMBER.image_id, ids != MEMBER.image_id
        kept[(~text).nonzero()[::2, 0]] = True
        output = whole["mm_encoder_outputs"]["image"]
        output.deepstack_features = [
            (layer, [plane.unflatten(0, (-1, 2)).mean(1) for plane in planes])
            for layer, planes in output.deepstack_features
        ]
        short = {"input_ids": ids[None, kept], "mm_encoder_outputs": {"image": output}}
        want = model.model(**short).last_hidden_state[0]
        found = got[number, -len(ids) :][kept]
        torch.testing.assert_close(found, want, rtol=0, atol=5e-5)
        image += len(pieces) - 1
    assert len(MEMBER.stack(inputs)) == image


def test_methods_see_what_is_added_first():
    """Of several features for a layer the model takes the last."""
    seen = torch.randn(2, 16, 64)
    output = MEMBER.output(seen)
    assert torch.equal(torch.stack(features.pooled(output)), seen)
    sheets = features.sheets(output)
    features.put_sheets(
        output, [[image + number for image in s] for number, s in enumerate(sheets)]
    )
    assert torch.equal(torch.stack(features.pooled(output)), seen)
    for sheet, (number, old) in zip(features.sheets(output), enumerate(sheets), strict=True):
        assert torch.equal(torch.stack(sheet), torch.stack(old) + number)


def test_boxes_are_those_of_tiles_of_as_many_tokens():
    """LLaVA-NeXT's tiles of 4 x 4 patches, packed alike, lie where tiles of 4 x 4 tokens do."""
    families = [find_family(model_of(name)) for name in ("granite4_vision", "llava_next")]
    given = MEMBER.pixels(3)
    for number, count in enumerate(MEMBER.counts(model_of("granite4_vision"), given)):
        shape = Shape(count, (1, count))
        got, want = (family.boxes("image", number, shape, given) for family in families)
        torch.testing.assert_close(got, want, equal_nan=True)
        assert got.shape == (count, 4)


@torch.no_grad()
def test_beams_of_rows_with_several_images_are_refused():
    """The installed transformers repeats images A and B as A, A, B, B."""
    model = model_of("granite4_vision")
    options = {"max_new_tokens": 2, "num_beams": 2, "do_sample": False}
    inputs, _ = batch_of(MEMBER, model, (2,))
    refused = pytest.raises(InputError, match="gives the beams of a row different images")
    with foveate.use(model, EveryThird(4)), refused:
        model.generate(**inputs, **options)


@pytest.mark.parametrize("method", [DivPrune(keep=0.25), PyramidDrop((2, 4), (0.5, 0.25))], ids=str)
def test_gradients_reach_every_projector(method):
    model = MEMBERS["granite4_vision"]().build().train()
    inputs, _ = batch_of(MEMBER, model, (2, 0, 1))
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-2] = -100
    foveate.prepare(model, method, head="all")
    try:
        with torch.autograd.set_detect_anomaly(True):
            model(**fresh(inputs), use_cache=False).loss.backward()
    finally:
        session_of(model).remove()
    found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    for part in ("vision_tower", "layerwise_projectors.0", "spatial_projectors.1", "image_newline"):
        assert any(path.startswith(f"model.{part}") for path in found), part
    for path, gradient in found.items():
        assert bool(gradient.isfinite().all()), path
