"""A tiny vision-language model that ships with the package, and the scenes it understands.

It is an ordinary LLaVA of transformers with a few million weights: small enough for a laptop and
for tests, and trained well enough that dropping the wrong visual tokens costs accuracy.

Examples:
    >>> from foveate import tiny
    >>> model, processor = tiny.load()
    >>> scene = tiny.draw_scene(7)
    >>> question = scene.questions[0]
    >>> text = f"<image> {question.text}"
    >>> inputs = processor(images=scene.image, text=text, return_tensors="pt")
    >>> new = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    >>> answer = processor.decode(new[0], skip_special_tokens=True)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from foveate.tiny.objects import SceneObject
from foveate.tiny.questions import Question
from foveate.tiny.scenes import Scene, draw_scene

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextVideoForConditionalGeneration,
        LlavaProcessor,
    )

    from foveate.tiny.video import VideoProcessor

__all__ = ["PATH", "Question", "Scene", "SceneObject", "draw_scene", "load", "load_video"]

PATH = Path(__file__).parent / "weights"
"""Folder of the packaged model; `AutoModelForImageTextToText.from_pretrained` takes it too."""


def load(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> "tuple[LlavaForConditionalGeneration, LlavaProcessor]":
    """Load the packaged model; nothing is downloaded.

    Args:
        device: where to put the model; the CPU when left out.
        dtype: type of its weights. They are stored in fp16.

    Returns:
        The model in evaluation mode, and its processor.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(
        PATH, dtype=dtype, local_files_only=True
    )
    processor = AutoProcessor.from_pretrained(PATH, local_files_only=True)
    return model.to(device or "cpu").eval(), processor


def load_video(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> "tuple[LlavaNextVideoForConditionalGeneration, VideoProcessor]":
    """Load the packaged model as one that takes videos; see `foveate.tiny.video`.

    Args:
        device: where to put the model; the CPU when left out.
        dtype: type of its weights.

    Returns:
        The model in evaluation mode, and its processor. A frame has 256 visual tokens.
    """
    from foveate.tiny.video import for_videos

    model, processor = for_videos(*load())
    return cast(Any, model).to(device or "cpu", dtype), processor
