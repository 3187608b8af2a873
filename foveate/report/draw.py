"""Draw the kept tokens on the pixels: the image, then one panel for each site.

A processor maps an image onto the token grid in one of three ways (`Geometry`): `resize` stretches
the whole image, `crop` cuts the centre out, `pad` fills the image up to a square first.

Tokens that form no single grid (a thumbnail, then tiles) are drawn by their boxes, small ones over
large ones. A video is one row of panels for each frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from foveate.errors import InputError
from foveate.io.images import to_rgb
from foveate.record.boxes import passes, plain_grid
from foveate.record.record import ImageRecord, Record, alone, by_image, joined, site_name

Geometry = Literal["resize", "crop", "pad"]
Box = tuple[float, float, float, float]
ImageOrVideo = Image.Image | Sequence[Image.Image]

PANEL = 320  # least height of a panel in pixels
GAP = 14
CAPTION = 46
PAPER = (255, 255, 255)
INK = (33, 37, 41)
FAINT = (108, 117, 125)
EDGE = (240, 101, 0)
FILL = (123, 117, 104)  # what `pad` pads with: the mean colour of CLIP's training images
PROBE = 24  # edge in pixels at which geometries are compared


def show(
    record: Record | None,
    images: Image.Image | Sequence[ImageOrVideo],
    geometry: str = "auto",
) -> list[Image.Image]:
    """Draw what one forward kept of each image.

    Args:
        record: what the engine wrote; `None` when no forward has run.
        images: the images, in the order in which they appear in the prompts of the batch. A
            video is one of them: the list of its frames, from which those that tokens stand for are
            taken evenly. Of images that were cut into tiles, all tiles can be passed instead.
        geometry: how the processor mapped images onto the token grid. `auto` finds out from the
            pixels that the encoder saw.

    Returns:
        For each image a strip: the image, then what was kept at each site.

    Raises:
        InputError: no forward has run, there are more or fewer images than the prompts had, or
            the geometry is unknown and cannot be found out.
    """
    given: list[ImageOrVideo] = [images] if isinstance(images, Image.Image) else list(images)
    if record is None:
        raise InputError("nothing to draw: call the model or generate inside the session first")
    shown = _distinct(record)
    strips, number = [], 0
    for image, group in zip(given, _matched(shown, len(given)), strict=True):

        def choose(frame: Image.Image, grid: tuple[int, int], number: int = number) -> str:
            if geometry != "auto":
                return geometry
            return _choose(record.pixels, frame, number, len(shown), grid)

        strips.append(_draw_image(image, joined(group), choose))
        number += len(group)
    return strips


def _matched(shown: list[ImageRecord], given: int) -> list[list[ImageRecord]]:
    """For each given image its records: of all its tiles, or of the one tile that was given.

    Raises:
        InputError: the last forward had another number of images.
    """
    groups = by_image(shown)
    if given == len(groups):
        return groups
    if given == len(shown):
        return [[alone(image)] for image in shown]
    cut = f", cut into {len(shown)} tiles" if len(groups) < len(shown) else ""
    raise InputError(
        f"the last forward had {len(groups)} images{cut}, but show got {given}; "
        "pass every image of the batch, in order of appearance; a video is one list of "
        "frames; of an image that was cut, all tiles can be passed instead"
    )


def _draw_image(
    image: ImageOrVideo, seen: ImageRecord, choose: Callable[[Image.Image, tuple[int, int]], str]
) -> Image.Image:
    """The strip of an image, or those of a video's frames below each other."""
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if not frames:
        raise InputError("a video without frames cannot be drawn")
    strips = []
    for number in range(seen.frames):
        members = (seen.frame == number).nonzero()[:, 0]
        boxes = seen.boxes[members]
        surviving = {
            site: torch.isin(members, index.cpu()).nonzero()[:, 0]
            for site, index in seen.kept.items()
        }
        frame = frames[(2 * number + 1) * len(frames) // (2 * seen.frames)]
        located = ~boxes[:, 0].isnan()
        grid = plain_grid(boxes[located])
        if grid is None:
            kept = {site: index.tolist() for site, index in surviving.items()}
            strips.append(draw_boxes(frame, boxes, kept))
        else:  # raster positions among the tokens that have a box
            rank = located.cumsum(0) - 1
            kept = {site: rank[index[located[index]]].tolist() for site, index in surviving.items()}
            strips.append(draw_kept(frame, grid, kept, choose(frame, grid)))
    if len(strips) == 1:
        return strips[0]
    return stack(strips, [f"frame {n + 1} of {len(strips)}" for n in range(len(strips))])


def draw_kept(
    image: Image.Image,
    grid: tuple[int, int],
    kept_by_site: Mapping[str, Sequence[int]],
    geometry: str = "resize",
) -> Image.Image:
    """A strip of panels: kept tokens in colour with an outline, dropped ones in pale grey.

    Args:
        image: the image as the user has it.
        grid: (height, width) of its token grid.
        kept_by_site: for each site, the raster positions that survive it.
        geometry: how the image was mapped onto the grid.

    Returns:
        An RGB image. Parts of the image that the model never saw are dark.

    Raises:
        InputError: the geometry is none of the three.
    """
    canvas, box = place_grid(image, geometry, grid[1] / grid[0])
    height = max(PANEL, 10 * grid[0])
    width = round(canvas.width * height / canvas.height)
    width = min(max(width, 10 * grid[1]), 4 * height)  # very thin images are stretched
    left, right = (x * width / canvas.width for x in box[::2])
    top, bottom = (y * height / canvas.height for y in box[1::2])
    columns = [round(left + (right - left) * n / grid[1]) for n in range(grid[1] + 1)]
    rows = [round(top + (bottom - top) * n / grid[0]) for n in range(grid[0] + 1)]
    canvas = canvas.resize((width, height), Image.Resampling.BICUBIC)
    total = grid[0] * grid[1]
    panels = [_panel(canvas, columns, rows, None)]
    captions = [("the image", f"{total} tokens")]
    for site, kept in kept_by_site.items():
        panels.append(_panel(canvas, columns, rows, set(kept)))
        captions.append((site_name(site), f"{len(kept)} of {total} tokens"))
    return _strip(panels, captions)


def draw_boxes(
    image: Image.Image, boxes: Tensor, kept_by_site: Mapping[str, Sequence[int]]
) -> Image.Image:
    """A strip of panels for tokens that form no single grid: kept boxes in colour with an outline.

    Boxes of a first, coarse pass over the image are half as colourful as those of the finest.

    Args:
        image: the image as the user has it.
        boxes: (V, 4) left, top, right and bottom edge of each token as shares of the image; NaN
            where a token has none.
        kept_by_site: for each site, the tokens that survive it.

    Raises:
        InputError: no token has a box.
    """
    layers = passes(boxes)
    if not len(layers[-1]):
        raise InputError(
            "it is not known where visual tokens lie in the image; pass the processor's "
            "image_sizes with the features"
        )
    finest = boxes[layers[-1]]
    height = max(PANEL, round(10 / float((finest[:, 3] - finest[:, 1]).median())))
    width = min(max(round(image.width * height / image.height), height // 4), 4 * height)
    canvas = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    edges = boxes.nan_to_num() * torch.tensor([width, height, width, height])
    corners = edges.round().int().tolist()
    panels, captions = [canvas], [("the image", f"{len(boxes)} tokens")]
    for site, kept in kept_by_site.items():
        surviving = set(kept)
        panels.append(_box_panel(canvas, corners, [layer.tolist() for layer in layers], surviving))
        captions.append((site_name(site), f"{len(surviving)} of {len(boxes)} tokens"))
    return _strip(panels, captions)


def place_grid(image: Image.Image, geometry: str, aspect: float = 1.0) -> tuple[Image.Image, Box]:
    """The canvas that a geometry makes of an image, and the box on it that the grid covers.

    Args:
        image: the image.
        geometry: how the processor maps it.
        aspect: width of the grid over its height.

    Raises:
        InputError: the geometry is none of the three.
    """
    image = to_rgb(image)
    width, height = image.size
    if geometry == "resize":
        return image, (0, 0, width, height)
    if geometry == "crop":
        seen_width, seen_height = min(width, height * aspect), min(height, width / aspect)
        left, top = (width - seen_width) / 2, (height - seen_height) / 2
        return image, (left, top, left + seen_width, top + seen_height)
    if geometry == "pad":
        size = (max(width, round(height * aspect)), max(height, round(width / aspect)))
        canvas = Image.new("RGB", size, FILL)
        canvas.paste(image, ((size[0] - width) // 2, (size[1] - height) // 2))
        return canvas, (0, 0, *size)
    raise InputError(
        f"geometry must be 'auto' or one of {', '.join(get_args(Geometry))}, got {geometry!r}"
    )


def match_geometry(image: Image.Image, pixels: Tensor) -> Geometry:
    """Find out how the processor mapped an image.

    Each geometry is rendered small and grey, and the one that correlates best with what the encoder
    saw is taken. Of a square image all three are the same: `resize`.

    Args:
        image: the image as the user has it.
        pixels: (C, H, W) what the vision encoder was fed, normalised in any way.
    """
    if image.width == image.height:
        return "resize"
    seen = pixels.detach().float().cpu().mean(0)
    aspect = seen.shape[1] / seen.shape[0]
    seen = torch.nn.functional.adaptive_avg_pool2d(seen[None], PROBE)[0]
    scores: dict[Geometry, float] = {}
    for geometry in get_args(Geometry):
        canvas, box = place_grid(image, geometry, aspect)
        small = canvas.resize((PROBE, PROBE), Image.Resampling.BOX, box=box)
        grey = torch.tensor(list(small.tobytes())).view(PROBE, PROBE, 3).float().mean(-1)
        across = min(math.ceil(PROBE * (1 - image.width / canvas.width) / 2), PROBE // 2 - 1)
        down = min(math.ceil(PROBE * (1 - image.height / canvas.height) / 2), PROBE // 2 - 1)
        # Processors pad with different colours, so the padding itself is not compared.
        inside = (slice(down, PROBE - down), slice(across, PROBE - across))
        scores[geometry] = _correlation(grey[inside], seen[inside])
    return max(scores, key=lambda name: scores[name])


def stack(strips: Sequence[Image.Image], headings: Sequence[str] = ()) -> Image.Image:
    """Put strips below each other, each under its heading if headings are given."""
    font = ImageFont.load_default(size=20)
    room = 34 if headings else 0
    wide = [strip.width for strip in strips]
    wide += [int(font.getlength(heading)) + 2 * GAP for heading in headings]
    height = sum(strip.height + room for strip in strips)
    sheet = Image.new("RGB", (max(wide), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = 0
    for number, strip in enumerate(strips):
        if headings:
            pen.text((GAP, top + 10), headings[number], fill=INK, font=font)
        sheet.paste(strip, (0, top + room))
        top += room + strip.height
    return sheet


def _distinct(record: Record) -> list[ImageRecord]:
    """The images of a record, without the copies that beams and returned sequences make."""
    encoded = 0 if record.pixels is None else len(record.pixels)
    videos = any(image.frames > 1 for image in record.images)
    if not encoded or videos or len(record.images) % encoded:  # pixels are those of images only
        return record.images
    copies = len(record.images) // encoded
    return [image for image in record.images if image.row % copies == 0]


def _choose(
    pixels: Tensor | None,
    image: Image.Image,
    number: int,
    count: int,
    grid: tuple[int, int],
) -> Geometry:
    """The geometry of one of `count` images, given what the encoder saw of all, and the grid."""
    if pixels is not None and len(pixels) == count:
        seen = pixels[number]
        return match_geometry(image, seen if seen.dim() == 3 else seen[0])  # the thumbnail
    height, width = grid
    if image.width == image.height or (
        # A grid of the image's own shape, but for the rounding to whole cells.
        height != width and abs(image.width / image.height * height - width) <= 1
    ):
        return "resize"
    raise InputError(
        "cannot tell how the processor mapped the image, because it is not known what the vision "
        "encoder saw of it; pass geometry='resize', 'crop' or 'pad'"
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    """Normalised correlation of two maps, in [-1, 1]."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _panel(
    canvas: Image.Image, columns: list[int], rows: list[int], kept: set[int] | None
) -> Image.Image:
    """The canvas, dropped cells pale, off the grid dark; `kept=None` leaves all plain."""
    width = len(columns) - 1
    mask = Image.new("L", canvas.size, 0)
    cells = ImageDraw.Draw(mask)
    for cell in range(width * (len(rows) - 1)) if kept is None else kept:
        row, column = divmod(cell, width)
        left, top = columns[column], rows[row]
        right, bottom = max(columns[column + 1] - 1, left), max(rows[row + 1] - 1, top)
        cells.rectangle((left, top, right, bottom), fill=255)
    off_grid = Image.blend(canvas, Image.new("RGB", canvas.size, (0, 0, 0)), 0.75)
    pale = _pale(canvas)
    panel = off_grid
    panel.paste(pale.crop((columns[0], rows[0], columns[-1], rows[-1])), (columns[0], rows[0]))
    panel.paste(canvas, mask=mask)
    if kept is not None:
        _borders(panel, columns, rows, kept)
    return panel


def _pale(canvas: Image.Image) -> Image.Image:
    """The canvas as dropped tokens show it."""
    grey = canvas.convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", canvas.size, (236, 238, 241)), 0.62)


def _box_panel(
    canvas: Image.Image,
    corners: Sequence[Sequence[int]],
    layers: Sequence[Sequence[int]],
    kept: set[int],
) -> Image.Image:
    """The canvas in pale grey, with the kept boxes of each layer in turn."""
    panel = _pale(canvas)
    for depth, layer in enumerate(layers):
        finest = depth == len(layers) - 1
        mask = Image.new("L", canvas.size, 0)
        pen = ImageDraw.Draw(mask)
        for left, top, right, bottom in (corners[token] for token in layer if token in kept):
            pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=255)
        panel.paste(canvas if finest else Image.blend(_pale(canvas), canvas, 0.5), mask=mask)
        edge = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(5 if finest else 3)))
        panel.paste(EDGE, mask=edge)
    overlay = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(overlay)
    for left, top, right, bottom in (corners[token] for token in layers[-1] if token not in kept):
        pen.rectangle((left, top, right, bottom), outline=(*PAPER, 60))
    panel.paste(overlay, mask=overlay.getchannel("A"))
    return panel


def _borders(panel: Image.Image, columns: list[int], rows: list[int], kept: set[int]) -> None:
    """Faint lines between cells, and an outline around kept regions."""
    overlay = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(overlay)
    for x in columns[1:-1]:
        pen.line((x, rows[0], x, rows[-1] - 1), fill=(*PAPER, 70))
    for y in rows[1:-1]:
        pen.line((columns[0], y, columns[-1] - 1, y), fill=(*PAPER, 70))
    width, height = len(columns) - 1, len(rows) - 1
    for cell in kept:
        row, column = divmod(cell, width)
        left, right = columns[column], min(columns[column + 1], panel.width - 1)
        top, bottom = rows[row], min(rows[row + 1], panel.height - 1)
        sides = (
            (row > 0 and cell - width not in kept, (left, top, right, top)),
            (row < height - 1 and cell + width not in kept, (left, bottom, right, bottom)),
            (column > 0 and cell - 1 not in kept, (left, top, left, bottom)),
            (column < width - 1 and cell + 1 not in kept, (right, top, right, bottom)),
        )
        for is_edge, line in sides:
            if is_edge:
                pen.line(line, fill=(*EDGE, 255), width=2)
    panel.paste(overlay, mask=overlay.getchannel("A"))


def _strip(panels: Sequence[Image.Image], captions: Sequence[tuple[str, str]]) -> Image.Image:
    """Panels side by side with a two-line caption below each."""
    bold, plain = ImageFont.load_default(size=17), ImageFont.load_default(size=15)
    needed = [max(bold.getlength(a), plain.getlength(b)) for a, b in captions]
    widths = [max(p.width, int(n) + 1) for p, n in zip(panels, needed, strict=True)]
    size = (sum(widths) + GAP * (len(panels) + 1), panels[0].height + 2 * GAP + CAPTION)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    left = GAP
    for panel, width, (where, count) in zip(panels, widths, captions, strict=True):
        sheet.paste(panel, (left, GAP))
        text_top = GAP + panel.height + 6
        pen.text((left, text_top), where, fill=INK, font=bold)
        pen.text((left, text_top + 22), count, fill=FAINT, font=plain)
        left += width + GAP
    return sheet
