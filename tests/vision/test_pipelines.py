"""Pipelines of transformers run with an attached model, on images that local processors read."""

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, pipeline
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

import foveate
from foveate.methods import ToMe
from tests.vision import dense, encoders
from tests.vision.encoders import WIDE
from tests.vision.kinds import KINDS, build

SIZE = {"height": 48, "width": 48}


def vit():
    return ViTForImageClassification(ViTConfig(**WIDE, initializer_range=0.2, num_labels=5))


def dpt():
    return dense.build(dense.dpt_own)


def depth_anything():
    return dense.build(dense.depth_anything)


def kind(name):
    return lambda: build(KINDS[name].heads)


DEPTH = DPTImageProcessorPil(size=SIZE, ensure_multiple_of=1)
PIPELINES = {
    "image-classification-vit": (lambda: build(vit), ViTImageProcessorPil(size=SIZE)),
    "image-classification-beit": (kind("beit"), BeitImageProcessorPil(size=SIZE, crop_size=SIZE)),
    "depth-estimation-dpt": (dpt, DEPTH),
    "depth-estimation-depth_anything": (depth_anything, DEPTH),
    "object-detection-yolos": (kind("yolos"), YolosImageProcessorPil(size=SIZE, do_pad=False)),
    "image-segmentation-beit": (
        kind("beit-shared"), BeitImageProcessorPil(size=SIZE, crop_size=SIZE)
    ),
}  # fmt: skip


def values(answer):
    """All numbers of an answer."""
    if isinstance(answer, dict):
        return [n for key in sorted(answer) for n in values(answer[key])]
    if isinstance(answer, list):
        return [n for entry in answer for n in values(entry)]
    if isinstance(answer, Image.Image):
        return np.asarray(answer).flatten().tolist()
    if isinstance(answer, torch.Tensor):
        return answer.flatten().tolist()
    return [answer] if isinstance(answer, int | float) else []


def agree(run, model, source, **options):
    """A pipeline answers as without a session if nothing is merged, and otherwise if it is."""
    plain = values(run(source, **options))
    with foveate.use(model, ToMe(r=0)):
        assert values(run(source, **options)) == plain
    with foveate.use(model, ToMe(r=8)) as session:
        merged = values(run(source, **options))
        assert session.record.encoder_tokens[-1][1] < session.record.encoder_tokens[0][0]
    assert merged != plain
    assert values(run(source, **options)) == plain


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_run_with_an_attached_model(name):
    make, processor = PIPELINES[name]
    task, model = name.rsplit("-", 1)[0], make()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    options = {"threshold": 0.0} if task == "object-detection" else {}
    agree(pipeline(task, model=model, image_processor=processor), model, image, **options)


def film(path, frames=10, height=24, width=48):
    """Write a video of a bright square that moves over a drawn ground."""
    ground = np.random.default_rng(0).integers(0, 120, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            picture = ground.copy()
            picture[8:16, 4 * number : 4 * number + 8] = 255
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("name", ["videomae", "vivit"])
def test_video_pipelines_run_with_an_attached_model(name, tmp_path):
    path = film(tmp_path / "film.mp4")
    model = kind(name)() if name in KINDS else encoders.build(encoders.HEADS, name)
    sides = (24, 24) if name == "videomae" else (24, 48)
    size = dict(zip(("height", "width"), sides, strict=True))
    processor = VideoMAEImageProcessorPil(size=size, do_center_crop=False)
    run = pipeline("video-classification", model=model, image_processor=processor)
    agree(run, model, path, top_k=5)
