"""What a method would do, planned from counts alone."""

import pytest
import torch

import foveate
from foveate.engine.planning import make_plan
from foveate.errors import BudgetError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.planned import planned
from foveate.methods import FastV, PixelPrune, ToMe
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


def test_all_tokens_are_planned_where_pixels_decide():
    pixels = MEMBERS["llava"]().pixels(2)
    record = plan_of("llava", PixelPrune(), pixels)
    assert sizes(record) == [16] * 2
    assert {rows for layer in record.encoder_tokens for rows in layer} == {17}


@pytest.mark.parametrize("keep", [0.5, 9])
@pytest.mark.parametrize("name", ["gemma3", "internvl", "llava"])
def test_rows_inside_the_encoder_are_those_of_a_session(name, keep):
    """A token may be a cell of several rows, which go together."""
    model, pixels = model_of(name), MEMBERS[name]().pixels(1)
    want = plan_of(name, ToMe(keep=keep), pixels)
    ids = torch.tensor(
        [[5, *[MEMBERS[name].image_id] * sum(image.total for image in want.images), 6]]
    )
    extra = {"token_type_ids": (ids == MEMBERS[name].image_id).int()} if name == "gemma3" else {}
    with torch.no_grad(), foveate.use(model, ToMe(keep=keep)) as run:
        model(input_ids=ids, **pixels, **extra)
    assert run.record.encoder_tokens == want.encoder_tokens
    last = [[len([*image.kept.values()][-1]) for image in of.images] for of in (run.record, want)]
    assert last[0] == last[1]


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


@pytest.mark.parametrize("total", [9, 14, 100])
@pytest.mark.parametrize("methods", [[EveryThird(6)], [EveryThird(6), FastV(2, 0.5)]], ids=str)
def test_a_total_is_divided_as_in_a_session(total, methods):
    model, pixels = model_of("llava"), MEMBERS["llava"]().pixels(3)
    family = find_family(model)
    want = planned(family, make_plan(family, methods, total), pixels, 2)
    ids = torch.tensor([[5, *[MEMBERS["llava"].image_id] * 48, 6]])
    with torch.no_grad(), foveate.use(model, methods, keep_total=total) as run:
        model(input_ids=ids, **pixels)
    assert want.layer_tokens == run.record.layer_tokens
    for got, image in zip(want.images, run.record.images, strict=True):
        assert {site: len(kept) for site, kept in got.kept.items()} == {
            site: len(kept) for site, kept in image.kept.items()
        }


def test_a_total_without_a_token_for_each_image_is_refused():
    family = find_family(model_of("llava"))
    with pytest.raises(BudgetError, match="less than one visual token for each of the 3 images"):
        planned(family, make_plan(family, [EveryThird(6)], 2), MEMBERS["llava"]().pixels(3))
