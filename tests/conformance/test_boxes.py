"""The place of every visual token: boxes lie where the processor put the pixels."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

import foveate
from foveate.core.tokens import Shape
from foveate.families import find_family
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import NAMES, model_of, prompt
from tests.conformance.test_pixels_grids import VIDEO
from tests.conformance.test_pixels_grids import model_of as on_grids_model
from tests.conformance.test_pixels_grids import prompt as prompt_on_grids
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.llava_next import PINPOINTS, SIZES
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.towers import SIDE
from tests.methods_for_tests import EveryThird

PATCHED = ("gemma4", "gemma4_unified", "lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6",
           "minicpmv4_7")  # fmt: skip
FULL = 250  # what the last pixel of a ramp holds


def ramps(height, width):
    """An image whose red says how far right, and whose green how far down a pixel is."""
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    planes = np.stack((across, down, np.zeros((height, width))), -1) * FULL
    return Image.fromarray(planes.round().astype(np.uint8))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_boxes_of_tiled_images_lie_where_the_processor_put_them(name):
    """Centres of boxes are where the ramps in each token's patch say it was in the image."""
    kind = LlavaNextImageProcessorPil if name == "llava_next" else LlavaOnevisionImageProcessorPil
    square = {"height": SIDE, "width": SIDE}
    processor = kind(
        size=square, crop_size=square, image_grid_pinpoints=PINPOINTS, do_rescale=False,
        do_normalize=False,
    )  # fmt: skip
    model, member = model_of(name), MEMBERS[name]()
    given = processor([ramps(*size) for size in SIZES], return_tensors="pt")
    pixels = {k: given[k] for k in ("pixel_values", "image_sizes")}
    pixels["pixel_values"] = pixels["pixel_values"].float()
    family, counts = find_family(model), member.counts(model, pixels)
    tiles = [image[:n] for image, n in zip(pixels["pixel_values"], (5, 4, 3), strict=True)]
    patches = torch.cat(tiles)[:, :2].unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(2) / FULL
    if name == "llava_next":  # by the value of the features, not by a second packing
        noisy = {**pixels, "pixel_values": member.pixels(3)["pixel_values"]}
        seen = [member.class_scores(model, noisy, patches[:, axis]) for axis in (0, 1)]
        seen = [torch.stack(pair, -1) for pair in zip(*seen, strict=True)]
    else:
        seen, _ = model.model.pack_image_features(
            patches.transpose(1, 2).split((5, 4, 3)), pixels["image_sizes"],
            image_newline=torch.full((2,), -torch.inf), vision_aspect_ratio="anyres_max_2",
        )  # fmt: skip
    for number, (count, centre) in enumerate(zip(counts, seen, strict=True)):
        boxes = family.boxes("image", number, Shape(count, (1, count)), pixels)
        assert boxes.shape == (count, 4)
        assert torch.equal(boxes[:, 0].isnan(), centre[:, 0].isinf())
        assert boxes.isnan().any(0).all(), "there are newline tokens"
        sides = boxes[:, 2:] - boxes[:, :2]
        whole = (boxes[:, :2] > 1e-3).all(1) & (boxes[:, 2:] < 1 - 1e-3).all(1)
        middle = (boxes[:, :2] + boxes[:, 2:])[whole] / 2
        assert whole[:16].sum() == 4, "the thumbnail's inner cells"
        assert whole[16:].sum() >= 2, "cells of tiles"
        assert ((middle - centre[whole]).abs() < 0.15 * sides[whole]).all()


