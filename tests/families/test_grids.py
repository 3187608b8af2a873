"""Grids come from what the processor returned, and must fit the features."""

import pytest
import torch

from foveate.core.tokens import Shape
from foveate.errors import InputError
from foveate.families import find_family
from foveate.record.boxes import cells
from tests.conformance.test_families import model_of


@pytest.fixture(scope="module")
def qwen():
    return find_family(model_of("qwen2_5_vl"))


def features(*counts):
    return [torch.zeros(count, 64) for count in counts]


def test_grids_are_counted_in_merged_patches(qwen):
    grids = {"image_grid_thw": torch.tensor([[1, 4, 8], [1, 12, 2]])}
    assert qwen.shapes("image", features(8, 6), grids) == [(8, (2, 4), 1), (6, (6, 1), 1)]


def test_a_video_has_the_grid_of_its_frames(qwen):
    grids = {"video_grid_thw": torch.tensor([[3, 4, 8]]), "image_grid_thw": torch.ones(1, 3)}
    assert qwen.shapes("video", features(24), grids) == [(24, (2, 4), 3)]


def test_boxes_of_a_video_are_in_the_frames(qwen):
    boxes = qwen.boxes("video", 0, Shape(24, (2, 4), 3), {})
    assert torch.equal(boxes[:8], boxes[16:])
    assert boxes[13].tolist() == [0.25, 0.5, 0.5, 1.0]  # second frame, second row and column


def test_boxes_of_molmo2_are_in_the_overview_then_in_the_crops():
    family = find_family(model_of("molmo2"))
    arguments = {"image_grids": torch.tensor([[4, 4, 0, 0], [2, 2, 4, 8]])}
    boxes = family.boxes("image", 1, Shape(36, (1, 36)), arguments)
    assert boxes[3].tolist() == [0.5, 0.5, 1, 1]
    assert boxes[4 + 9].tolist() == [0.125, 0.25, 0.25, 0.5]
    assert len(family.boxes("image", 0, Shape(16, (4, 4)), arguments)) == 16
    videos = {"video_grids": torch.tensor([[3, 2, 2]])}
    (shape,) = family.shapes("video", features(12), videos)
    assert shape == (12, (2, 2), 3)
    assert family.boxes("video", 0, shape, videos)[5].tolist() == [0.5, 0, 1, 0.5]


def test_new_images_of_a_later_turn_have_the_last_grids(qwen):
    """The grids are those of the conversation, since positions need them all."""
    grids = {"image_grid_thw": torch.tensor([[1, 4, 8], [1, 12, 2]])}
    assert qwen.shapes("image", features(6), grids) == [(6, (6, 1), 1)]


def test_boxes_of_a_later_turn_are_counted_from_the_last():
    family = find_family(model_of("molmo2"))
    arguments = {"image_grids": torch.tensor([[2, 2, 4, 8], [1, 2, 2, 2]])}
    boxes = family.boxes("image", -1, Shape(6, (1, 6)), arguments)
    assert torch.equal(boxes, torch.cat((cells(1, 2), cells(2, 2))))


def test_features_without_grids_are_a_square_or_a_row(qwen):
    assert qwen.shapes("image", features(16, 8), {}) == [(16, (4, 4), 1), (8, (1, 8), 1)]


def test_a_grid_that_does_not_fit_is_refused(qwen):
    grids = {"image_grid_thw": torch.tensor([[1, 4, 8]])}
    with pytest.raises(
        InputError, match=r"image_grid_thw says 1 x 2 x 4 visual tokens.*7 features"
    ):
        qwen.shapes("image", features(7), grids)
