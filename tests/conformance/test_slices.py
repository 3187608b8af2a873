"""Slices of MiniCPM-V: which of a prompt's images are of one picture, and where they lie."""

import pytest
import torch

import foveate
from foveate.families import find_family
from foveate.record.tiles import Tiling
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.methods_for_tests import EveryThird

OPEN, CLOSE, SLICE, ENDED, BREAK = 92, 93, 94, 95, 89
NAMES = ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")


def written(grids, tokens=1):
    """Ids as the processor writes them, and spans, of pictures with so many rows and columns."""
    ids, spans = [5, 7], []

    def crop(first, last):
        ids.append(first)
        spans.append((len(ids), len(ids) + tokens))
        ids.extend([90] * tokens)
        ids.append(last)

    for rows, columns in grids:
        ids += [80, 3, 81]  # the picture's number
        crop(OPEN, CLOSE)
        for row in range(rows):
            ids += [BREAK] if row else []
            for _ in range(columns):
                crop(SLICE, ENDED)
    return ids, spans


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "grids", [[(0, 0)], [(2, 3)], [(1, 2), (0, 0), (3, 1)], [(0, 0), (0, 0), (2, 2)]], ids=str
)
def test_slices_follow_their_thumbnail(name, grids):
    found = find_family(model_of(name)).pictures(*written(grids))
    assert found == [Tiling(1 + r * c, (r, c) if r else None) for r, c in grids]


def test_frames_of_a_video_are_no_slices():
    ids, spans = written([(0, 0)] * 3)
    for label in (80, 3, 81):
        while label in ids:
            ids.remove(label)
    spans = [(number, number + 1) for number, token in enumerate(ids) if token == 90]
    assert find_family(model_of("minicpmv4_6")).pictures(ids, spans) == [Tiling(1)] * 3


@torch.no_grad()
def test_boxes_of_slices_are_shares_of_the_picture():
    name = "minicpm_ocr"
    member, model = MEMBERS[name](), model_of(name)
    width = 64 * 4
    pixels = {
        "pixel_values": torch.randn(1, 3, 4, 5 * width), "target_sizes": torch.tensor([[8, 8]] * 5),
    }  # fmt: skip
    ids, _ = written([(2, 2)], member.counts(model, pixels)[0])
    with foveate.use(model, EveryThird(1)) as run:
        model.model(input_ids=torch.tensor([ids]), **pixels)
    corners = [image.boxes.view(4, 4, 4)[0, 0, :2].tolist() for image in run.record.images]
    assert corners == [[0, 0], [0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5]]
    assert run.record.images[0].boxes[-1].tolist() == [0.75, 0.75, 1, 1]
    assert run.record.images[1].boxes[-1].tolist() == [0.375, 0.375, 0.5, 0.5]
