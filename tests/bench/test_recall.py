"""Evidence recall on grids made by hand."""

import pytest
import torch

from foveate.bench.recall import covered_area, seen_box, token_hit
from foveate.record.boxes import cells


def area_recall(boxes, kept, evidence):
    """Share of the evidence's area that survivors cover; `None` where no token covers any."""
    areas = [covered_area(boxes, kept, box) for box in evidence]
    seen, covered = (sum(column) for column in zip(*areas, strict=True))
    return min(covered / seen, 1.0) if seen > 0 else None


def kept(*index, total=16):
    survivors = torch.zeros(total, dtype=torch.bool)
    survivors[list(index)] = True
    return survivors


def test_a_box_over_two_cells_is_recalled_by_the_area_that_survives():
    box = (0.125, 0.0, 0.5, 0.25)  # half of cell 0, all of cell 1
    assert area_recall(cells(4, 4), kept(0), [box]) == pytest.approx(1 / 3)
    assert area_recall(cells(4, 4), kept(1), [box]) == pytest.approx(2 / 3)
    assert area_recall(cells(4, 4), kept(0, 1), [box]) == pytest.approx(1)
    assert area_recall(cells(4, 4), kept(15), [box]) == 0


def test_two_passes_over_an_image_count_once():
    boxes = torch.cat((cells(1, 1), cells(2, 2)))
    box = (0.0, 0.0, 0.5, 0.5)
    assert area_recall(boxes, kept(0, total=5), [box]) == pytest.approx(1)
    assert area_recall(boxes, kept(0, 1, total=5), [box]) == pytest.approx(1)
    assert area_recall(boxes, kept(2, total=5), [box]) == 0


def test_tokens_without_a_place_cover_nothing():
    boxes = torch.cat((cells(2, 2), torch.full((1, 4), torch.nan)))
    assert area_recall(boxes, kept(4, total=5), [(0, 0, 1, 1)]) == 0


def test_evidence_outside_of_what_was_seen_has_no_recall():
    assert area_recall(cells(2, 2), kept(0, total=4), [(1.1, 0, 1.4, 0.5)]) is None


def test_a_hit_is_one_token_of_a_piece():
    pieces = [(0.0, 0.0, 0.5, 0.25), (0.5, 0.5, 1.0, 1.0)]
    assert token_hit(cells(4, 4), kept(1), pieces) == 0.5
    assert token_hit(cells(4, 4), kept(1, 15), pieces) == 1


def test_boxes_follow_crop_and_padding():
    from PIL import Image

    wide = Image.new("RGB", (200, 100))
    assert seen_box(wide, (50, 0, 150, 100), "crop", 1.0) == (0, 0, 1, 1)
    assert seen_box(wide, (0, 0, 200, 100), "pad", 1.0) == (0, 0.25, 1, 0.75)
    assert seen_box(wide, (0, 0, 100, 50), "resize", 1.0) == (0, 0, 0.5, 0.5)
