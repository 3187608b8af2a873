"""Two tiny vision-language models that ship with the package, and the scenes they understand.

Each is an ordinary LLaVA of transformers with a few million weights: small enough for a laptop and
for tests, and trained well enough that dropping the wrong visual tokens costs accuracy. `tiny`
answers about one image. `small` is deeper; it also reads words, compares the images of a
conversation, learns a rule from examples, and follows short videos.

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
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from foveate.errors import InputError
from foveate.io.quoting import quoted
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

__all__ = [
    "PACKAGED", "PATH", "VIDEO", "Question", "Scene", "SceneObject", "draw_scene", "load",
    "load_video",
]  # fmt: skip

PATH = Path(__file__).parent / "weights"
"""Folder of `tiny`; `AutoModelForImageTextToText.from_pretrained` takes it too."""

Size = Literal["tiny", "small"]
PACKAGED: dict[str, Path] = {"tiny": PATH, "small": Path(__file__).parent / "small"}
"""Folder of each packaged model, by its name."""

VIDEO = "small-video"
"""Name under which `small` is loaded as a model that takes videos."""


def load(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    size: Size = "tiny",
) -> "tuple[LlavaForConditionalGeneration, LlavaProcessor]":
    """Load a packaged model; nothing is downloaded.

    Args:
        device: where to put the model; the CPU when left out.
        dtype: type of its weights. They are stored in fp16.
        size: which one.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        InputError: there is no such model.
    """
    if size not in PACKAGED:
        raise InputError(f"size must be {' or '.join(PACKAGED)}, got {quoted(size)}")
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = PACKAGED[size]
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return model.to(device or "cpu").eval(), processor


def load_video(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    size: Size = "tiny",
) -> "tuple[LlavaNextVideoForConditionalGeneration, VideoProcessor]":
    """Load a packaged model as one that takes videos; see `foveate.tiny.video`.

    Args:
        device: where to put the model; the CPU when left out.
        dtype: type of its weights.
        size: which one; `tiny` sees frames, and not what happens from one to the next.

    Returns:
        The model in evaluation mode, and its processor. A frame has 256 visual tokens.
    """
    from foveate.tiny.video import for_videos

    model, processor = for_videos(*load(size=size))
    return cast(Any, model).to(device or "cpu", dtype), processor
