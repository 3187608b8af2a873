"""Rows: which rows of an encoder hold the patches of each visual token.

A visual token is a patch, or a cell of `side` x `side` patches that the model merges after the
encoder. Shapes: `V` visual tokens of an image, `R` rows of each: side squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.core.transfer import upload
from foveate.errors import InputError


@dataclass(frozen=True, eq=False)
class EncoderImage:
    """An image, tile, frame or video as the encoder sees it.

    Args:
        grid: (height, width) of its visual tokens, of one frame in a video.
        rows: (V, R) rows of the encoder that hold each token, in raster order of the tokens.
        frames: frames of a video, one after the other.
    """

    grid: tuple[int, int]
    rows: Tensor
    frames: int = 1


def token_grid(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) in visual tokens of a grid of patches.

    Raises:
        InputError: some patches belong to no token.
    """
    if height % side or width % side:
        raise InputError(
            f"an image of {height} x {width} patches does not divide into cells of {side} x "
            f"{side}, so that tokens cannot be removed inside the encoder; resize images to "
            "multiples of a cell, as the model's processor does"
        )
    return height // side, width // side


def raster_rows(height: int, width: int, side: int = 1) -> Tensor:
    """(V, R) rows of the tokens of an image whose patches come in raster order."""
    rows, columns = token_grid(height, width, side)
    patches = torch.arange(height * width).view(rows, side, columns, side)
    return patches.transpose(1, 2).reshape(-1, side**2)


def cell_means(values: Tensor, rows: Tensor) -> list[Tensor]:
    """(C, V) of each image: means over the rows of each token.

    Args:
        values: (N, C, P) of the rows of all images.
        rows: (V, R) rows of each token, on the host.
    """
    return list(values[..., upload(rows, values.device)].mean(-1))


def taken(values: Tensor, source: Tensor, other: float) -> Tensor:
    """(V, ...) of what is known of patches or cells, and something else of what is none of them.

    Args:
        values: (N, ...) of all of them.
        source: (V) which of them each token is, on the host; negative for others.
        other: what these get.
    """
    found = values.index_select(0, upload(source.clamp(min=0), values.device))
    none = (source < 0).view(-1, *[1] * (values.dim() - 1))
    return found.masked_fill(upload(none, values.device), other)


def cut(pixels: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return (B, H, W, P): pixels of the adjacent patches of (B, C, H', W') images. A remainder at
    the right or below belongs to no patch.

    Args:
        pixels: the images.
        sides: height and width of a patch.
    """
    height, width = sides
    patches = pixels.unfold(2, height, height).unfold(3, width, width)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3)


def pixels_of_rows(patches: Tensor, images: Sequence[EncoderImage]) -> list[Tensor]:
    """Return the (V, P) pixels of each image's tokens.

    Args:
        patches: (N, P') pixels of the patches of all images, padding included.
        images: the images, whose rows are rows of these.
    """
    return [patches[upload(image.rows, patches.device)].flatten(1) for image in images]


def placed(places: Tensor, side: int) -> list[EncoderImage]:
    """Images that are rows of a batch and padded to one length.

    Args:
        places: (B, N, 2) column and row of each patch in its image; -1 for padding.
        side: side of a token in patches.

    Raises:
        InputError: the patches of an image do not fill cells.
    """
    images, length = [], places.shape[1]
    for number, image in enumerate(places.cpu()):
        patches = (image >= 0).all(-1).nonzero()[:, 0]
        column, row = image[patches].T
        width = int(column.max()) // side + 1
        key = ((row // side * width + column // side) * side + row % side) * side + column % side
        key, order = key.sort()
        if not torch.equal(key, torch.arange(len(key))) or len(key) % (width * side**2):
            raise InputError(
                f"the {len(key)} patches of image {number} do not fill cells of {side} x {side}, "
                "so that tokens cannot be told from patches inside the encoder; resize images to "
                "multiples of a cell, as the model's processor does"
            )
        rows = patches[order].view(-1, side**2) + number * length
        images.append(EncoderImage((len(rows) // width, width), rows))
    return images


def in_one_row(
    pooled: Sequence[Tensor],
    name: str,
    grids: Sequence[tuple[int, int]],
    closing: str,
    ends: int = 0,
) -> list[Shape]:
    """Images of rows that each close with a visual token more.

    Args:
        pooled: (V, D) features of each image.
        name: the argument that says the grids, for the message.
        grids: (height, width) of each without what closes rows; none where they are not known.
        closing: what closes rows and images, for the message.
        ends: visual tokens around an image.

    Raises:
        InputError: an image has not as many features as its grid says.
    """
    counts = [len(feature) for feature in pooled]
    for count, (height, width) in zip(counts, grids, strict=False):
        total = height * (width + 1) + ends
        if count != total:
            raise InputError(
                f"{name} says {height} x {width} visual tokens, with {closing} {total}, but there "
                f"are {count} features; pass {name} as the processor returned it with them"
            )
    return [Shape(count, (1, count)) for count in counts]


def packed(
    sizes: Sequence[tuple[int, int, int]],
    sides: Sequence[int],
    order: Tensor | None = None,
    *,
    raster: bool,
) -> list[EncoderImage]:
    """Images whose rows lie one after another in one sequence.

    Args:
        sizes: (frames, height, width) of each in patches.
        sides: side of a token in patches, for each image.
        order: (tokens) the token at each position, where the encoder reorders those of all images,
            whose sides are equal then.
        raster: whether patches come in raster order; else token by token.
    """
    position = None if order is None else order.argsort().cpu()
    images, start = [], 0
    for (frames, height, width), side in zip(sizes, sides, strict=True):
        grid, count = token_grid(height, width, side), frames * height * width
        rows = (
            raster_rows(frames * height, width, side)
            if raster
            else torch.arange(count).view(-1, side**2)
        )
        rows = rows + start
        if position is not None:
            rows = position[rows // side**2] * side**2 + rows % side**2
        images.append(EncoderImage(grid, rows, frames))
        start += count
    return images
