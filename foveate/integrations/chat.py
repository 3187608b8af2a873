"""A model that answers batches of conversations, with a method that removes visual tokens.

What evaluation harnesses need, without any of them: `foveate.integrations.lmms_eval` is made of it.
Messages are those of chat templates: a role, and parts of type `text`, `image` (an image or a
file) or `video` (a file).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.core.resolve import MethodLike, methods_of
from foveate.engine.cache_argument import CACHE
from foveate.errors import InputError
from foveate.families import find_family
from foveate.io.images import as_rgb, load_image
from foveate.io.quoting import shown
from foveate.run import use

Message = Mapping[str, Any]
Conversation = Sequence[Message]
GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample")
"""Generation settings that are passed on."""
_BASE64 = 64  # letters from which on a text that is no file may be an image itself


@dataclass(frozen=True)
class Answer:
    """What a model said to one conversation.

    Args:
        text: the answer.
        tokens: of the answer up to its end.
        visual_before: visual tokens of the conversation; `None` without a method.
        visual_after: those that survive the last step.
    """

    text: str
    tokens: int
    visual_before: int | None
    visual_after: int | None


class ChatModel:
    """A model, its processor and a method.

    Args:
        model: a supported vision-language model.
        processor: its processor.
        method: what removes visual tokens, as `foveate.use` takes it; `None` for all of them.
        frames: frames that are taken from a video.
        max_pixels: most pixels of a file's image, see `foveate.io.images.load_image`.
        keep_total: most visual tokens of a conversation; see `foveate.use`.

    Raises:
        InputError: there is a `keep_total`, but no method.
        FoveateError: the method does not work on the model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        method: MethodLike | None = None,
        frames: int = 32,
        max_pixels: int | None = None,
        keep_total: int | None = None,
    ) -> None:
        self.max_pixels, self.keep_total = max_pixels, keep_total
        self.model, self.processor, self.frames = model, processor, frames
        if method is None and keep_total is not None:
            raise InputError(
                "keep_total needs a method that acts before the language model, such as "
                "'divprune', or 'uniform' with keep=1.0"
            )
        self.method = None if method is None else methods_of(method)
        self._tokenizer = processor.tokenizer
        self._tokenizer.padding_side = "left"  # answers begin in the same column
        self._placeholders = find_family(model).placeholder_ids
        self.session()

    def session(self) -> AbstractContextManager[Any]:
        """What to run the model within."""
        if self.method is None:
            return nullcontext()
        return use(self.model, self.method, keep_total=self.keep_total)

    def answer(self, batch: Sequence[Conversation], **settings: Any) -> list[tuple[str, int]]:
        """Answers, and how many tokens each has.

        Args:
            batch: conversations that end with the user's turn.
            **settings: those of `GENERATION`, greedy without them, and `until`: strings at which an
                answer ends; others do not concern the model.
        """
        return [(answer.text, answer.tokens) for answer in self.ask(batch, **settings)]

    @torch.inference_mode()
    def ask(self, batch: Sequence[Conversation], **settings: Any) -> list[Answer]:
        """Answers with what was removed for them; takes the arguments of `answer`."""
        results: dict[int, Answer] = {}
        for members in _alike(batch):
            inputs = self.encode([batch[i] for i in members])
            with self.session() as run:
                out = self.model.generate(**inputs, **_generation(settings))
            new = out[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
            record = None if run is None else run.record
            for row, (i, text, tokens) in enumerate(
                zip(members, texts, self._lengths(new), strict=True)
            ):
                visual = (None, None) if record is None else record.visual_tokens(row)
                results[i] = Answer(_until(text, settings.get("until")), tokens, *visual)
        return [results[i] for i in range(len(batch))]

    @torch.inference_mode()
    def loss(self, conversation: Conversation, continuation: str) -> tuple[float, bool]:
        """Mean negative log-likelihood of a continuation's tokens, and whether greedy decoding
        gives them.

        The continuation follows the prompt token by token, without the template's end of a turn.

        Raises:
            InputError: the continuation has no tokens.
        """
        inputs = self.encode([conversation])
        encoded = self._tokenizer(continuation, add_special_tokens=False, return_tensors="pt")
        target = encoded["input_ids"].to(self.model.device)
        if not target.shape[1]:
            raise InputError(f"a continuation needs at least one token, got {continuation!r}")
        with self.session():  # the prompt alone decides what goes, as it does before an answer
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            parts, cache = [out.logits[0]], out[CACHE]
            if target.shape[1] > 1:
                out = self.model(input_ids=target[:, :-1], use_cache=True, **{CACHE: cache})
                parts.append(out.logits[0])
        logits = torch.cat(parts)
        loss = torch.nn.functional.cross_entropy(logits.float(), target[0])
        return float(loss), bool((logits.argmax(-1) == target[0]).all())

    def encode(self, batch: Sequence[Conversation]) -> dict[str, Any]:
        """Inputs of conversations, padded on the left, on the model's device.

        Raises:
            InputError: an image cannot be read, or the model takes no such medium.
        """
        media = [kind for one in batch for kind, _ in _media(one)]
        if "audio" in media:
            raise InputError(
                "conversations hold text, images and videos here, and no audio; call the model "
                "itself within foveate.use(model, method, audio=...)"
            )
        for kind in set(media) - set(self._placeholders):
            raise InputError(f"{self.model.config.model_type} takes no {kind} in a prompt")
        batch = [[self._with_images(message) for message in one] for one in batch]
        if getattr(self.processor, "chat_template", None):
            frames = {"num_frames": self.frames} if "video" in media else {}
            encoded = self.processor.apply_chat_template(
                [list(one) for one in batch],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, **frames},
            )
        else:
            encoded = self._plain(batch)
        return dict(encoded.to(self.model.device, self.model.dtype))

    def _plain(self, batch: Sequence[Conversation]) -> Any:
        """Without a chat template: an image placeholder per image, each on its line, and the
        text.
        """
        token = getattr(self.processor, "image_token", "<image>")
        found = [_media(one) for one in batch]
        if any(kind != "image" for row in found for kind, _ in row):
            raise InputError("this processor has no chat template; only images can be asked about")
        images = [value for row in found for _, value in row]
        texts = [
            f"{token}\n" * len(row) + _text(one) for row, one in zip(found, batch, strict=True)
        ]
        given = {"images": images} if images else {}
        return self.processor(text=texts, padding=True, return_tensors="pt", **given)

    def _with_images(self, message: Message) -> Message:
        """The message with its image files opened, as all of foveate opens them."""
        if isinstance(message["content"], str):
            return message
        parts = [
            {**part, "image": _open(part["image"], self.max_pixels)}
            if part["type"] == "image"
            else part
            for part in message["content"]
        ]
        return {**message, "content": parts}

    def _lengths(self, new: Tensor) -> list[int]:
        """Tokens of each answer up to its end."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])
        after = torch.isin(new, ends.to(new.device)).cumsum(1)
        return (after == 0).sum(1).tolist()


def _open(value: Any, max_pixels: int | None) -> Any:
    """An image of a message: a file, an address, base64 text or an image; arrays stay."""
    if isinstance(value, Image.Image):
        return as_rgb(value)
    if isinstance(value, Path):
        return load_image(value, max_pixels=max_pixels)
    if not isinstance(value, str):
        return value
    if value.startswith(("http://", "https://")):
        from transformers.image_utils import load_image as download

        try:
            return download(value)
        except Exception as error:  # of the network, or of the file after the address
            raise InputError(
                f"cannot read {shown(value, 100)} as an image: {shown(error, 100)}"
            ) from error
    inline = value.startswith("data:image/")
    if not inline and (len(value) < _BASE64 or _is_file(value)):
        return load_image(value, max_pixels=max_pixels)
    text = value.partition(",")[2] if inline else value
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise InputError(f"no such image file, and no base64 text: {shown(value, 100)}") from None
    return load_image(io.BytesIO(data), max_pixels=max_pixels, name="a base64 image")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a name too long
        return False


def _alike(batch: Sequence[Conversation]) -> list[list[int]]:
    """Members with the same kinds of media; processors cannot mix them in one batch."""
    groups: dict[frozenset[str], list[int]] = {}
    for number, one in enumerate(batch):
        groups.setdefault(frozenset(kind for kind, _ in _media(one)), []).append(number)
    return list(groups.values())


def _media(conversation: Conversation) -> list[tuple[str, Any]]:
    """(kind, value) of the images and videos of a conversation, in order."""
    parts = (p for m in conversation if not isinstance(m["content"], str) for p in m["content"])
    return [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]


def _text(conversation: Conversation) -> str:
    lines = []
    for message in conversation:
        content = message["content"]
        parts = content if not isinstance(content, str) else [{"type": "text", "text": content}]
        lines += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(lines)


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`: greedy where no temperature or sampling is asked for."""
    given = {n: settings[n] for n in GENERATION if settings.get(n) is not None}
    given.setdefault("max_new_tokens", 1024)
    warm = given.get("temperature", 0) > 0
    given["do_sample"] = bool(given.get("do_sample", warm))
    if not (given["do_sample"] and warm):
        given.pop("temperature", None)
    if not given["do_sample"]:
        for name in ("top_p", "top_k"):
            given.pop(name, None)
    return given


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """Text up to the first of some strings."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop:
            text = text.split(stop)[0]
    return text
