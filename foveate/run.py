"""Run a model with methods: `use` attaches them for a block, `apply` until `remove()`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from foveate.core.resolve import MethodLike, saved_of
from foveate.engine.session import BaseSession
from foveate.errors import InputError
from foveate.report.draw import show as draw
from foveate.report.report import Report
from foveate.signals.clip import ClipQuestions

if TYPE_CHECKING:
    from PIL.Image import Image


class Session(BaseSession):
    """Methods on a model, with reports of what they did.

    `use` and `apply` make sessions; the arguments are those of `BaseSession`.
    """

    def report(self) -> Report:
        """What happened to each image of the last prompt: tokens, FLOPs, KV bytes."""
        if self.record is None:
            return Report.empty(self.family, self.methods)
        return Report.of(self.record, self.family, self.methods, self._model.dtype)

    def show(
        self, images: Image | Sequence[Image | Sequence[Image]], geometry: str = "auto"
    ) -> list[Image]:
        """Draw the kept tokens of each stage on the images of the last prompt.

        Args:
            images: the images of the prompt, in order of appearance. A video is one of them: the
                list of its frames. Of images that the processor cut into tiles, all tiles can be
                passed instead.
            geometry: how the processor mapped an image to the token grid: `resize`, `crop`, `pad`,
                or `auto`.

        Raises:
            InputError: no prompt with images was run, or the number of images differs.
        """
        if self.record is None or not self.record.images:
            raise InputError("nothing to show: no prompt with an image was run in this session")
        return draw(self.record, [images] if not isinstance(images, Sequence) else images, geometry)


def use(
    model: PreTrainedModel,
    method: MethodLike,
    *,
    clip: ClipQuestions | None = None,
    keep_total: int | Sequence[int] | None = None,
    audio: bool | MethodLike = False,
    **fields: Any,
) -> Session:
    """Use methods on a model for the length of a `with` block.

    Args:
        model: a supported vision-language model or vision encoder.
        method: a method, its name or class, the dict of its `to_dict` or a JSON file that holds
            it, or a list of those in stream order; or a foveate.json, which may also say `audio`
            and `keep_total`.
        clip: the questions as `foveate.ClipText` encodes them, for methods with
            `relevance="clip"`.
        keep_total: most visual tokens that a row of the batch holds in the language model, together
            with those of earlier turns in the cache that it is given; a list has one for each row.
            Where images would have more, all shrink alike (docs/conversations.md). The last method
            before the language model must have a budget. `None` is any number, or what a
            foveate.json says.
        audio: `True` lets methods act on audio as on images, where the model takes some: a clip is
            an image of one row, and `keep` holds for it as for each image. A method, or what else
            `method` may be, acts on audio in their place, with a budget of its own
            (docs/audio.md). Otherwise audio stays as it is, or a foveate.json says what acts on
            it.
        **fields: the method's hyper-parameters, if `method` is a name.

    Returns:
        A session. Entering the `with` block attaches it; leaving the block restores the model.

    Raises:
        FoveateError: see `Session`; raised here, before anything runs.

    Examples:
        >>> with foveate.use(model, "fastv", layer=2, keep=0.25) as run:  # doctest: +SKIP
        ...     out = model.generate(**inputs)
        >>> print(run.report())  # doctest: +SKIP
    """
    saved = saved_of(method, **fields)
    total = saved.keep_total if keep_total is None else keep_total
    return Session(model, saved.methods, clip, total, saved.audio if audio is False else audio)


def apply(
    model: PreTrainedModel,
    method: MethodLike,
    *,
    clip: ClipQuestions | None = None,
    keep_total: int | Sequence[int] | None = None,
    audio: bool | MethodLike = False,
    **fields: Any,
) -> Session:
    """Use methods on a model until `remove()` of the returned session is called.

    Takes the arguments of `use`.
    """
    return use(model, method, clip=clip, keep_total=keep_total, audio=audio, **fields).attach()
