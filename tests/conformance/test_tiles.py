"""Images that are cut into tiles: tokens' boxes lie in the image, whoever cut it.

A bright patch in a blank image, cut by the family's image processor, changes the tokens whose
boxes show it. Processors without a Pillow backend are stood in for by what they say they do.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import foveate
from foveate.errors import InputError
from foveate.families import find_family
from foveate.record.tiles import Tiling, in_image, match_grid
from tests.conformance.test_patches import local_model
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.towers import SIDE
from tests.methods_for_tests import EveryThird

NAMES = [
    "aya_vision", "cohere2_vision", "idefics3", "internvl", "ovis2", "perception_lm", "smolvlm",
]  # fmt: skip
SIZES = [(2 * SIDE, 3 * SIDE), (3 * SIDE, SIDE), (SIDE, 2 * SIDE)]  # height, width
GRIDS = [(2, 3), (3, 1), (1, 2)]
PATCHES = [(0.5, 0.25, 0.75, 0.5), (0.25, 0.5, 1, 0.75), (0, 0.5, 0.25, 1)]
SQUARE = {"height": SIDE, "width": SIDE}
OPENING, BREAK, DOUBLE = 60, 61, 62  # ids of Idefics3's tokens around tiles
FLIPPED = [grid[::-1] for grid in GRIDS]  # Ovis2's processor takes rows for columns, and scales
START, GRID, COLUMN, ROW, END = 85, 86, 87, 88, 89  # Ovis2's indicators, as its zoo member has them


def picture(size, patch):
    """An image with a bright patch, or without; shaded, so that no two parts are alike."""
    height, width = size
    down, across = np.mgrid[:height, :width]
    pixels = np.stack([40 + 20 * down / height, 40 + 20 * across / width, 50 + 0 * down], -1)
    if patch is not None:
        left, top, right, bottom = patch
        rows = slice(round(top * height), round(bottom * height))
        pixels[rows, round(left * width) : round(right * width)] = (255, 10, 120)
    return Image.fromarray(pixels.astype(np.uint8))


def cut_here(image):
    """Tiles in raster order, and the thumbnail."""
    rows, columns = image.height // SIDE, image.width // SIDE
    corners = [(SIDE * c, SIDE * r) for r in range(rows) for c in range(columns)]
    tiles = [image.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
    tensors = [
        torch.from_numpy(np.array(tile, dtype=np.float32)).permute(2, 0, 1)
        for tile in [*tiles, image.resize((SIDE, SIDE))]
    ]
    return torch.stack(tensors[:-1]) / 64, tensors[-1][None] / 64


def cut(name, images):
    """What the encoder eats."""
    plain = {"do_normalize": False, "rescale_factor": 1 / 64, "return_tensors": "pt"}
    if name in ("internvl", "aya_vision"):
        given = GotOcr2ImageProcessorPil(size=SQUARE)(images, crop_to_patches=True, **plain)
        return {"pixel_values": given["pixel_values"].float()}
    if name == "ovis2":
        given = Ovis2ImageProcessorPil(size=SQUARE)(images, crop_to_patches=True, **plain)
        assert [tuple(grid) for grid in given["grids"].tolist()] == FLIPPED[: len(images)]
        return {"pixel_values": given["pixel_values"].float()}
    if name in ("idefics3", "smolvlm"):
        kind = Idefics3ImageProcessorPil if name == "idefics3" else SmolVLMImageProcessorPil
        samples = []
        for image in images:  # without scaling: the longest edge is the image's own
            processor = kind(
                size={"longest_edge": max(image.size)}, max_image_size={"longest_edge": SIDE}
            )
            samples.append(processor([image], **plain)["pixel_values"][0])
        return {"pixel_values": torch.cat(samples)[None].float()}
    pairs = [cut_here(image) for image in images]
    first = name == "perception_lm"
    tiles = torch.cat([torch.cat(pair[::-1] if first else pair) for pair in pairs])
    return {"pixel_values": tiles[None] if first else tiles}


def prompt_of(name, grids):
    """Ids of text with images cut into so many tiles, as the family's processor writes them."""
    member, ids = MEMBERS[name](), [5, 7, 11]
    tile = [member.image_id] * member.visual
    for rows, columns in [grid[::-1] for grid in grids] if name == "ovis2" else grids:
        count = rows * columns
        if name in ("internvl", "perception_lm"):
            ids += [70, *tile * (count + 1), 71]
        elif name == "aya_vision":
            ids += [70, *(i for n in range(count) for i in [40 + n, *tile]), 59, *tile, 71]
        elif name == "cohere2_vision":
            ids += [70, *[*tile, 72] * (count + 1), 71]
        elif name == "ovis2":
            row = tile + [i for _ in range(columns - 1) for i in [COLUMN, *tile]]
            ids += [START, *tile, GRID, *row, *(i for _ in range(rows - 1) for i in [ROW, *row])]
            ids += [END]
        else:
            for r in range(rows):
                for c in range(columns):
                    ids += [OPENING, 20 + 6 * r + c, *tile]
                ids += [BREAK] if r < rows - 1 else [DOUBLE]
            ids += [OPENING, 19, *tile, OPENING]
        ids += [8, 9]
    ids = torch.tensor([ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **member.extras(ids, 1)}


def changes(model, blank, bright):
    """(tiles, V) change of every token's features."""
    with torch.no_grad():
        old, new = (
            model.model.get_image_features(**fresh(given), return_dict=True).pooler_output
            for given in (blank, bright)
        )
    if not isinstance(old, torch.Tensor):
        old, new = torch.cat(list(old)), torch.cat(list(new))
    return (new - old).norm(dim=-1).reshape(-1, MEMBERS["internvl"].visual)


@pytest.mark.parametrize("name", NAMES)
def test_the_patch_is_found_in_the_image(name):
    model, inputs = local_model(name), prompt_of(name, GRIDS)
    blank = cut(name, [picture(size, None) for size in SIZES])
    bright = cut(name, [picture(*pair) for pair in zip(SIZES, PATCHES, strict=True)])
    with torch.no_grad(), foveate.use(model, EveryThird(4)) as run:
        model.model(**inputs, **fresh(bright))
    images = run.record.images
    counts = [rows * columns + 1 for rows, columns in GRIDS]
    assert [image.tile for image in images] == [
        (n, count) for count in counts for n in range(count)
    ]
    assert all(image.whole for image in images)
    listed = run.report()["images"]
    assert [entry["tile"] for entry in listed] == [list(image.tile) for image in images]
    assert {entry["boxes_in"] for entry in listed} == {"image"}
    parts = zip(PATCHES, torch.arange(sum(counts)).split(counts), strict=True)
    change = changes(model, blank, bright)
    for patch, tiles in parts:
        patch = torch.tensor(patch)
        boxes = torch.cat([images[i].boxes for i in tiles])
        low, high = torch.maximum(boxes[:, :2], patch[:2]), torch.minimum(boxes[:, 2:], patch[2:])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        share = (high - low).clamp(min=0).prod(1) / area
        torch.testing.assert_close(area.sum(), torch.tensor(2.0))
        here = change[tiles].flatten()
        fine = area < 0.9 / 16  # thumbnails are resampled, which blurs edges
        if name != "ovis2":
            assert torch.equal(here[fine] > 1e-3 * here.max(), share[fine] > 1e-3)
        assert here[share > 0.99].min() > 0.2 * here.max()
        assert share[here.argmax()] > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_images_are_drawn_whole_or_by_their_tiles(name):
    model, inputs = local_model(name), prompt_of(name, GRIDS)
    pictures = [picture(*pair) for pair in zip(SIZES, PATCHES, strict=True)]
    with torch.no_grad(), foveate.use(model, EveryThird(4)) as run:
        model.model(**inputs, **cut(name, pictures))
        strips = run.show(pictures)
        tiles = [picture((SIDE, SIDE), None)] * len(run.record.images)
        assert len(run.show(tiles)) == len(tiles)
        with pytest.raises(InputError, match=r"had 3 images, cut into 14 tiles, but show got 2"):
            run.show(pictures[:2])
    assert len(strips) == len(pictures)
    assert strips[0].width > strips[1].width, "the shapes of the images"


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_one_tile_is_whole(name):
    model, member = local_model(name), MEMBERS[name]()
    ids = torch.tensor([[5, OPENING, 19, *[member.image_id] * member.visual, OPENING, 6, 7]])
    given = cut(name, [picture(SIZES[0], None)])["pixel_values"]
    one = given[:, :1] if given.dim() == 5 else given[:1]
    inputs = {"input_ids": ids, **member.extras(ids, 1), "pixel_values": one}
    with torch.no_grad(), foveate.use(model, EveryThird(4)) as run:
        model.model(**inputs)
    (image,) = run.record.images
    assert (image.tile, image.whole) == ((0, 1), True)


@pytest.mark.parametrize("name", ["internvl", "aya_vision"])
def test_tiles_of_a_flat_image_say_that_they_are_not_arranged(name):
    """Nothing tells 2 x 3 from 3 x 2; only the thumbnail is of the whole image."""
    model, inputs = local_model(name), prompt_of(name, [(2, 3)])
    flat = [Image.new("RGB", (3 * SIDE, 2 * SIDE), "grey")]
    with torch.no_grad(), foveate.use(model, EveryThird(4)) as run:
        model.model(**inputs, **cut(name, flat))
    images = run.record.images
    assert [image.tile for image in images] == [(n, 7) for n in range(7)]
    assert [image.whole for image in images] == [False] * 6 + [True]
    assert run.report()["images"][0]["boxes_in"] == "tile"
    assert images[0].boxes[0].tolist() == [0, 0, 0.25, 0.25]
    with pytest.raises(InputError, match=r"7 tiles.*how they are arranged; pass the tiles"):
        run.show(flat)
    assert len(run.show([Image.new("RGB", (SIDE, SIDE))] * 7)) == 7


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "ovis2"])
@pytest.mark.parametrize("grid", [(2, 3), (1, 4), (4, 1), (1, 2), (3, 1)])
def test_some_prompts_say_how_tiles_are_arranged(name, grid):
    """Two images next to each other, the second of the same tiles the other way round."""
    inputs, member = prompt_of(name, [grid, grid[::-1]]), MEMBERS[name]()
    ids = inputs["input_ids"][0].tolist()
    starts = [n for n in range(1, len(ids)) if ids[n] == 90 and ids[n - 1] != 90]
    spans = [(start, start + member.visual) for start in starts]
    count = grid[0] * grid[1] + 1
    order = -1 if name == "ovis2" else 1
    want = [Tiling(count, grid[::order]), Tiling(count, grid[::-order])]
    assert find_family(local_model(name)).tilings(ids, spans) == want


