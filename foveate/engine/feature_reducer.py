"""FeatureReducer: remove tokens from image features, given what is known of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.engine import features
from foveate.engine.cache_argument import cache_of
from foveate.engine.grouping import images_in
from foveate.engine.images import Image
from foveate.engine.inputs import cached, placeholders, prompt_tokens, tells
from foveate.engine.plan import Plan
from foveate.engine.prompt import PromptContext, QuestionText
from foveate.engine.reduce_features import mark
from foveate.engine.thread_state import ThreadState
from foveate.engine.total import Room
from foveate.families import Family
from foveate.families.family import AUDIO
from foveate.signals.encoder_hooks import EncoderSignals


class FeatureReducer:
    """Runs the pre_llm steps on encoder output, as soon as all is known that they need.

    Args:
        plan: what to do where.
        family: the model.
        state: what each thread is doing with the model.
        signals: signals of the encoder, if a method reads any.
    """

    def __init__(
        self, plan: Plan, family: Family, state: ThreadState, signals: EncoderSignals | None
    ) -> None:
        self.plan, self.family, self.state = plan, family, state
        self._signals = signals

    def reduce(self, modality: str, output: Any) -> None:
        """Run the steps on encoder output and mark what is dropped, once; steps that read the
        prompt wait until the model is called with it.

        Args:
            modality: `image`, `video` or `audio`.
            output: tagged output of the encoder.
        """
        now = self.state.now
        if self.plan.waits and not now.inside:
            return
        visual = now.visual.get(modality)
        if visual is None:  # `generate` encodes before it calls the model
            context = self._without_prompt(modality, output.encoded.lengths)
        else:
            context = self._within_prompt(modality, output, visual)
        mark(output, self.plan, context, self._deliver)

    def _without_prompt(self, modality: str, lengths: Sequence[int]) -> PromptContext:
        """What is known of images that are encoded before the model is called."""
        read, last = self.read_of(modality), torch.tensor(lengths).cumsum(0) - 1
        is_read = [False] * len(lengths)
        if read is not None and len(read) == sum(lengths):
            is_read = read[last].tolist()
        required = [n - 1 if of else -1 for n, of in zip(lengths, is_read, strict=True)]
        images = [Image(number, 0, required=token) for number, token in enumerate(required)]
        return PromptContext(images, range(len(images)))

    def _within_prompt(self, modality: str, output: Any, visual: Tensor) -> PromptContext:
        """What is known of images whose (B, T) placeholders are."""
        state, now = self.state, self.state.now
        source = now.images_of(output, visual)
        shapes = [output.encoded.shapes[i] for i in source]
        images = images_in(visual, shapes, now.request_of, now.readout, audio=modality == AUDIO)
        question = None
        if self.plan.waits and not output.marked:
            question = self._question(images, output, source)
        labelled, room = state.supervised is not None, self._room(len(visual))
        return PromptContext(images, source, question, state.clip, labelled, state.training, room)

    def _room(self, rows: int) -> Room | None:
        """What the rows of a forward may hold; `None` for any number of visual tokens."""
        now, total = self.state.now, self.plan.total
        if total is None:
            return None
        assert now.prompt is not None  # as in every forward over a prompt
        cache = cache_of(now.prompt[1])
        return Room.of(total, cache, cached(cache), rows, now.request_of)

    def _deliver(self, name: str, values: Tensor) -> Tensor:
        """A signal (G, L, C, V) of the encoder, in the shape that it has for methods."""
        assert self._signals is not None
        return self._signals.deliver(name, values, self.state.clip)

    def _question(
        self, images: Sequence[Image], output: Any, source: Sequence[int]
    ) -> tuple[QuestionText, Tensor]:
        """The text after images of an encoder's output, and its (B, Q, D) embeddings."""
        now = self.state.now
        rows, ends = [image.row for image in images], [image.end for image in images]
        assert now.prompt is not None  # as in every forward over a prompt
        assert now.tokens is not None
        ids, arguments = now.prompt
        told = now.tokens.question_text(rows, ends)
        given = arguments.get("inputs_embeds")
        prompt = given if ids is None else ids
        assert prompt is not None  # the model needs one of them
        question = told.on(prompt.device)
        embeds = question.embeddings(self.family.base.get_input_embeddings(), ids, given)
        if told.last is None:
            return question, embeds
        tokens = features.tokens_of(output, source)
        return question, told.with_images(embeds, now.tokens.visual, rows, ends, tokens)

    def read_of(self, modality: str) -> Tensor | None:
        """(N) which of the N visual tokens of a modality a next token is read from, in order of
        appearance; `None` if none is, or the prompt is not known.
        """
        now, prompt = self.state.now, self.state.generate.prompt
        visual, read = now.visual, now.readout
        if not now.inside:
            if prompt is None:
                return None
            now.read.fetch(tells(*prompt))
            visual = placeholders(self.family, *prompt, {}, now.read)
            read = prompt_tokens(visual, prompt[1], now.read)[0].readout if visual else None
        return None if read is None or modality not in visual else read[visual[modality]]
