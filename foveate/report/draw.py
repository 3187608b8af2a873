"""Draw the kept tokens on the pixels: the image, then one panel for each site.

Tokens that form no single grid (a thumbnail, then tiles) are drawn by their boxes, small ones over
large ones. A video is one row of panels for each frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from foveate.errors import InputError
from foveate.io.images import to_rgb
from foveate.record.boxes import passes, plain_grid
from foveate.record.record import ImageRecord, Record, alone, by_image, joined, site_name
from foveate.report.geometry import choose_geometry, place_grid
from foveate.report.panels import box_panel, grid_panel, side_by_side, stack

ImageOrVideo = Image.Image | Sequence[Image.Image]

PANEL = 320  # least height of a panel in pixels


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
    return [_strip(frames) for frames in _panels_of(record, given, geometry)]


def show_stages(
    record: Record | None, images: Sequence[Image.Image], geometry: str = "auto"
) -> list[dict[str, Image.Image]]:
    """Draw what each site kept of each image, every site alone and without captions.

    Takes the arguments of `show`, but for videos.

    Returns:
        For each image its sites, in stream order, with what was kept there.

    Raises:
        InputError: see `show`.
    """
    drawn = []
    for frames in _panels_of(record, images, geometry):
        (panels, _) = frames[0]
        drawn.append(dict(list(panels.items())[1:]))
    return drawn


_Panels = tuple[dict[str, Image.Image], list[tuple[str, str]]]
"""The image under an empty name, then what each site kept; and a caption for each."""


def _panels_of(
    record: Record | None, images: Sequence[ImageOrVideo], geometry: str
) -> list[list[_Panels]]:
    """For each image the panels of its frames; an image is one frame.

    Raises:
        InputError: see `show`.
    """
    if record is None:
        raise InputError("nothing to draw: call the model or generate inside the session first")
    record = replace(record, images=[image for image in record.images if not image.audio])
    shown = _distinct(record)
    found, number = [], 0
    for image, group in zip(images, _matched(shown, len(images)), strict=True):

        def choose(frame: Image.Image, grid: tuple[int, int], number: int = number) -> str:
            if geometry != "auto":
                return geometry
            return choose_geometry(record.pixels, frame, number, len(shown), grid)

        found.append(_draw_image(image, joined(group), choose))
        number += len(group)
    return found


def _strip(frames: Sequence[_Panels]) -> Image.Image:
    """The panels of an image side by side, or those of a video's frames below each other."""
    strips = [side_by_side(list(panels.values()), captions) for panels, captions in frames]
    if len(strips) == 1:
        return strips[0]
    return stack(strips, [f"frame {n + 1} of {len(strips)}" for n in range(len(strips))])


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
) -> list[_Panels]:
    """The panels of an image, or of each frame of a video."""
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if not frames:
        raise InputError("a video without frames cannot be drawn")
    found = []
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
            found.append(_box_panels(frame, boxes, kept))
        else:  # raster positions among the tokens that have a box
            rank = located.cumsum(0) - 1
            kept = {site: rank[index[located[index]]].tolist() for site, index in surviving.items()}
            found.append(_grid_panels(frame, grid, kept, choose(frame, grid)))
    return found


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
    panels, captions = _grid_panels(image, grid, kept_by_site, geometry)
    return side_by_side(list(panels.values()), captions)


def _grid_panels(
    image: Image.Image,
    grid: tuple[int, int],
    kept_by_site: Mapping[str, Sequence[int]],
    geometry: str,
) -> _Panels:
    """The panels of `draw_kept`."""
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
    panels = {"": grid_panel(canvas, columns, rows, None)}
    captions = [("the image", f"{total} tokens")]
    for site, kept in kept_by_site.items():
        panels[site] = grid_panel(canvas, columns, rows, set(kept))
        captions.append((site_name(site), f"{len(kept)} of {total} tokens"))
    return panels, captions


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
    panels, captions = _box_panels(image, boxes, kept_by_site)
    return side_by_side(list(panels.values()), captions)


def _box_panels(
    image: Image.Image, boxes: Tensor, kept_by_site: Mapping[str, Sequence[int]]
) -> _Panels:
    """The panels of `draw_boxes`."""
    layers = passes(boxes)
    if not len(layers[-1]):
        raise InputError(
            "it is not known where visual tokens lie in the image; pass what says so: the "
            "processor's image_sizes with features, or the noise that masks patches"
        )
    finest = boxes[layers[-1]]
    height = max(PANEL, round(10 / float((finest[:, 3] - finest[:, 1]).median())))
    width = min(max(round(image.width * height / image.height), height // 4), 4 * height)
    canvas = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    edges = boxes.nan_to_num() * torch.tensor([width, height, width, height])
    corners = edges.round().int().tolist()
    panels, captions = {"": canvas}, [("the image", f"{len(boxes)} tokens")]
    for site, kept in kept_by_site.items():
        surviving = set(kept)
        panels[site] = box_panel(canvas, corners, [layer.tolist() for layer in layers], surviving)
        captions.append((site_name(site), f"{len(surviving)} of {len(boxes)} tokens"))
    return panels, captions


def _distinct(record: Record) -> list[ImageRecord]:
    """The images of a record, without the copies that beams and returned sequences make."""
    encoded = 0 if record.pixels is None else len(record.pixels)
    videos = any(image.frames > 1 for image in record.images)
    if not encoded or videos or len(record.images) % encoded:  # pixels are those of images only
        return record.images
    copies = len(record.images) // encoded
    return [image for image in record.images if image.row % copies == 0]
