"""Training examples: conversations about images, from a jsonl file or from drawn scenes.

A line of a jsonl file is an object with `messages` (roles `user`, `assistant`, `system`; content a
string or a list of parts) or with LLaVA's `conversations` (`from`, `value`), and with `images` or
`image`: paths relative to the file. `<image>` in a text says where an image stands; without any,
the images stand before the first question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from foveate.errors import InputError
from foveate.io.images import as_rgb, load_image
from foveate.io.quoting import quoted, shown
from foveate.io.reading import parse_json, read_lines, reason

PLACEHOLDER = "<image>"
_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_TRAIN_SEEDS = 2**40  # scenes below are held out, as in `recipes.data`

Part = dict[str, str]
"""`{"type": "image"}` or `{"type": "text", "text": ...}`."""
_IMAGE: Part = {"type": "image"}  # shared by all image parts, of which a row may have many


@dataclass(frozen=True)
class Message:
    """What one side says.

    Args:
        role: `system`, `user` or `assistant`.
        parts: texts and images, in order.
    """

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def to_dict(self, text: str | None = None) -> dict[str, Any]:
        """As chat templates take it; `text`, if given, in place of what is said."""
        parts = self.parts if text is None else ({"type": "text", "text": text},)
        return {"role": self.role, "content": [dict(part) for part in parts]}


@dataclass(frozen=True)
class Example:
    """One conversation.

    Args:
        images: its images, or where they lie, in the order of the image parts.
        messages: at least one of them is the assistant's.
        where: what to call it in an error.
        max_pixels: most pixels of an image, see `foveate.io.images.load_image`.
    """

    images: tuple[Path | Image.Image, ...]
    messages: tuple[Message, ...]
    where: str = "example"
    max_pixels: int | None = None

    def open_images(self) -> list[Image.Image]:
        """Open its images, upright and in RGB, as `foveate.io.images` does.

        Raises:
            InputError: one cannot be read, or has too many pixels.
        """
        return [self._open(image) for image in self.images]

    def _open(self, image: Path | Image.Image) -> Image.Image:
        try:
            if isinstance(image, Image.Image):
                return as_rgb(image)
            return load_image(image, max_pixels=self.max_pixels, option="data.max_pixels")
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None


class Conversations(Sequence[Example]):
    """The conversations of a jsonl file; every line is checked at once, images load later.

    Args:
        path: the file.
        max_pixels: most pixels of an image, see `foveate.io.images.load_image`.

    Raises:
        InputError: the file or an image is missing, or a line is not as it must be; the message
            names the line.
    """

    def __init__(self, path: Path, max_pixels: int | None = None) -> None:
        name = shown(path)
        try:
            lines = read_lines(path)
        except FileNotFoundError:
            raise InputError(f"no such data file: {name}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {name} as a jsonl file: {reason(error)}") from None
        self._examples = [
            replace(_read(line, path, f"{name} line {number}"), max_pixels=max_pixels)
            for number, line in lines
        ]
        if not self._examples:
            raise InputError(f"{name} holds no conversations")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]


class Scenes(Sequence[Example]):
    """Conversations about scenes that are drawn when asked for: data that needs no file.

    Args:
        count: how many scenes.
        turns: most questions about one scene.
        seed: data of another seed shows other scenes.
    """

    def __init__(self, count: int, turns: int = 4, seed: int = 0) -> None:
        self._count, self.turns, self.seed = count, turns, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        from foveate.tiny import draw_scene

        if not 0 <= index < self._count:
            raise IndexError(index)
        seed = _TRAIN_SEEDS + self.seed * 10**9 + index
        scene = draw_scene(seed)
        questions = Random(seed).sample(scene.questions, min(self.turns, len(scene.questions)))
        messages: list[Message] = []
        for number, question in enumerate(questions):
            asked: tuple[Part, ...] = ({"type": "text", "text": question.text},)
            messages += [
                Message("user", asked if number else ({"type": "image"}, *asked)),
                Message("assistant", ({"type": "text", "text": question.answer},)),
            ]
        return Example((scene.image,), tuple(messages), f"scene {seed}")


def _read(line: str, path: Path, where: str) -> Example:
    """One line of a jsonl file as an example."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {reason(error)}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} must be an object, got {type(row).__name__}")
    said = row.get("messages", row.get("conversations"))
    if not isinstance(said, list) or not said:
        raise InputError(
            f"{where} needs a list `messages` or `conversations`, got {quoted([*islice(row, 9)])}"
        )
    images = _find_all(_image_names(row, where), path, where)
    messages = []
    for number, entry in enumerate(said):
        message, inline = _message(entry, f"{where}, message {number + 1}")
        messages.append(message)
        images += _find_all(inline, path, where)
    if not any(message.role == "assistant" and message.text for message in messages):
        raise InputError(f"{where} has no assistant message, so there is nothing to learn from it")
    return Example(tuple(images), _place(messages, len(images), where), where)


