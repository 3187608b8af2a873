"""Loading what a command names: a model, its processor, images, a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.markup import escape

from foveate.cli.console import stderr
from foveate.core import Method
from foveate.io.images import load_image as open_image
from foveate.io.quoting import shown
from foveate.loading import load_skeleton, read_dtype
from foveate.run import use


def load_image(path: str | Path, max_pixels: int | None = None) -> Image.Image:
    """Open an image as `foveate.io.images` does; what it warns of is a note on stderr.

    Raises:
        InputError: there is no such file, it is no image, or it has more pixels than `max_pixels`.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = open_image(path, max_pixels=max_pixels, option="--max-pixels")
    for note in dict.fromkeys(shown(str(warning.message), 300) for warning in said):
        stderr().print(f"[yellow]note: {escape(note)}[/]", soft_wrap=True)
    return image


def check_model(name: str, methods: Sequence[Method], dtype: str) -> None:
    """Refuse a model or methods that do not work on it, before other processes load its weights.

    Raises:
        FoveateError: there is no such model or dtype, or a method does not work.
    """
    read_dtype(dtype)
    model = load_skeleton(name)
    if methods:
        use(model, methods)


def encode(processor: Any, images: Sequence[Image.Image], question: str, model: Any) -> Any:
    """Model inputs for one question about some images, on the model's device.

    Uses the processor's chat template; without one the prompt is an image placeholder per image,
    each on its own line, and the question.
    """
    if getattr(processor, "chat_template", None):
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content.append({"type": "text", "text": question})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        token = getattr(processor, "image_token", "<image>")
        prompt = f"{token}\n" * len(images) + question
        inputs = processor(images=list(images), text=prompt, return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    """Greedy answer to encoded inputs, without special tokens."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()