@pytest.mark.parametrize("name", [name for name in NAMES if MEMBERS[name].placed])
def test_every_visual_token_has_a_box(name):
    """Boxes lie within the image and cover it: once, or a second time with tiles, or by frames.

    Unpadding takes away whole rows of patches, and with them up to a quarter of these images.
    """
    inputs, counts = prompt(name)
    with torch.no_grad(), foveate.use(model_of(name), EveryThird(1)) as run:
        model_of(name)(**fresh(inputs))
    for image, count in zip(run.record.images, counts, strict=True):
        boxes = image.boxes
        assert boxes.shape == (count, 4)
        known = boxes[~boxes[:, 0].isnan()]
        assert len(known) > count // 2
        assert ((known >= 0) & (known <= 1)).all()
        area = (known[:, 2:] - known[:, :2]).prod(1)
        assert (area > 0).all()
        covered = area.sum().item()
        assert math.ceil(covered - 0.01) - covered < 0.26


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", PATCHED)
def test_patches_are_not_taken_for_images(name, images):
    """Also where there are as many tensors of patches as images."""
    model, member = model_of(name), MEMBERS[name]()
    inputs, _ = batch_of(member, model, (images,))
    with torch.no_grad(), foveate.use(model, EveryThird(1)) as run:
        model(**fresh(inputs))
    assert len(run.record.images) == images
    assert run.record.pixels is None


@pytest.mark.parametrize(
    ("name", "what"), [*((name, None) for name in NAMES), *((name, "video") for name in VIDEO)]
)
def test_methods_are_shown_the_cells_that_boxes_are_of(name, what):
    """Frame, row and column of every token that has a place in a grid."""
    shown = []

    class Spy(EveryThird):
        def reduce(self, tokens, count):
            at = torch.cat((tokens.frame[..., None], tokens.coordinates), -1)
            shown.extend((tokens.frames, *tokens.grid, cells) for cells in at)
            return super().reduce(tokens, count)

    model = on_grids_model(name) if what else model_of(name)
    inputs = prompt_on_grids(name, what)[0] if what else prompt(name)[0]
    with torch.no_grad(), foveate.use(model, Spy(1)) as run:
        model(**fresh(inputs))
    assert len(shown) == len(run.record.images)
    video = what == "video" or name.endswith("-video")
    for image in run.record.images:
        grid = (image.frames, *image.grid)
        where = next(at for *seen, at in shown if tuple(seen) == grid and len(at) == image.total)
        assert (image.frames > 1) == video
        assert torch.equal(where[:, 0], image.frame)
        if 1 in image.grid:  # a row of tiles, or after a class token
            continue
        _, height, width = grid
        cells = where[:, 1:].flip(-1) / torch.tensor([width, height])
        placed = ~image.boxes[:, 0].isnan()
        assert placed.sum() == image.frames * height * width
        torch.testing.assert_close(image.boxes[placed, :2], cells[placed])


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("sizes", [None, [SIZES[0], SIZES[0]]])
def test_tokens_made_elsewhere_have_a_place_only_if_it_is_known(name, sizes):
    """Sixteen hand-made features of each image are not what a large image is encoded to."""
    inputs, model = MEMBERS[name]().inputs([[3, 4, 5]]), find_family(model_of(name)).model
    given = {} if sizes is None else {"image_sizes": torch.tensor(sizes)}
    with torch.no_grad(), foveate.use(model, EveryThird(4)) as run:
        model.model(**fresh(inputs), **given)
    assert [image.boxes.isnan().all() for image in run.record.images] == [True, True]
    assert run.report().kept[1]["pre_llm"][1] == {"index": 3, "box": None}


def test_beams_have_the_boxes_of_their_images():
    """Each image of a row has its own boxes, in every beam and in copies of a record."""
    model, (inputs, counts) = model_of("llava_next"), prompt("llava_next")
    options = {"num_beams": 2, "max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    with torch.no_grad(), foveate.use(model, EveryThird(4)) as run:
        model.model(**fresh(inputs))
        copied = pickle.loads(pickle.dumps(run.record))
        once = [image.boxes for image in copied.images]
        model.generate(**fresh(inputs), **options)
        twice = [image.boxes for image in run.record.images]
    assert [len(boxes) for boxes in once] == counts
    for got, want in zip(twice, 2 * once, strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
