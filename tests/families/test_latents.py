"""Queries that read an image have no place in it."""

import pytest
import torch

import foveate
from foveate.errors import UnsupportedModelError
from tests.conformance.test_pixels import model_of, prompt
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird


@pytest.mark.parametrize("name", ["aria", "deepseek_ocr2", "idefics2"])
def test_queries_have_no_boxes(name):
    inputs, counts = prompt(name)
    with torch.no_grad(), foveate.use(model_of(name), EveryThird(4)) as run:
        model_of(name).model(**fresh(inputs))
    assert [image.grid for image in run.record.images] == [(1, count) for count in counts]
    assert all(bool(image.boxes.isnan().all()) for image in run.record.images)
    assert str(run.report())


@pytest.mark.parametrize("name", ["aria", "deepseek_vl_hybrid", "got_ocr2", "idefics2"])
def test_acting_within_the_tower_is_refused_with_the_reason(name):
    with pytest.raises(UnsupportedModelError, match=r"learned queries|convolutions"):
        foveate.use(model_of(name), "tome")
