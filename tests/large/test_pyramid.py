"""Levels, tiles and the layout of their tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.large.pyramid import (
    Level,
    lay_out,
    levels,
    pool,
    tiles_below,
    tiles_below_as_released,
)

SIDES = st.integers(1, 30_000)


def published(height, width, tile, shortest):
    """The sizes of the levels, transcribed from the paper's description, finest first."""
    scale, least = 1.0, min(1.0, shortest / max(height, width))
    wanted = []
    while scale >= least:
        wanted.append(scale)
        scale = scale / 2
    if wanted[-1] > least:
        wanted.append(least)
    wanted.append(min(tile / height, tile / width))
    sizes = []
    for s in sorted(set(wanted), reverse=True):
        h, w = round(height * s), round(width * s)
        grow = min(math.ceil(h / tile) * tile / h, math.ceil(w / tile) * tile / w)
        sizes.append((round(h * grow), round(w * grow)))
    return sizes


@settings(deadline=None, max_examples=60)
@given(st.integers(337, 30_000), st.integers(337, 30_000))
def test_levels_are_the_published_ones(height, width):
    got = [level.size for level in levels((height, width), 336)]
    assert got == published(height, width, 336, 1008)[::-1]


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES)
def test_a_level_fills_its_tiles_along_one_side(height, width):
    """Rounding aside, which may leave one pixel."""
    for level in levels((height, width), 336):
        rows, columns = level.blocks
        missing = rows * 336 - level.size[0], columns * 336 - level.size[1]
        assert min(missing) <= 1
        assert min(*missing) >= 0
        assert max(missing) < 336


def test_the_first_level_is_one_tile():
    assert levels((5000, 300), 336)[0].blocks == (1, 1)


def test_an_image_within_a_tile_has_one_level():
    assert [level.size for level in levels((100, 168), 336)] == [(200, 336)]


def test_the_measured_side():
    long, short = (levels((4000, 1008), 336, measured=side)[1] for side in ("long", "short"))
    assert long.size[0] == pytest.approx(1008, abs=336)
    assert short.size == (4000, 1008)


def test_no_image():
    with pytest.raises(InputError, match="at least 1 pixel"):
        levels((0, 10), 336)


def test_pool_averages_neighbours():
    tokens = torch.randn(2, 6, 6, 3)
    want = tokens.view(2, 3, 2, 3, 2, 3).mean((2, 4))
    torch.testing.assert_close(pool(tokens), want)


def test_pool_of_an_odd_grid_rounds_up():
    assert pool(torch.randn(1, 27, 27, 2)).shape == (1, 14, 14, 2)


LEVEL = Level((50, 90), 40)  # 2 x 3 tiles
SIDE = 4  # tokens of 10 pixels


def grid_values(tiles):
    """(n, S, S, 2) tokens that hold their own row and column on the level's grid."""
    inside = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).view(SIDE, SIDE, 2)
    return (tiles[:, None, None] * SIDE + inside).float()


def test_layout_is_in_raster_order_without_padding():
    tiles = LEVEL.tiles()
    local = lay_out(LEVEL, tiles, grid_values(tiles))
    want = [(row, column) for row in range(5) for column in range(9)]
    assert [tuple(cell) for cell in local.cell.tolist()] == want
    assert torch.equal(local.values.long(), local.cell)
    assert not local.newline.any()
    assert torch.equal(local.order, torch.arange(45))


def test_some_tiles_leave_gaps_in_the_layout():
    tiles = torch.tensor([[0, 0], [1, 2]])
    local = lay_out(LEVEL, tiles, grid_values(tiles), newline=torch.full((2,), -1.0))
    want = [(row, column) for row in range(4) for column in (*range(4), 9)]
    want += [(4, 8), (4, 9)]
    assert [tuple(cell) for cell in local.cell.tolist()] == want
    assert torch.equal(local.values[~local.newline].long(), local.cell[~local.newline])
    assert (local.values[local.newline] == -1).all()
    whole = lay_out(LEVEL, tiles[:1], grid_values(tiles[:1]), torch.zeros(2), every_row=True)
    assert whole.newline.sum() == 5


def test_boxes_are_shares_of_the_image():
    tiles = LEVEL.tiles()
    local = lay_out(LEVEL, tiles, grid_values(tiles), newline=torch.zeros(2))
    boxes = local.boxes()
    assert boxes[local.newline].isnan().all()
    row = (local.cell == torch.tensor([4, 8])).all(1)
    assert boxes[row].flatten().tolist() == pytest.approx([80 / 90, 40 / 50, 1, 1])


def test_tokens_call_for_the_tiles_of_their_centres():
    finer = Level((65, 117), 40)  # 2 x 3 tiles, whose edges cut through tokens
    tiles = LEVEL.tiles()
    local = lay_out(LEVEL, tiles, grid_values(tiles), newline=torch.zeros(2))
    for row in range(5):
        for column in range(9):
            one = local.take(torch.where((local.cell == torch.tensor([row, column])).all(1))[0])
            want = [[int((row + 0.5) * 13 // 40), int((column + 0.5) * 13 // 40)]]
            assert tiles_below(one, finer).tolist() == want
    everything = tiles_below(local, finer)
    assert torch.equal(everything, finer.tiles())


def test_newlines_call_for_tiles_only_as_released():
    tiles = LEVEL.tiles()
    local = lay_out(LEVEL, tiles, grid_values(tiles), newline=torch.zeros(2))
    newlines = local.take(torch.where(local.newline)[0])
    assert len(tiles_below(newlines, Level((100, 180), 40))) == 0
    assert tiles_below_as_released(newlines.cell, (5, 10), (3, 5)).tolist() == [
        [0, 4],
        [1, 4],
        [2, 4],
    ]
