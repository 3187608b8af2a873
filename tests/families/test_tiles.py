"""Tiles: what is known of their patches goes where their features go, and padding is left out."""

import pytest
import torch

import foveate
from foveate.core.tokens import Shape
from foveate.families import find_family
from tests.conformance.batches import batch_of
from tests.conformance.zoo import MEMBERS

NEWLINE = -7.0


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_onevision-tiles"])
def test_what_is_known_of_patches_is_packed_as_features_are(name):
    """By the model's own packing; what the projector is given, unless tokens are mixed."""
    member = MEMBERS[name]()
    family, sizes = find_family(member.build()), member.pixels(3)
    tiles = family.tiles(sizes)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(tiles), 5, family.tile_side**2, generator=generator)
    line = torch.full((5,), NEWLINE)
    want = family.packed(rows.mT, line, sizes)
    got = family.per_token("image", rows, sizes, NEWLINE)
    assert all(torch.equal(a, b.T) for a, b in zip(got, want, strict=True))
    assert any((image == line).all(1).any() for image in want)

    given = family.unprojected("image", rows.mT, [len(image) for image in want], sizes)
    want = family.packed(rows.mT, torch.zeros(5), sizes)
    mixed = [image.isnan().all().item() for image in given]
    assert any(mixed) == (name == "llava_onevision")
    for image, plain, mixes in zip(given, want, mixed, strict=True):
        assert image.shape == plain.shape
        assert mixes or torch.equal(image, plain)


def test_newlines_and_ends_get_what_is_said():
    """Of HunyuanVL; other tokens of an image are its cells, in order."""
    member = MEMBERS["hunyuan_vl"]()
    family, given = find_family(member.build()), member.pixels(3)
    cells = [h * w // 4 for _, h, w in given["image_grid_thw"].tolist()]
    rows = [torch.arange(count).expand(2, count).float() for count in cells]
    for number, got in enumerate(family.per_token("image", rows, given, NEWLINE)):
        shape = Shape(got.shape[1], (1, got.shape[1]))
        nowhere = family.boxes("image", number, shape, given).isnan().any(1)
        assert (got[:, nowhere] == NEWLINE).all()
        assert torch.equal(got[:, ~nowhere], rows[number])


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "granite_docling"])
def test_padding_tiles_cost_nothing(name):
    """A record says how many tiles the encoder was fed."""
    member = MEMBERS[name]()
    model = member.build()
    inputs, _ = batch_of(member, model, (2, 0, 1))
    assert inputs["pixel_values"].shape[:2].numel() > 3
    with foveate.use(model, foveate.get_method("random")(keep=0.5)) as session, torch.no_grad():
        model(**inputs)
    fed = session.record.encoded["image"]
    assert fed["pixel_values"].shape == (1, 3, *inputs["pixel_values"].shape[2:])
    if "pixel_attention_mask" in fed:
        assert fed["pixel_attention_mask"].shape == (1, 3)
        assert fed["pixel_attention_mask"].all()
