"""Tiles of LFM2-VL and slices of MiniCPM-V: which tiles of a prompt are of one image, and where
they lie.
"""

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
    """Ids as the processor writes them, and spans, of images with so many rows and columns."""
    ids, spans = [5, 7], []

    def crop(first, last):
        ids.append(first)
        spans.append((len(ids), len(ids) + tokens))
        ids.extend([90] * tokens)
        ids.append(last)

    for rows, columns in grids:
        ids += [80, 3, 81]  # the image's number
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
    found = find_family(model_of(name)).tilings(*written(grids))
    assert found == [Tiling(1 + r * c, (r, c) if r else None) for r, c in grids]


def test_frames_of_a_video_are_no_slices():
    ids, spans = written([(0, 0)] * 3)
    for label in (80, 3, 81):
        while label in ids:
            ids.remove(label)
    spans = [(number, number + 1) for number, token in enumerate(ids) if token == 90]
    assert find_family(model_of("minicpmv4_6")).tilings(ids, spans) == [Tiling(1)] * 3


@torch.no_grad()
def test_boxes_of_slices_are_shares_of_the_image():
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


def tiles_of(grids, thumbnail):
    """Ids as LFM2-VL's processor writes them, and spans; names of ten tiles are reserved a row."""
    ids, spans = [5], []
    for rows, columns in grids:
        names = [20 + 10 * row + column for row in range(rows) for column in range(columns)]
        ids.append(81)
        for name in [*names, *([83] if names and thumbnail else [])] or [None]:
            ids += [] if name is None else [name]
            spans.append((len(ids), len(ids) + 2))
            ids += [90, 90]
        ids.append(82)
    return ids, spans


@pytest.mark.parametrize("thumbnail", [True, False])
@pytest.mark.parametrize(
    "grids", [[(2, 3), (0, 0), (1, 4)], [(3, 1), (1, 2)], [(2, 1)], [(2, 2), (5, 2)]], ids=str
)
def test_names_say_how_tiles_are_arranged(grids, thumbnail):
    found = find_family(model_of("lfm2_vl")).tilings(*tiles_of(grids, thumbnail))
    assert found == [
        Tiling(r * c + thumbnail, (r, c), thumbnail) if r else Tiling(1) for r, c in grids
    ]


def test_other_names_say_nothing():
    ids, spans = tiles_of([(2, 2)], thumbnail=True)
    for (start, _), name in zip(spans, (7, 3, 12, 6, 9), strict=True):
        ids[start - 1] = name
    assert find_family(model_of("lfm2_vl")).tilings(ids, spans) == [Tiling(5)]


@pytest.mark.parametrize("thumbnail", [True, False])
@torch.no_grad()
def test_boxes_of_tiles_are_shares_of_the_image(thumbnail):
    member, model = MEMBERS["lfm2_vl"](), model_of("lfm2_vl")
    count = 2 + thumbnail
    pixels = member.take(member.pixels(9), 0, 9)
    pixels = {name: value[::3][:count] for name, value in pixels.items()}
    ids, spans = tiles_of([(1, 2)], thumbnail)
    for start, _ in reversed(spans):
        ids[start : start + 2] = [90] * 16
    with foveate.use(model, EveryThird(1)) as run:
        model.model(input_ids=torch.tensor([ids]), **pixels)
    corners = [image.boxes[0, :2].tolist() for image in run.record.images]
    assert corners == [[0, 0], [0.5, 0], [0, 0]][:count]
    ends = [image.boxes[-1, 2:].tolist() for image in run.record.images]
    assert ends == [[0.5, 1], [1, 1], [1, 1]][:count]
