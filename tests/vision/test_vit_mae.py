"""ViT-MAE: patches are masked and shuffled before the encoder, and a decoder reads all rows."""

import pytest
import torch
from PIL import Image
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import foveate
from foveate.errors import InputError
from foveate.methods import ClsDrop, ToMe
from foveate.record.boxes import cells
from tests.methods_for_tests import Listed
from tests.vision import oracle
from tests.vision.encoders import MASKED, build, images
from tests.vision.oracle import Drop, Merge

CASES = {
    "tome": (ToMe(r=5), [Merge(layer, 5) for layer in range(4)]),
    "cls-drop": (ClsDrop(layers=(1,), keep=10), [Drop(1, 10)]),
}


@pytest.fixture(scope="module")
def model():
    return build({"mae": lambda: ViTMAEForPreTraining(ViTMAEConfig(**MASKED))}, "mae")


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_decoder_reads_all_rows(model, case):
    """Those of the oracle at full length: merged ones repeated, dropped ones filled."""
    inputs, (method, steps) = images(name="vit_mae"), CASES[case]
    plain = model.vit(**inputs, output_hidden_states=True)
    with foveate.use(model, method):
        got = model(**inputs)
    rows = []
    for full in oracle.run(model.vit, 1, plain.hidden_states[0], steps):
        last, patches = model.vit.layernorm(full.x), full.alive.clone()
        patches[:1] = False
        rows.append(torch.where(full.alive[:, None], last, last[patches].mean(0)))
    want = model.decoder(torch.stack(rows), plain.ids_restore).logits
    torch.testing.assert_close(got.logits, want, rtol=0, atol=2e-5)
    without = model(**inputs)
    assert (got.logits - without.logits).abs().max() > 1e-2
    assert (got.loss - without.loss).abs() > 1e-4
    assert torch.equal(got.mask, without.mask)


@torch.no_grad()
def test_keeping_everything_changes_no_bit(model):
    inputs = images(name="vit_mae")
    with foveate.use(model, ToMe(r=0)):
        got = model(**inputs)
    assert torch.equal(got.logits, model(**inputs).logits)


@torch.no_grad()
def test_noise_says_where_tokens_lie(model):
    inputs = images(2, name="vit_mae")
    with foveate.use(model, Listed(layer=1)) as run:
        model(**inputs)
    for image, noise in zip(run.record.images, inputs["noise"], strict=True):
        assert image.grid == (1, 36)
        assert torch.equal(image.boxes, cells(12, 12)[noise.argsort()[:36]])
    drawn = run.show([Image.new("RGB", (96, 96))] * 2)
    assert drawn[0].width > 2 * 300


@torch.no_grad()
def test_without_noise_it_is_not_known_where_tokens_lie(model):
    pixels = images(1, name="vit_mae")["pixel_values"]
    with foveate.use(model, Listed(layer=1)) as run:
        model(pixels)
    assert run.record.images[0].boxes.isnan().all()
    assert run.report()["images"][0]["boxes"] == [None] * 36
    with pytest.raises(InputError, match="noise"):
        run.show(Image.new("RGB", (96, 96)))


@torch.no_grad()
def test_without_a_mask_patches_are_still_shuffled(model, monkeypatch):
    monkeypatch.setattr(model.config, "mask_ratio", 0.0)
    inputs = images(1, name="vit_mae")
    with foveate.use(model, Listed(layer=1)) as run:
        model(**inputs)
    (image,) = run.record.images
    assert (image.total, image.grid) == (144, (1, 144))
    assert torch.equal(image.boxes, cells(12, 12)[inputs["noise"][0].argsort()])
