"""PixelPrune: surviving cells against a transcription; survivors rebuild the whole image."""

import dataclasses

import pytest
import torch

import foveate
from foveate.core import Step
from foveate.errors import BudgetError, FoveateError
from foveate.methods import PixelPrune


def kept_by_hand(cells, height, width, threshold=0.0):
    """Cells of one image that survive, by loops: (H W, P), in raster order."""

    def alike(a, b):
        return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= threshold

    taken, kept = {}, []
    for r in range(height):
        for c in range(width):
            own = cells[r * width + c].tolist()
            left, up, corner = (
                taken.get((r, c - 1)),
                taken.get((r - 1, c)),
                taken.get((r - 1, c - 1)),
            )
            if r == 0 or c == 0:
                predicted = left if r == 0 else up
            elif alike(corner, left) and not alike(corner, up):
                predicted = up
            else:
                predicted = left
            if predicted is not None and alike(own, predicted):
                taken[r, c] = predicted
            else:
                taken[r, c] = own
                kept.append(r * width + c)
    return kept


def rebuilt(cells, kept, height, width):
    """The image, rebuilt from its survivors alone by exact predictions."""
    taken = {}
    for r in range(height):
        for c in range(width):
            left, up, corner = (
                taken.get((r, c - 1)),
                taken.get((r - 1, c)),
                taken.get((r - 1, c - 1)),
            )
            if r * width + c in kept:
                taken[r, c] = cells[r * width + c].tolist()
            elif r == 0 or c == 0:
                taken[r, c] = left if r == 0 else up
            else:
                taken[r, c] = up if corner == left and corner != up else left
    return torch.tensor([taken[r, c] for r in range(height) for c in range(width)])


def drawn(images, height, width, colours=3, seed=0):
    """(G, H W, P) pixels of cells of a few kinds."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.randn(colours, 12, generator=generator)
    return palette[torch.randint(colours, (images, height * width), generator=generator)]


def survivors(method, tokens):
    """(K) positions of each image."""
    reduction = method.reduce(tokens, 1)
    pairs = zip(reduction.index, reduction.valid, strict=True)
    assert all(len(set(index.tolist())) == len(index) for index in reduction.index)
    return [index[valid].tolist() for index, valid in pairs]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (2, 2), (6, 9), (13, 4)])
def test_cells_that_survive_are_those_of_loops(grid, make_tokens):
    pixels = drawn(40, *grid)
    tokens = make_tokens(grid=grid, images=40, pixels=pixels)
    want = [kept_by_hand(image, *grid) for image in pixels]
    assert survivors(PixelPrune(), tokens) == want
    assert len({len(kept) for kept in want}) > 1 or grid == (1, 1)


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (6, 9), (13, 4)])
def test_with_a_threshold_survivors_are_those_of_loops(grid, threshold, make_tokens):
    noise = torch.rand(40, grid[0] * grid[1], 12, generator=torch.Generator().manual_seed(1)) - 0.5
    pixels = drawn(40, *grid) / 2 + noise * threshold
    tokens = make_tokens(grid=grid, images=40, pixels=pixels)
    want = [kept_by_hand(image, *grid, threshold) for image in pixels]
    assert survivors(PixelPrune(threshold=threshold), tokens) == want
    assert any(len(kept) < len(pixels[0]) for kept in want)
    assert any(len(kept) > 1 for kept in want)


def test_a_threshold_does_not_add_up(make_tokens):
    """A slow change of colour is followed, though no two neighbours differ by much."""
    pixels = torch.arange(12.0)[None, :, None].expand(1, 12, 5)
    tokens = make_tokens(grid=(1, 12), pixels=pixels)
    assert survivors(PixelPrune(threshold=2.0), tokens) == [[0, 3, 6, 9]]
    tokens = make_tokens(grid=(12, 1), pixels=pixels)
    assert survivors(PixelPrune(threshold=2.0), tokens) == [[0, 3, 6, 9]]


def test_a_tiny_threshold_is_none(make_tokens):
    pixels = drawn(40, 6, 9)
    tokens = make_tokens(grid=(6, 9), images=40, pixels=pixels)
    assert survivors(PixelPrune(threshold=1e-6), tokens) == survivors(PixelPrune(), tokens)


def test_a_rectangle_costs_three_corners(make_tokens):
    """Its edges are predicted along themselves."""
    image = torch.zeros(9, 11, 8)
    image[3:6, 4:8] = 1.0
    tokens = make_tokens(grid=(9, 11), pixels=image.flatten(0, 1)[None])
    (kept,) = survivors(PixelPrune(), tokens)
    assert [divmod(cell, 11) for cell in kept] == [(0, 0), (3, 4), (3, 8), (6, 4)]


@pytest.mark.parametrize("seed", range(5))
def test_survivors_rebuild_the_whole_image(seed, make_tokens):
    pixels = drawn(8, 6, 9, colours=4, seed=seed)
    tokens = make_tokens(grid=(6, 9), images=8, pixels=pixels)
    for image, kept in zip(pixels, survivors(PixelPrune(), tokens), strict=True):
        assert torch.equal(rebuilt(image, kept, 6, 9), image)
        assert len(kept) < len(image)


def test_each_frame_is_treated_as_an_image(make_tokens):
    pixels = drawn(6, 4, 5)
    pixels[1] = pixels[0]  # a frame like the one before keeps what that keeps
    videos = dataclasses.replace(
        make_tokens(grid=(4, 5), images=2, pixels=pixels.view(2, 60, 12)), frames=3
    )
    frames = survivors(PixelPrune(), make_tokens(grid=(4, 5), images=6, pixels=pixels))
    want = [
        [frame * 20 + cell for frame in range(3) for cell in frames[video * 3 + frame]]
        for video in range(2)
    ]
    assert survivors(PixelPrune(), videos) == want


def test_a_difference_of_one_bit_is_one(make_tokens):
    pixels = torch.ones(1, 4, 3)
    pixels[0, 2, 1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    (kept,) = survivors(PixelPrune(), make_tokens(grid=(2, 2), pixels=pixels))
    assert kept == [0, 2, 3]


def test_it_asks_for_pixels_before_the_first_layer(facts):
    (step,) = PixelPrune().steps(facts())
    assert isinstance(step, Step)
    assert (step.stage, step.layer, step.inside) == ("vision", 0, False)
    assert [(need.name, need.layers) for need in step.needs] == [("pixels", ())]


def test_positions_stay():
    assert PixelPrune().published_positions == "original"
    assert foveate.get_method("pixelprune").adaptive


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_a_wrong_threshold_is_refused(threshold):
    with pytest.raises(FoveateError, match="threshold"):
        PixelPrune(threshold=threshold)


def test_it_takes_no_budget():
    with pytest.raises(BudgetError, match="keep must be None"):
        PixelPrune(keep=0.5)