def test_prompts_without_ids_do_not_say_which_tiles_belong_together():
    spans = [(3, 19), (20, 36), (40, 56)]
    assert find_family(local_model("idefics3")).tilings(None, spans) == [Tiling(3)]
    assert find_family(local_model("aya_vision")).tilings(None, spans) == [Tiling(3)]
    cohere = find_family(local_model("cohere2_vision"))
    assert cohere.tilings(None, spans) == [Tiling(2), Tiling(1)]


@pytest.mark.parametrize("grid", [(1, 4), (2, 2), (4, 1), (3, 4), (12, 1)])
def test_tiles_are_matched_with_their_thumbnail(grid):
    generator = torch.Generator().manual_seed(0)
    rows, columns = grid
    coarse = torch.rand(3, 4 * rows, 4 * columns, generator=generator)
    whole = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    tiles = whole.view(3, rows, 32, columns, 32).permute(1, 3, 0, 2, 4).flatten(0, 1)
    small = torch.nn.functional.interpolate(whole[None], (32, 32), mode="area")[0]
    assert match_grid(tiles, small) == grid
    assert match_grid(torch.ones_like(tiles), torch.ones(3, 32, 32)) is None
    assert match_grid(tiles, torch.rand(3, 32, 32, generator=generator)) is None, "another image"


def test_boxes_of_a_tile_are_moved_into_the_image():
    boxes = torch.tensor([[0.0, 0.5, 0.5, 1.0]])
    assert in_image(boxes, 5, (2, 4)).tolist() == [[0.25, 0.75, 0.375, 1.0]]
