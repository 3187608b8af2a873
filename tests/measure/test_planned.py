"""What a method would do, planned from counts alone."""

import pytest

from foveate.engine.planning import make_plan
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.measure.planned import planned
from tests.conformance.test_families import model_of
from tests.conformance.zoo import MEMBERS
from tests.methods_for_tests import EveryThird, Listed


def plan_of(name, method, pixels):
    family = find_family(model_of(name))
    return planned(family, make_plan(family, [method]), pixels)


def sizes(record):
    return [len(next(iter(image.kept.values()))) for image in record.images]


def test_images_of_one_size_are_planned_inside_the_encoder():
    pixels = MEMBERS["llava"]().pixels(3)
    record = plan_of("llava", Listed(keep=5), pixels)
    assert sizes(record) == [5] * 3


def test_images_of_two_sizes_are_refused_inside_the_encoder_alone():
    """How many tokens of each survive there depends on how each is cut."""
    pixels = MEMBERS["llava_next"]().pixels(2)
    record = plan_of("llava_next", EveryThird(keep=0.5), pixels)
    totals = [image.total for image in record.images]
    assert len(set(totals)) == 2
    assert sizes(record) == [total // 2 for total in totals]
    with pytest.raises(UnsupportedModelError, match="depends on the images"):
        plan_of("llava_next", Listed(), pixels)


def test_images_in_one_sequence_are_refused_inside_the_encoder():
    with pytest.raises(UnsupportedModelError, match="depends on the images"):
        plan_of("qwen2_vl", Listed(), MEMBERS["qwen2_vl"]().pixels(1))
