"""Hooks on image features: what happens when a model's encoder has run.

Signals are collected there, and tokens removed as soon as all is known that budgets need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine import features
from foveate.engine.compilation import untraced
from foveate.engine.extensions.checkpointing import Replays
from foveate.engine.grouping import images_in
from foveate.engine.images import Image
from foveate.engine.inputs import (
    bound,
    cached,
    placeholders,
    real_positions,
)
from foveate.engine.plan import Plan
from foveate.engine.prompt_context import PromptContext
from foveate.engine.question import QuestionText
from foveate.engine.readout import prompt_ends, readout
from foveate.engine.reduce_features import mark
from foveate.engine.replaced_forward import bypassed
from foveate.engine.state import Args, Kwargs
from foveate.engine.tags import Tags
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.forward import Encoding
from foveate.engine.vision.hooks import VisionAttachment
from foveate.errors import BudgetError, InputError
from foveate.families import Family
from foveate.record.record import Record
from foveate.signals.clip import ClipQuestions


class FeatureHooks:
    """What a session knows, and its hooks where features are made.

    Args:
        plan: what to do where.
        family: the model.
        vision: the part that shortens the stream inside the encoder, if one does.
        clip: what is asked, as CLIP embeds it, if a method wants to know.
    """

    look_after: Callable[[], None]  # the attachment's

    def __init__(
        self,
        plan: Plan,
        family: Family,
        vision: VisionAttachment | None = None,
        clip: ClipQuestions | None = None,
    ) -> None:
        self.plan = plan
        self.family = family
        self.vision = vision
        self.tags = Tags(plan, family, vision)
        self.replays = Replays()
        self.labelled_logits = False  # whether logits are made for labels alone, in training
        self._local = ThreadState()
        self._last: Record | None = None
        self._clip = clip

    @property
    def record(self) -> Record | None:
        """The last forward over a prompt: this thread's, or else any thread's."""
        return self._local.record or self._last

    @property
    def clip(self) -> ClipQuestions | None:
        """What is asked: what this thread was told, or else what the session began with."""
        return self._local.clip or self._clip

    @clip.setter
    def clip(self, questions: ClipQuestions) -> None:
        self._local.clip = questions

    @untraced
    def features(
        self, modality: str, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around `get_image_features` and `get_video_features`.

        Signals are collected, and tokens removed as soon as all is known that budgets need.
        """
        local = self._local
        if local.encoding:  # a model that encodes videos as images
            return original(*args, **kwargs)
        stack = ExitStack()
        try:
            arguments, rows, passes = self._collect(stack, modality, original, args, kwargs)
            output = original(*args, **kwargs)
        finally:
            self._local.encoding = False
            stack.close()
        return self._encoded(modality, output, arguments, rows, passes)

    @torch.compiler.disable
    def _collect(
        self,
        stack: ExitStack,
        modality: str,
        original: Callable[..., Any],
        args: Args,
        kwargs: Kwargs,
    ) -> tuple[Kwargs, dict[tuple[str, int], Tensor], list[Encoding]]:
        """Before features are made: the arguments by name, and what fills with signals and with
        passes of the encoder as long as the stack is open.
        """
        self.look_after()
        if self.vision is not None:
            self.vision.look_after()
        self._check_encoding(modality)
        arguments = bound(original, args, kwargs)
        local, signals, vision = self._local, self.tags.signals, self.vision
        local.encoding, local.given = True, None
        rows = {} if signals is None else stack.enter_context(signals.collect())
        if vision is None:
            return arguments, rows, []
        read = self._read_of(modality)
        return arguments, rows, stack.enter_context(vision.collect(modality, arguments, read))

    @torch.compiler.disable
    def _encoded(
        self,
        modality: str,
        output: Any,
        arguments: dict[str, Any],
        rows: dict[tuple[str, int], Tensor],
        passes: list[Encoding],
    ) -> Any:
        """After features were made: tag them, and remove tokens if budgets can be known."""
        local, signals = self._local, self.tags.signals
        if signals is not None and len(rows) < signals.count:
            raise self.tags.unmapped(modality)
        if self.vision is not None and not passes:
            raise bypassed(self.vision.root)
        if getattr(output, "pooler_output", None) is None:  # a tuple, asked for by a user's call
            return output
        self.tags.tag(modality, output, arguments, rows, passes, local.given)
        local.given = None
        if local.now.inside or not self.plan.waits:
            self._mark(modality, output)
        if local.now.inside:
            local.now.encoded[modality] = output
        local.awaited = not local.now.inside and local.requests is not None
        return output

    def enter_projector(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the projector: keep what it is given, for methods that merge that."""
        if self._local.encoding:
            self._local.given = args[0]

    def _mark(self, modality: str, output: Any) -> None:
        """Run the pre_llm steps on encoder output, and mark what is dropped, once."""
        local = self._local
        visual = local.now.visual.get(modality)
        if visual is None:  # `generate` encodes before it calls the model
            lengths = output.encoded.lengths
            read, last = self._read_of(modality), torch.tensor(lengths).cumsum(0) - 1
            is_read = [False] * len(lengths)
            if read is not None and len(read) == sum(lengths):
                is_read = read[last].tolist()
            required = [n - 1 if of else -1 for n, of in zip(lengths, is_read, strict=True)]
            images = [Image(number, 0, required=token) for number, token in enumerate(required)]
            context = PromptContext(images, range(len(images)))
            mark(output, self.plan, context, self._deliver)
            return
        source = features.members(output, visual, self._expanded(visual.shape[0]))
        request = self._request(visual.shape[0])
        shapes = [output.encoded.shapes[i] for i in source]
        images = images_in(visual, shapes, request, local.now.readout)
        question = None
        if self.plan.waits and not output.marked:
            question = self._question(images, output, source)
        labelled = local.supervised is not None
        context = PromptContext(images, source, question, self.clip, labelled)
        mark(output, self.plan, context, self._deliver)

    def _deliver(self, name: str, values: Tensor) -> Tensor:
        """A signal (G, L, C, V) of the encoder, in the shape that it has for methods."""
        assert self.tags.signals is not None
        return self.tags.signals.deliver(name, values, self.clip)

    def _question(
        self, images: Sequence[Image], output: Any, source: Sequence[int]
    ) -> tuple[QuestionText, Tensor]:
        """The text after images of an encoder's output, and its (B, Q, D) embeddings."""
        local, now = self._local, self._local.now
        rows, ends = [image.row for image in images], [image.end for image in images]
        assert now.prompt is not None  # as in every forward over a prompt
        ids, arguments = now.prompt
        visual = anywhere(now.visual)
        real = self._real(visual.shape[1])
        if local.supervised is not None:
            real = ~local.supervised if real is None else real & ~local.supervised
        last = None
        if local.supervised is None:
            last = prompt_ends(visual, real, local.trailing, now.sample)
        question = QuestionText.of(visual, real, local.trailing, rows, ends, now.sample, last)
        table = self.family.base.get_input_embeddings()
        embeds = question.embeddings(table, ids, arguments.get("inputs_embeds"))
        if question.last is None:
            return question, embeds
        tokens = features.tokens_of(output, source)
        return question, question.with_images(embeds, visual, rows, ends, tokens)

    def _read_from(
        self, visual: Mapping[str, Tensor], prompt: tuple[Tensor | None, Kwargs]
    ) -> Tensor | None:
        """(B, T) visual tokens that a next token is read from; `None` if there are none.

        Args:
            visual: modality -> (B, T) placeholders.
            prompt: ids and arguments of the base model, or of `generate`.
        """
        local, everything = self._local, anywhere(visual) if visual else None
        training = self.family.base.training and torch.is_grad_enabled()
        if everything is None or (training and local.supervised is not None):
            return None  # the loss is that of what is left, each token read from the one before
        real = _real_of(prompt[1], everything.shape[1])
        drafts = local.trailing if local.now.inside else 0
        return readout(everything, real, drafts, local.supervised, local.now.sample)

    def _read_of(self, modality: str) -> Tensor | None:
        """(N) which of the N visual tokens of a modality a next token is read from, in order of
        appearance; `None` if none is, or the prompt is not known.
        """
        local, now = self._local, self._local.now
        visual, read = now.visual, now.readout
        if not now.inside:
            if local.asked is None:
                return None
            visual = placeholders(self.family, *local.asked, {})
            read = self._read_from(visual, local.asked)
        return None if read is None or modality not in visual else read[visual[modality]]

    def _real(self, length: int) -> Tensor | None:
        """(B, T) positions of the forward that are no padding, or `None` for all."""
        assert self._local.now.prompt is not None  # as in every forward over a prompt
        return _real_of(self._local.now.prompt[1], length)

    def _expanded(self, batch: int) -> int:
        """Rows per request: more than one under beam search or several returned sequences."""
        requests = self._local.requests
        return batch // requests if requests and batch % requests == 0 else 1

    def _request(self, batch: int) -> Callable[[int], int]:
        expanded = self._expanded(batch)
        return lambda row: row // expanded

    def _check_requests(self, batch: int) -> None:
        rows = batch // self._expanded(batch)
        if self.clip is not None:
            self.clip.check(rows)
        for keep in self.plan.per_request:
            if len(keep.values) != rows:
                raise BudgetError(
                    f"per_request has {len(keep.values)} entries, but the batch has {rows} rows; "
                    "give one for each row, "
                    "also for rows without an image"
                )

    def _check_encoding(self, modality: str) -> None:
        """Refuse features whose place in the prompt is not known."""
        now = self._local.now
        if not now.inside or (modality in now.visual and modality not in now.encoded):
            return
        raise InputError(
            f"{self.family.model_type} encodes {modality}s for which the prompt has no {modality} "
            f"placeholders; supported here: {', '.join(self.family.placeholder_ids)}. A model that "
            "encodes videos as images cannot be served with videos: run them without a session"
        )


def _real_of(arguments: Kwargs, length: int) -> Tensor | None:
    """(B, T) positions of a forward, or of a call of `generate`, that are no padding."""
    total = length + cached(arguments.get("past_key_values"))
    real = real_positions(arguments.get("attention_mask"), total)
    return None if real is None else real[:, -length:]


def anywhere(masks: Mapping[str, Tensor]) -> Tensor:
    """(B, T) where some modality has a placeholder."""
    return functools.reduce(torch.logical_or, masks.values())
