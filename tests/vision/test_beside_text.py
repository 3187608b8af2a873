"""Encoders beside text: what is made of their rows is what is made of the same rows by hand."""

import pytest
import torch

import foveate
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.methods import ClsDrop, ToMe
from tests.methods_for_tests import Listed
from tests.vision.beside_text import MODELS, build, words
from tests.vision.encoders import images

METHODS = {
    "tome": ToMe(r=5),
    "cls-drop": ClsDrop(layers=(1,), keep=10),
    "before": Listed(layer=2),
}
MADE = ("logits", "pred_boxes", "class_embeds", "logits_per_image", "image_embeds")


def made(model, inputs):
    """All that heads and decoders make of an image."""
    output = model(**inputs)
    return {name: output[name] for name in MADE if name in output}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_heads_read_all_rows(name, method, monkeypatch):
    """They make of the rows what they make of those that the encoder alone returns."""
    model, inputs = build(MODELS[name]), {**images(), **words(3)}
    tower = find_family(model).encoder.tower
    whole = made(model, inputs)
    with foveate.use(model, method):
        got = made(model, inputs)
    with foveate.use(tower, method):
        alone = tower(inputs["pixel_values"], output_hidden_states=True)
    assert {states.shape[1] for states in alone.hidden_states} == {37}
    monkeypatch.setattr(tower, "forward", lambda *args, **kwargs: alone)
    want = made(model, inputs)
    assert list(got) == list(whole)
    assert got
    for key in got:
        assert got[key].shape == whole[key].shape
        torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-6)
        assert (got[key] - whole[key]).abs().max() > 1e-3, "the test does not bite"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_keeping_everything_changes_no_bit(name):
    model, inputs = build(MODELS[name]), {**images(), **words(3)}
    want = made(model, inputs)
    with foveate.use(model, ToMe(r=0)):
        got = made(model, inputs)
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ["owlvit", "owlv2"])
@torch.no_grad()
def test_an_image_guides_detection(name):
    """Both images pass the encoder; the one that guides first."""
    model, inputs = build(MODELS[name]), images(2)["pixel_values"]
    query = inputs.flip(0)
    with foveate.use(model, ToMe(r=5)) as run:
        got = model.image_guided_detection(inputs, query)
        rows = [model.image_embedder(part)[0] for part in (inputs, query)]
    assert len(run.record.images) == 2
    assert torch.equal(got.image_embeds, rows[0])
    assert torch.equal(got.query_image_embeds, rows[1])


@torch.no_grad()
def test_an_image_guides_segmentation():
    model, inputs = build(MODELS["clipseg"]), images(2)["pixel_values"]
    with foveate.use(model, ToMe(r=5)):
        got = model(pixel_values=inputs, conditional_pixel_values=inputs.flip(0))
        embeds = model.clip.get_image_features(inputs.flip(0)).pooler_output
    assert torch.equal(got.conditional_embeddings, embeds)
    assert got.logits.shape == (2, 48, 48)


@pytest.mark.parametrize("name", MODELS)
def test_text_encoders_are_left_alone(name):
    model = build(MODELS[name])
    with pytest.raises(UnsupportedModelError, match="encoder alone"):
        foveate.use(model, "divprune")
    text = [module for key, module in model.named_modules() if "text_model" in key]
    with foveate.use(model, ToMe(r=5)):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in text)
