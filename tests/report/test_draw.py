"""Kept tokens are drawn where they are in the image, whatever the processor did to it."""

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from foveate.errors import InputError
from foveate.record.boxes import cells
from foveate.record.record import ImageRecord, Record
from foveate.record.tiles import TokenBoxes
from foveate.report.draw import draw_kept, show, show_stages
from foveate.report.geometry import match_geometry, place_grid
from foveate.report.panels import GAP, stack
from tests.records import image, pyramid_record

GRID = (4, 4)
RED = (220, 30, 30)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful image without symmetry."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 255, (6, 7, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def seen_by_encoder(image: Image.Image, geometry: str) -> torch.Tensor:
    """(3, 64, 64) as a CLIP processor set up for that geometry would make it."""
    if geometry == "pad":
        image = place_grid(image, "pad")[0]
    crop = geometry == "crop"
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 64} if crop else {"height": 64, "width": 64},
        crop_size={"height": 64, "width": 64},
        do_center_crop=crop,
    )
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("size", [(320, 200), (200, 320), (640, 480)])
@pytest.mark.parametrize("geometry", ["resize", "crop", "pad"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_geometry_is_recognised(geometry, size, seed):
    image = picture(*size, seed)
    assert match_geometry(image, seen_by_encoder(image, geometry)) == geometry


@pytest.mark.parametrize("size", [(320, 200), (200, 320), (640, 480)])
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255)])
def test_padding_may_have_any_colour(colour, size):
    image = picture(*size)
    square = Image.new("RGB", (max(size), max(size)), colour)
    square.paste(image, ((square.width - size[0]) // 2, (square.height - size[1]) // 2))
    assert match_geometry(image, seen_by_encoder(square, "resize")) == "pad"


@pytest.mark.parametrize("size", [(1000, 8), (3, 400)])
def test_thin_images_can_be_drawn(size):
    thin = picture(*size)
    match_geometry(thin, seen_by_encoder(thin, "resize"))
    for geometry in ("resize", "crop", "pad"):
        assert max(draw_kept(thin, (24, 24), {"llm:2": [0, 575]}, geometry).size) < 3000


def test_square_image_is_resized():
    assert match_geometry(picture(50, 50), torch.rand(3, 32, 32)) == "resize"


@pytest.mark.parametrize("cell", [0, 3, 6, 12, 15])
def test_only_kept_cells_keep_their_colour(cell):
    strip = draw_kept(Image.new("RGB", (128, 128), RED), GRID, {"llm:2": [cell]})
    for other in range(16):
        row, column = divmod(other, 4)
        at = (GAP + 320 + GAP + 80 * column + 40, GAP + 80 * row + 40)
        assert (strip.getpixel(at) == RED) == (other == cell)


def test_crop_marks_what_the_model_never_saw():
    """The grid of a wide image covers its central square; the sides are dark in every panel."""
    strip = draw_kept(Image.new("RGB", (200, 100), RED), GRID, {"pre_llm": list(range(16))}, "crop")
    left = GAP + 640 + GAP
    sides = [strip.getpixel((left + x, 170)) for x in (20, 620)]
    assert all(sum(colour) < 0.4 * sum(RED) for colour in sides)
    assert strip.getpixel((left + 320 + 40, 170)) == RED


def test_pad_draws_the_padded_square():
    canvas, box = place_grid(Image.new("RGB", (200, 100), RED), "pad")
    assert canvas.size == (200, 200)
    assert box == (0, 0, 200, 200)
    assert canvas.getpixel((100, 100)) == RED
    assert canvas.getpixel((100, 10)) != RED


def test_one_panel_for_each_place():
    def width(places):
        kept = {f"llm:{n}": [0] for n in range(places)}
        return draw_kept(picture(64, 64), GRID, kept).width

    assert [width(n) - width(n - 1) for n in (1, 2, 3)] == [320 + GAP] * 3


def test_stages_are_the_panels_of_the_strip():
    record, drawn_on = pyramid_record(), [picture(64, 64), picture(64, 64, 1)]
    strip = show(record, drawn_on)[1]
    stages = show_stages(record, drawn_on)[1]
    assert list(stages) == list(record.images[1].kept)
    for n, panel in enumerate(stages.values(), 1):
        left = GAP + n * 334
        assert strip.crop((left, GAP, left + 320, GAP + 320)).tobytes() == panel.tobytes()


def test_panels_differ_between_places():
    strip = show(pyramid_record(), [picture(64, 64), picture(64, 64, 1)])[0]
    panels = [strip.crop((GAP + n * 334, GAP, GAP + n * 334 + 320, GAP + 320)) for n in range(4)]
    assert len({panel.tobytes() for panel in panels}) == 4


@pytest.mark.parametrize("geometry", ["resize", "crop", "pad"])
def test_show_finds_the_geometry_of_each_image(geometry):
    pictures = [picture(120, 64), picture(64, 120, 1)]
    record = pyramid_record()
    seen = torch.stack([seen_by_encoder(p, geometry) for p in pictures])
    record = Record(
        rows=2,
        prompt_tokens=record.prompt_tokens,
        images=record.images,
        layer_tokens=record.layer_tokens,
        cache_slots=record.cache_slots,
        pixels=seen,
    )
    auto, told = show(record, pictures), show(record, pictures, geometry)
    assert [a.tobytes() for a in auto] == [t.tobytes() for t in told]


@pytest.mark.parametrize(("size", "fits"), [((120, 61), True), ((120, 100), False)])
def test_a_grid_of_the_images_own_shape_is_a_resize(size, fits):
    """Models that take any resolution see patches; what the processor did shows in the grid."""
    record = Record(1, [40], [image(0, ("pre_llm", [0, 7]), grid=(4, 8))], [[40]], [40])
    if not fits:
        with pytest.raises(InputError, match="cannot tell how the processor mapped the image"):
            show(record, picture(*size))
        return
    auto, told = show(record, picture(*size)), show(record, picture(*size), "resize")
    assert auto[0].tobytes() == told[0].tobytes()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_number_of_images_must_fit(count):
    with pytest.raises(InputError, match=f"had 2 images, but show got {count}"):
        show(pyramid_record(), [picture(64, 64)] * count)


def test_nothing_to_draw_before_a_forward():
    with pytest.raises(InputError, match="nothing to draw"):
        show(None, [])


def test_unknown_geometry_is_refused():
    with pytest.raises(InputError, match="resize, crop, pad"):
        show(pyramid_record(), [picture(64, 64)] * 2, "squash")


def test_geometry_must_be_given_when_nothing_was_encoded():
    with pytest.raises(InputError, match="pass geometry="):
        show(pyramid_record(), [picture(64, 32)] * 2)
    assert len(show(pyramid_record(), [picture(64, 32)] * 2, "crop")) == 2


def test_single_image_needs_no_list():
    record = Record(1, [20], [image(0, ("pre_llm", [1]))], [[5]], [5])
    assert len(show(record, picture(64, 64))) == 1


def test_beams_are_drawn_once():
    """Three beams of two images, both in the same row: rows are repeated one after another."""
    images = [image(row, ("pre_llm", [n])) for row in range(3) for n in (1, 2)]
    record = Record(3, [40] * 3, images, [[10] * 3], [10], pixels=torch.rand(2, 3, 8, 8))
    pictures = [picture(64, 64), picture(64, 64, 1)]
    alone = Record(1, [40], images[:2], [[10]], [10], pixels=torch.rand(2, 3, 8, 8))
    got, want = show(record, pictures), show(alone, pictures)
    assert [g.tobytes() for g in got] == [w.tobytes() for w in want]


NOWHERE = torch.full((1, 4), torch.nan)
TILED = torch.cat((cells(2, 2), cells(4, 4), NOWHERE))  # a thumbnail, its tiles, and a newline


def placed(boxes, kept, frames=1):
    """A record of one image whose tokens lie in these boxes."""
    total = len(boxes)
    grid, alive = (1, total // frames), {"llm:2": torch.tensor(kept)}
    seen = ImageRecord(0, total, grid, alive, lambda: TokenBoxes(boxes), frames)
    return Record(1, [total], [seen], [[total]], [total])


def second_panel(strip, x, y, top=GAP):
    """The colour at a place in the 320 pixels of the second panel."""
    return strip.getpixel((GAP + 320 + GAP + round(320 * x), top + round(320 * y)))


def test_tiles_are_drawn_over_the_thumbnail():
    """The thumbnail's first cell is kept, one tile in it, one outside, and the newline."""
    strip = show(placed(TILED, [0, 4, 19, 20]), Image.new("RGB", (128, 128), RED))[0]
    assert second_panel(strip, 0.125, 0.125) == RED
    assert second_panel(strip, 0.875, 0.875) == RED
    coarse, gone = second_panel(strip, 0.375, 0.375), second_panel(strip, 0.625, 0.125)
    assert abs(gone[0] - gone[1]) < 5, "grey"
    assert 0 < coarse[0] - coarse[1] < RED[0] - RED[1]
    assert strip.size == draw_kept(picture(64, 64), GRID, {"llm:2": [0]}).size


@pytest.mark.parametrize("size", [(640, 480), (1000, 8), (3, 400)])
def test_tiles_can_be_drawn_on_images_of_any_shape(size):
    assert max(show(placed(TILED, [0, 4]), picture(*size))[0].size) < 3000


def test_a_thumbnail_with_a_newline_is_drawn_as_its_grid():
    boxes = torch.cat((cells(4, 4), NOWHERE))
    got = show(placed(boxes, [3, 9, 16]), picture(64, 64))[0]
    assert got.tobytes() == draw_kept(picture(64, 64), GRID, {"llm:2": [3, 9]}).tobytes()


def test_frames_of_a_video_are_drawn_one_below_the_other():
    """Two frames with a class token each; the frames drawn are those that tokens stand for."""
    boxes = torch.cat((NOWHERE, cells(2, 2))).repeat(2, 1)
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("black", RED, "blue", "blue")]
    strip = show(placed(boxes, [2, 6, 8], frames=2), [frames])[0]
    alone = [
        draw_kept(frames[1], (2, 2), {"llm:2": [1]}),
        draw_kept(frames[3], (2, 2), {"llm:2": [0, 2]}),
    ]
    assert strip.tobytes() == stack(alone, ["frame 1 of 2", "frame 2 of 2"]).tobytes()
    with pytest.raises(InputError, match="without frames"):
        show(placed(boxes, [2], frames=2), [[]])


def test_a_video_in_another_row_is_no_beam_of_an_image():
    video = ImageRecord(1, 8, (2, 2), {"llm:2": torch.tensor([1])}, frames=2)
    images = [image(0, ("llm:2", [1])), video]
    record = Record(2, [20, 20], images, [[5, 5]], [5], pixels=torch.rand(1, 3, 8, 8))
    assert len(show(record, [picture(64, 64), [picture(64, 64, 1)]])) == 2


def test_tokens_whose_place_is_unknown_are_not_drawn():
    with pytest.raises(InputError, match="image_sizes"):
        show(placed(NOWHERE.repeat(5, 1), [2]), picture(64, 64))


def test_stack_keeps_every_strip():
    a, b = Image.new("RGB", (10, 5), RED), Image.new("RGB", (20, 7), RED)
    sheet = stack([a, b])
    assert sheet.size == (20, 12)
    assert sheet.getpixel((19, 11)) == RED
    assert stack([a, b], ["one", "two"]).height > sheet.height
