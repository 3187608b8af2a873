"""Groups of images: what they know of their tokens at a step."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import foveate
from foveate.core import Reduction
from foveate.core.tokens import Shape
from foveate.engine.images import Image, ImageGroup, group_images
from foveate.methods import PyramidDrop
from tests.tinies import prompts, tiny_llava


def group(*images, index=((0, 2, 5), (1, 2, 3)), **fields):
    return ImageGroup(images, torch.tensor(index), Shape(6, (2, 3)), **fields)


@dataclass(frozen=True)
class Counting(PyramidDrop):
    """PyramidDrop that notes how often it is asked for a count."""

    asked: ClassVar[list] = []

    def count(self, remaining, total, step, number, row=0):
        self.asked.append((number, row))
        return super().count(remaining, total, step, number, row)


def test_counts_are_worked_out_once_for_each_image_and_step():
    Counting.asked.clear()
    model = tiny_llava()
    with foveate.use(model, Counting(layers=(2, 4), keep=(0.5, 0.25))):
        model(**prompts([(3, 5, 4), (6, 2)]))
    assert sorted(Counting.asked) == [(0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("required", "want"), [((5, -1), [2, -1]), ((0, 2), [0, 1]), ((4, 0), [-1, -1])]
)
def test_a_required_token_is_found_among_the_survivors(required, want):
    images = [Image(n, 0, required=token) for n, token in enumerate(required)]
    assert group(*images).required.tolist() == want
    none = group(*images, index=((), ())).required
    assert none.tolist() == [-1, -1]


def test_no_required_token_is_none():
    assert group(Image(0, 0), Image(1, 0)).required is None


def test_images_note_survivors_in_raster_order_without_padding():
    valid = torch.tensor([[True, False, True], [True, True, True]])
    index = ((5, 1, 0), (3, 1, 2))
    after = group(Image(0, 0), Image(1, 0), index=index, ordered=True, valid=valid).noted(
        "vision:1"
    )
    kept = [image.kept["vision:1"].tolist() for image in after.images]
    assert kept == [[0, 5], [1, 2, 3]]


def test_a_method_that_has_begun_does_not_begin_again():
    begun = group(Image(0, 0), Image(1, 0)).begun(4)
    fewer = begun.reduced(Reduction(torch.tensor([[0], [2]])), 4).begun(4).begun(7)
    assert [image.tokens_at_start for image in fewer.images] == [{4: 3, 7: 1}] * 2


def test_some_images_of_a_group_take_all_that_is_theirs():
    full = group(
        *(Image(n, row=n) for n in range(2)), columns=torch.tensor([[3, 4, 5], [7, 8, 9]]),
        labels={0: torch.tensor([[1, 2, 3], [4, 5, 6]])}, merged=torch.ones(2, 3),
        valid=torch.tensor([[True] * 3, [False] * 3]),
    )  # fmt: skip
    part = full.pick([1])
    assert part.rows == (1,)
    assert (part.index.tolist(), part.columns.tolist()) == ([[1, 2, 3]], [[7, 8, 9]])
    assert (part.labels[0].tolist(), part.valid.tolist()) == ([[4, 5, 6]], [[False] * 3])
    assert full.pick([0, 1]) is full


def test_images_of_other_shapes_counts_or_labels_are_apart():
    shapes = [Shape(6, (2, 3)), Shape(6, (3, 2)), *[Shape(6, (2, 3))] * 3]
    images = [Image(n, 0) for n in range(5)]
    index = [torch.arange(n) for n in (4, 4, 4, 3, 4)]
    labels = [{}, {}, {}, {}, {1: torch.zeros(4)}]
    groups = group_images(images, shapes, torch.device("cpu"), index, labels=labels)
    assert [of.numbers for of in groups] == [(0, 2), (1,), (3,), (4,)]
    unpruned = group_images(images, shapes, torch.device("cpu"))
    assert [(of.numbers, of.dropped) for of in unpruned] == [((0, 2, 3, 4), 0), ((1,), 0)]
