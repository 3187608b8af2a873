"""From a sample to what a processor takes, for any model.

A conversation is laid out with the processor's chat template, or as lines where there is none.
Where a model takes no video, its frames are images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from PIL import Image

from foveate.bench.sample import Sample, Turn
from foveate.errors import InputError

Message = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """An image or a video as one entry of a prompt.

    Args:
        image: which of the sample's images.
        frame: which frame of it, where a video is shown frame by frame.
        frames: frames of a video that is shown as one, else 1.
        pixels: what is shown.
    """

    image: int
    frame: int | None
    frames: int
    pixels: Image.Image | tuple[Image.Image, ...]


@dataclass(frozen=True)
class Prompt:
    """What is put before a model at once: examples with their answers, and one question.

    Args:
        turns: examples, then the turn that is asked.
        shown: images in order of appearance.
        number: which turn of the sample is asked.
    """

    turns: tuple[Turn, ...]
    shown: tuple[tuple[Shown, ...], ...]
    number: int

    @property
    def asked(self) -> Turn:
        """The turn that is asked."""
        return self.turns[-1]

    @property
    def images(self) -> list[Shown]:
        """All images of the prompt, in order of appearance."""
        return [image for turn in self.shown for image in turn]


def prompts(sample: Sample, videos: bool) -> list[Prompt]:
    """The prompts of a sample, one for each question that is asked.

    Args:
        sample: what is asked.
        videos: whether the model takes videos.

    Raises:
        InputError: nothing is asked, or an example comes after a question.
    """
    found: list[Prompt] = []
    waiting: list[Turn] = []
    for number, turn in zip(count(), sample.turns, strict=False):
        waiting.append(turn)
        if not turn.given:
            shown = tuple(_shown(sample, each, videos) for each in waiting)
            found.append(Prompt(tuple(waiting), shown, number))
            waiting = []
    if not found or waiting:
        raise InputError(f"sample {sample.seed} of task {sample.task} does not end in a question")
    return found


def _shown(sample: Sample, turn: Turn, videos: bool) -> tuple[Shown, ...]:
    entries: list[Shown] = []
    for number in turn.images:
        image = sample.images[number]
        if isinstance(image, Image.Image):
            entries.append(Shown(number, None, 1, image))
        elif videos:
            entries.append(Shown(number, None, len(image), tuple(image)))
        else:
            entries += [Shown(number, n, 1, frame) for n, frame in enumerate(image)]
    return tuple(entries)


@dataclass(frozen=True)
class Prompter:
    """Makes model inputs with one processor.

    Args:
        processor: the model's.
        hint: put after every question, such as "Answer with one word."
    """

    processor: Any
    hint: str = ""

    @property
    def videos(self) -> bool:
        """Whether the model takes videos."""
        return getattr(self.processor, "video_processor", None) is not None

    def first(self, batch: Sequence[Prompt]) -> Any:
        """Inputs of the first question of each row, padded on the left.

        Raises:
            InputError: the processor cannot lay the prompts out.
        """
        texts = [self._text(self._messages(prompt)) for prompt in batch]
        return self._process(texts, batch)

    def further(self, batch: Sequence[Prompt]) -> Any:
        """Inputs of the next question of each row, to go after what was said before."""
        before = [{"role": "user", "content": [_words("?")]}, _reply("yes")]
        start = self._text(before, ask=False)
        texts = []
        for prompt in batch:
            whole = self._text([*before, *self._messages(prompt)])
            texts.append(whole[len(start) :] if whole.startswith(start) else whole)
        return self._process(texts, batch)

    def decode(self, tokens: Any) -> list[str]:
        """(B, T) generated tokens as text."""
        return [
            text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)
        ]

    def _messages(self, prompt: Prompt) -> list[Message]:
        messages: list[Message] = []
        for turn, shown in zip(prompt.turns, prompt.shown, strict=True):
            kinds = ["image" if isinstance(s.pixels, Image.Image) else "video" for s in shown]
            question = f"{turn.question} {self.hint}".strip()
            content = [*({"type": kind} for kind in kinds), _words(question)]
            messages.append({"role": "user", "content": content})
            if turn.given:
                messages.append(_reply(turn.answer))
        return messages

    def _text(self, messages: list[Message], ask: bool = True) -> str:
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=ask, tokenize=False
            )
        lines = []
        for message in messages:
            for part in message["content"]:
                token = getattr(self.processor, f"{part['type']}_token", f"<{part['type']}>")
                lines.append(part["text"] if part["type"] == "text" else token)
        return "".join(f"{line}\n" for line in lines[:-1]) + lines[-1] + ("" if ask else "\n")

    def _process(self, texts: list[str], batch: Sequence[Prompt]) -> Any:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        bos = getattr(tokenizer, "bos_token", None)
        laid_out = bool(getattr(self.processor, "chat_template", None))
        images = [[s.pixels for s in p.images if s.frames == 1] for p in batch]
        films = [[list(s.pixels) for s in p.images if s.frames > 1] for p in batch]  # type: ignore[arg-type]
        media: dict[str, Any] = {}
        if any(images):
            media["images"] = images
        if any(films):
            media["videos"] = [film for row in films for film in row]
        if not media:
            tokenizer.padding_side = "left"
            return tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        special = not (laid_out and bos and texts[0].startswith(bos)) and not laid_out
        return self.processor(
            text=texts, padding=True, padding_side="left", return_tensors="pt",
            add_special_tokens=special, **media,
        )  # fmt: skip


def _words(text: str) -> Message:
    return {"type": "text", "text": text}


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": [_words(text)]}
