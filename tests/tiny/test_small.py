"""The deeper packaged model reads words, compares images, takes rules and follows videos."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from foveate import tiny
from foveate.bench.judge import is_right
from foveate.bench.prompt import Prompter, prompts
from foveate.bench.sample import Sample
from foveate.bench.tasks import get_task
from foveate.loading import load_model, load_skeleton
from foveate.measure.checkpoints import EMBEDDED
from recipes.evaluate import accuracy, held_out

ASKED = 24
LEAST = {
    "words": 0.7, "multi-image": 0.7, "in-context": 0.8, "video-event": 0.6, "video-order": 0.8,
}  # fmt: skip
"""Share of right answers, far below what was measured and far above a guess."""


@pytest.fixture(scope="module")
def small() -> Any:
    return load_model("small")


def _said(loaded: Any, samples: list[Sample]) -> tuple[list[str], float]:
    """What a model answers, and the share that is right."""
    model, processor = loaded
    prompter, said, right = Prompter(processor), [], 0
    for first in range(0, len(samples), 8):
        asked = [prompts(s, prompter.videos)[0] for s in samples[first : first + 8]]
        inputs = prompter.first(asked)
        with torch.inference_mode():
            out = model.generate(**inputs)
        words = prompter.decode(out[:, inputs["input_ids"].shape[1] :])
        said += words
        right += sum(
            is_right(word, p.asked.answer, p.asked.choices)
            for word, p in zip(words, asked, strict=True)
        )
    return said, right / len(samples)


def _grey(sample: Sample) -> Sample:
    def hidden(image: Any) -> Any:
        if isinstance(image, Image.Image):
            return Image.new("RGB", image.size, (128, 128, 128))
        return tuple(hidden(frame) for frame in image)

    return replace(sample, images=tuple(hidden(image) for image in sample.images))


@pytest.mark.parametrize("name", LEAST)
def test_it_answers_from_what_is_shown(small, name):
    samples = [get_task(name).sample(seed) for seed in range(ASKED)]
    right = _said(small, samples)[1]
    assert right >= LEAST[name]
    assert _said(small, [_grey(sample) for sample in samples])[1] <= right - 0.3


def test_it_has_not_forgotten_single_scenes(small):
    right, asked = accuracy(*small, held_out(64))["all"]
    assert right / asked >= 0.9


def test_a_video_is_answered_like_its_frames(small):
    samples = [get_task("video-order").sample(seed) for seed in range(8)]
    film = load_model("small-video")
    assert film[0].config.model_type == "llava_next_video"
    assert _said(film, samples)[0] == _said(small, samples)[0]


def test_it_is_what_its_name_loads(small):
    again, _ = tiny.load(size="small")
    assert all(map(torch.equal, again.state_dict().values(), small[0].state_dict().values()))
    assert set(EMBEDDED) == {*tiny.PACKAGED, tiny.VIDEO}
    for name in EMBEDDED:
        loaded, skeleton = load_model(name)[0], load_skeleton(name)
        assert skeleton.config.model_type == loaded.config.model_type
        assert sum(p.numel() for p in skeleton.parameters()) == loaded.num_parameters()
    assert sum(file.stat().st_size for file in tiny.PACKAGED["small"].iterdir()) < 20e6
