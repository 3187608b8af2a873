"""Reports and FLOPs of what happened inside an encoder."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.families import find_family
from foveate.measure.account import account
from foveate.methods import ClsDrop, PyramidDrop, ToMe
from tests.methods_for_tests import Listed
from tests.tinies import prompts
from tests.vision.encoders import ENCODERS, HEADS, build, images


def counted(fn):
    """FLOPs of all matrix products; needs eager attention: the counter misses the CPU's kernel."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", [None, Listed(layer=0), Listed(layer=2, inside=True)])
@pytest.mark.parametrize(
    "name",
    [
        "vit",
        "deit",
        "dinov2",
        "dinov2-registers",
        "clip",
        "vit_msn",
        "ijepa",
        "ast",
        "vivit",
        "vit_mae",
        "metaclip_2",
        "clipseg",
        "owlvit",
        "owlv2",
        "mlcd",
        "dinov3_vit",
    ],
)
def test_predicted_flops_equal_the_ones_torch_counts(name, method):
    model, inputs = build(ENCODERS, name, "eager"), images(2, name=name)
    with foveate.use(model, method or Listed(keep=1.0)) as run:
        count = counted(lambda: model(**inputs))
    assert account(run.record, run.family, run.methods).total == count


def test_an_encoder_alone_is_reported():
    model = build(HEADS, "vit")
    with foveate.use(model, ToMe(r=5)) as run:
        assert "no forward has run" in str(run.report())
        model(**images())
    report = run.report()
    assert json.loads(report.to_json()) == report
    assert [image["tokens"] for image in report["images"]] == [36] * 3
    assert list(report["images"][0]["after"].values()) == [31, 26, 21, 16]
    work = report["flops"]
    assert work["before"] == work["tower"]["before"] > work["after"] == work["tower"]["after"]
    assert "in encoder layers 0 to 3" in " ".join(str(report).split())


def test_class_scores_are_counted():
    model = build(HEADS, "vit")
    with foveate.use(model, ClsDrop()) as run:
        model(**images())
    assert run.report()["flops"]["selection"] == 3 * 2 * 32 * 37


def test_a_shorter_tower_is_reported_beside_the_language_model(llava):
    with foveate.use(llava, [ToMe(r=6), PyramidDrop()]) as run:
        llava(**prompts([[5, 7], [2, 3, 9]]))
    work = run.report()["flops"]
    assert work["vision"] == sum(work[part]["before"] for part in ("tower", "projector"))
    assert work["vision_after"] == sum(work[part]["after"] for part in ("tower", "projector"))
    assert work["tower"]["after"] < work["tower"]["before"]
    assert work["projector"]["after"] == work["projector"]["before"] > 0


def test_what_is_left_is_drawn():
    model = build(HEADS, "clip")
    with foveate.use(model, ToMe(r=5)) as run:
        model(**images(1))
    assert find_family(model).grid(36) == (6, 6)
    (drawing,) = run.show(Image.new("RGB", (48, 48)), geometry="resize")
    assert drawing.width > 4 * 300


@pytest.mark.parametrize("method", [ToMe(r=5), ToMe(r=0)])
def test_images_that_are_not_square_have_their_grid(method):
    model = build(ENCODERS, "dinov2")
    with torch.no_grad(), foveate.use(model, method) as run:
        out = model(torch.randn(2, 3, 48, 80))
    assert out.last_hidden_state.shape[1] == 61
    assert [image.grid for image in run.record.images] == [(6, 10)] * 2


def test_sounds_lie_on_a_grid_of_frequencies_and_times():
    model = build(HEADS, "ast")
    with torch.no_grad(), foveate.use(model, ToMe(r=5)) as run:
        model(**images(2, name="ast"))
    assert [(image.grid, image.frames) for image in run.record.images] == [((4, 9), 1)] * 2


def test_videos_have_frames_of_tubelets():
    model = build(HEADS, "vivit")
    with torch.no_grad(), foveate.use(model, ToMe(r=5)) as run:
        model(**images(2, name="vivit"))
    assert [(image.grid, image.frames) for image in run.record.images] == [((3, 6), 2)] * 2
    video = [Image.new("RGB", (48, 24))] * 4
    first, _ = run.show([video, video])  # a strip of panels for each frame
    assert first.height > first.width / 4
