"""Apertus 1.5: grids of codes, which come with transformers 5.24 (`make newest`)."""

import pytest
import torch

import foveate
from foveate.errors import InputError
from foveate.families import find_family
from tests.conformance.zoo import ABSENT, MEMBERS
from tests.methods_for_tests import EveryThird

NAME = "apertus1p5"
pytestmark = pytest.mark.skipif(NAME in ABSENT, reason="needs a newer transformers: make newest")


@pytest.fixture(scope="module")
def model():
    return MEMBERS[NAME]().build()


@torch.no_grad()
def test_grids_are_as_high_and_wide_as_images(model):
    pixels = MEMBERS[NAME]().pixels(3)  # 24 x 32, 32 x 24 and 24 x 24, a code for 8 x 8
    with foveate.use(model, EveryThird(4)):
        output = model.get_image_features(**pixels, return_dict=True)
    assert output.encoded.shapes == [(12, (3, 4), 1), (12, (4, 3), 1), (9, (3, 3), 1)]


def test_sizes_that_do_not_fit_features_are_refused(model):
    sizes, features = torch.tensor([[24, 32]]), [torch.zeros(11, 64)]
    with pytest.raises(InputError, match="image_sizes says 3 x 4 visual tokens, but there are 11"):
        find_family(model).shapes("image", features, {"image_sizes": sizes})
