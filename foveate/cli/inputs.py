"""Loading what a command names: a model, its processor, images, a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from rich.markup import escape

from foveate.bench.prompt import Prompt, Prompter, Shown
from foveate.bench.sample import Turn
from foveate.cli.console import stderr
from foveate.core import Method
from foveate.core.saving import Saved
from foveate.errors import InputError
from foveate.io.images import load_image as open_image
from foveate.io.quoting import shown
from foveate.io.videos import is_video, load_video
from foveate.loading import load_skeleton, read_dtype
from foveate.run import use

Medium: TypeAlias = "Image.Image | list[Image.Image]"
"""An image, or the frames of a video."""
SOUNDS = (".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav", ".wma")
"""Ends of the names of sound files."""
SIDE = 128
"""Pixels of a side of the embedded model's scenes."""


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


def check_model(
    name: str, methods: Sequence[Method], dtype: str, keep_total: int | None = None
) -> None:
    """Refuse a model or methods that do not work on it, before other processes load its weights.

    Raises:
        FoveateError: there is no such model or dtype, or a method does not work.
    """
    read_dtype(dtype)
    model = load_skeleton(name)
    if methods:
        use(model, methods, keep_total=keep_total)


def limit_of(saved: Saved, given: int | None) -> int | None:
    """Most visual tokens of a prompt: `--keep-total`, or what --method's file says.

    Raises:
        InputError: the file says what acts on audio.
    """
    if saved.audio is not False:
        raise InputError(
            "the file says what acts on audio, but commands give a model images and videos alone; "
            "use it in Python (docs/audio.md), or take `audio` out of it"
        )
    return saved.keep_total if given is None else given


def load_media(paths: Sequence[str], frames: int, max_pixels: int | None = None) -> list[Medium]:
    """Images and videos of some paths; see `load_image` and `foveate.io.videos`.

    Args:
        paths: image files, video files, and folders of frames.
        frames: most frames of a video.
        max_pixels: most pixels of an image or a frame.

    Raises:
        InputError: a file cannot be read, or is sound.
    """
    for path in paths:
        if Path(path).suffix.lower() in SOUNDS:
            raise InputError(
                f"{shown(path, 100)} is sound, but commands give a model images and videos alone; "
                "give it to an omni model in Python (docs/audio.md)"
            )
    return [
        load_video(path, frames, max_pixels=max_pixels)
        if is_video(path)
        else load_image(path, max_pixels)
        for path in paths
    ]


def takes_videos(processor: Any) -> bool:
    """Whether a model takes videos; of others, the frames of a video are images."""
    return getattr(processor, "video_processor", None) is not None


def encode(processor: Any, media: Sequence[Medium], question: str, model: Any) -> Any:
    """Model inputs for one question about images and videos, on the model's device.

    Uses the processor's chat template; without one the prompt is a placeholder per image or video,
    each on its own line, and the question. A model that takes no video gets its frames as images.
    """
    if not takes_videos(processor):
        media = flat(media)
    if all(isinstance(medium, Image.Image) for medium in media):
        return _encode_images(processor, flat(media), question, model)
    turn = Turn(question, "", images=tuple(range(len(media))))
    made = [
        Shown(n, None, 1, medium)
        if isinstance(medium, Image.Image)
        else Shown(n, None, len(medium), tuple(medium))
        for n, medium in enumerate(media)
    ]
    inputs = Prompter(processor).first([Prompt((turn,), (tuple(made),), 0)])
    return inputs.to(model.device, model.dtype)


def flat(media: Sequence[Medium]) -> list[Image.Image]:
    """Images and frames, one by one."""
    return [
        frame
        for medium in media
        for frame in ([medium] if isinstance(medium, Image.Image) else medium)
    ]


def _encode_images(processor: Any, images: Sequence[Image.Image], question: str, model: Any) -> Any:
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


def notes_on_tiny(processor: Any, media: Sequence[Medium], question: str) -> list[str]:
    """What the embedded model was asked that it has never seen: words, or kinds of images."""
    told = []
    tokenizer = processor.tokenizer
    words = dict.fromkeys(
        word for word in question.lower().split() if tokenizer.unk_token in tokenizer.tokenize(word)
    )
    if words:
        told.append(
            f"the embedded model knows {len(tokenizer)} words, but not "
            f"{shown(', '.join(words), 90)}; ask as in `foveate demo`: what color is the star ?"
        )
    if any(image.size != (SIDE, SIDE) for image in flat(media)):
        told.append(
            f"the embedded model was trained on drawn scenes of {SIDE} x {SIDE} pixels only; its "
            "answers about other images are meaningless"
        )
    return told


def answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    """Greedy answer to encoded inputs, without special tokens."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()