def _image_names(row: Mapping[str, Any], where: str) -> list[str]:
    names = row.get("images", row.get("image"))
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: `images` must be a list of paths, got {quoted(names)}")
    return names


def _find_all(names: Sequence[str], path: Path, where: str) -> list[Path]:
    """Paths of images; one that is named often is looked up once."""
    found = {name: _find(name, path, where) for name in dict.fromkeys(names)}
    return [found[name] for name in names]


def _find(name: str, path: Path, where: str) -> Path:
    """An image's path; it must exist."""
    if name.startswith(("http://", "https://", "data:")):
        raise InputError(f"{where}: {quoted(name)} is not a file; download images before training")
    found = path.parent / name.removeprefix("file://")
    try:
        there = found.is_file()
    except (OSError, ValueError):  # no name that a file could have
        there = False
    if not there:
        raise InputError(f"{where}: no such image file: {shown(found, 120)}")
    return found


def _message(entry: Any, where: str) -> tuple[Message, list[str]]:
    """A message, and the paths of images that stand in its parts."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object, got {type(entry).__name__}")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise InputError(f"{where}: the role must be one of {known}, got {quoted(role)}")
    inline: list[str] = []
    if isinstance(content, str):
        parts = list(_split(content))
    elif isinstance(content, list):
        parts, inline = _parts(content, where)
    else:
        raise InputError(
            f"{where}: the content must be a string or a list of parts, got {quoted(content)}"
        )
    if _ROLES[role] == "assistant" and any(part["type"] == "image" for part in parts):
        raise InputError(f"{where}: an assistant's message cannot hold an image")
    return Message(_ROLES[role], tuple(parts)), inline


def _parts(content: list[Any], where: str) -> tuple[list[Part], list[str]]:
    parts: list[Part] = []
    inline: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts += _split(part["text"])
        elif kind in ("image", "image_url"):
            source = part.get(kind, part.get("path", part.get("url")))
            source = source.get("url") if isinstance(source, dict) else source
            if not isinstance(source, str | None):
                raise InputError(f"{where}: an image must be a path, got {quoted(source)}")
            inline += [source] if source else []
            parts.append(_IMAGE)
        else:
            raise InputError(f"{where}: a part must be text or an image, got {quoted(part)}")
    return parts, inline


def _split(text: str) -> Iterator[Part]:
    """Cut a text at `<image>`; a line break beside an image goes, templates add their own."""
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            yield _IMAGE
        beside = piece.strip("\n") if PLACEHOLDER in text else piece
        if beside:
            yield {"type": "text", "text": beside}


def _place(messages: list[Message], images: int, where: str) -> tuple[Message, ...]:
    """Put images without a placeholder before the first question."""
    placeholders = sum(part["type"] == "image" for m in messages for part in m.parts)
    if placeholders == images:
        return tuple(messages)
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if placeholders or first is None:
        raise InputError(f"{where} has {images} images, but {placeholders} placeholders for them")
    before: tuple[Part, ...] = (_IMAGE,) * images
    messages[first] = Message("user", (*before, *messages[first].parts))
    return tuple(messages)
