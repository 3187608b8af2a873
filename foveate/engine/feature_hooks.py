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

from foveate.clip import ClipQuestions
from foveate.engine import features
from foveate.engine.encoding import Encoding
from foveate.engine.features import Asker
from foveate.engine.images import rows_of
from foveate.engine.inputs import (
    bound,
    real_positions,
)
from foveate.engine.part import is_compiled, untraced
from foveate.engine.plan import Plan
from foveate.engine.question import Question
from foveate.engine.replay import Replays
from foveate.engine.state import Args, Kwargs, Local
from foveate.engine.tags import Tags
from foveate.engine.vision import VisionPart
from foveate.errors import BudgetError, InputError
from foveate.models import Family
from foveate.record import Record


class FeatureHooks:
    """What a session knows, and its hooks where features are made.

    Args:
        plan: what to do where.
        family: the model.
        vision: the part that shortens the stream inside the encoder, if one does.
        clip: what is asked, as CLIP embeds it, if a method wants to know.
    """

    look_after: Callable[[], None]  # this and the next are the part's
    compiled: bool

    def __init__(
        self,
        plan: Plan,
        family: Family,
        vision: VisionPart | None = None,
        clip: ClipQuestions | None = None,
    ) -> None:
        self.plan = plan
        self.family = family
        self.vision = vision
        self.tags = Tags(plan, family, vision)
        self.replays = Replays()
        self.labelled_logits = False  # whether logits are made for labels alone, in training
        self._local = Local()
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
        self.compiled |= is_compiled()
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
        self._check_encoding(modality)
        arguments = bound(original, args, kwargs)
        local, signals, vision = self._local, self.tags.signals, self.vision
        local.encoding, local.given = True, None
        rows = {} if signals is None else stack.enter_context(signals.collect())
        if vision is None:
            return arguments, rows, []
        return arguments, rows, stack.enter_context(vision.collect(modality, arguments))

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
        """Run the pre_llm steps on encoder output, and mark what is gone, once."""
        visual = self._local.now.visual.get(modality)
        if visual is None:  # `generate` encodes before it calls the model
            everything = range(len(output.encoded.lengths))
            asker = Asker([0] * len(everything), everything, lambda row: row)
            features.mark(output, self.plan, asker, self._deliver)
            return
        source = features.members(output, visual, self._expanded(visual.shape[0]))
        rows, ends = rows_of(visual, [output.encoded.shapes[i] for i in source])
        question = self._question(rows, ends) if self.plan.waits else None
        request = self._request(visual.shape[0])
        labelled = self._local.supervised is not None
        asker = Asker(rows, source, request, ends, question, self.clip, labelled)
        features.mark(output, self.plan, asker, self._deliver)

    def _deliver(self, name: str, values: Tensor) -> Tensor:
        """A signal (G, L, C, V) of the encoder, in the shape that it has for methods."""
        assert self.tags.signals is not None
        values = self.tags.signals.deliver(name, values)
        if not name.startswith("clip"):
            return values
        assert self.clip is not None  # the session has checked it
        return self.clip.patches(values, normed=name == "clip_patches")

    def _question(self, rows: Sequence[int], ends: Sequence[int]) -> tuple[Question, Tensor]:
        """The text behind images, and its (B, Q, D) embeddings."""
        local, now = self._local, self._local.now
        assert now.prompt is not None  # as in every forward over a prompt
        ids, arguments = now.prompt
        visual = anywhere(now.visual)
        real = self._real(visual.shape[1])
        if local.supervised is not None:
            real = ~local.supervised if real is None else real & ~local.supervised
        question = Question.of(visual, real, local.trailing, rows, ends, now.sample)
        table = self.family.base.get_input_embeddings()
        return question, question.embeddings(table, ids, arguments.get("inputs_embeds"))

    def _real(self, length: int) -> Tensor | None:
        """(B, T) positions of the forward that are no padding, or `None` for all."""
        assert self._local.now.prompt is not None  # as in every forward over a prompt
        mask = self._local.now.prompt[1].get("attention_mask")
        real = real_positions(mask, mask.shape[-1] if isinstance(mask, Tensor) else length)
        return None if real is None else real[:, -length:]

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


def anywhere(masks: Mapping[str, Tensor]) -> Tensor:
    """(B, T) where some modality has a placeholder."""
    return functools.reduce(torch.logical_or, masks.values())
