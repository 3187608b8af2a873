"""What a family cannot serve says so, and says what to do."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

import foveate
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import find_family
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.towers import SIDE, pictures
from tests.methods_for_tests import EveryThird


@pytest.mark.parametrize("model_type", ["perception_lm", "fast_vlm"])
def test_a_missing_package_is_named(model_type, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    vision = SimpleNamespace(model_type="timm_wrapper")
    config = SimpleNamespace(model_type=model_type, vision_config=vision)
    with pytest.raises(UnsupportedModelError, match=f"{model_type}.*timm.*pip install timm"):
        find_family(SimpleNamespace(config=config))


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("method", ["fastv", EveryThird(4)], ids=str)
def test_videos_that_are_encoded_as_images_are_refused(method, with_image):
    """Their tokens would be pruned in place of those of images, or not at all."""
    member = MEMBERS["perception_lm"]()
    model = member.build()
    ids = [5, *[member.image_id + 1] * 32, 6, 7]
    pixels = {"pixel_values_videos": pictures(1, 2, 3, SIDE, SIDE)}
    if with_image:
        ids += [*[member.image_id] * 32, 8]
        pixels["pixel_values"] = pictures(1, 2, 3, SIDE, SIDE, seed=1)
    inputs = {"input_ids": torch.tensor([ids]), **pixels}
    model(**inputs)
    with foveate.use(model, method), pytest.raises(InputError, match="videos as images"):
        model(**inputs)
    model(**inputs)


@pytest.mark.parametrize("name", ["llava_next_video-video", "video_llava-video"])
def test_class_tokens_that_say_nothing_of_a_videos_tokens_are_refused(name, monkeypatch):
    """A learned pooling, or a tower whose class tokens are visual tokens themselves."""
    member = MEMBERS[name]()
    config = member.config()
    config.spatial_pool_mode = "conv"
    monkeypatch.setattr(member, "config", lambda: config)
    model = member.build()
    pixels = member.pixels(1)
    ids = torch.tensor([[5, *[member.image_id] * member.counts(model, pixels)[0], 6, 7]])
    with (
        foveate.use(model, "fastervlm"),
        pytest.raises(UnsupportedModelError, match="cannot be told for the video tokens"),
    ):
        model(input_ids=ids, **pixels)
    with foveate.use(model, "fastv") as run:
        model(input_ids=ids, **pixels)
    assert len(run.kept) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("aria", "which the encoder of this aria cannot give: visual tokens are learned queries"),
        ("got_ocr2", "this got_ocr2 cannot give: visual tokens are made by convolutions"),
        ("lfm3_vl", "this lfm3_vl cannot give: convolutions among the layers of its encoder"),
    ],
)
def test_an_encoder_that_cannot_be_read_says_why(name, why):
    with pytest.raises(UnsupportedModelError, match=f"visionzip.*{why}.*that work here: "):
        foveate.use(model_of(name), "visionzip")
