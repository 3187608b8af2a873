"""FeatureHooks: what happens where a model makes features of images and videos.

Signals of the encoder are collected there, and tokens removed as soon as all is known that budgets
need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.transfer import tables, upload
from foveate.engine import features
from foveate.engine.audio import clips
from foveate.engine.compilation import untraced
from foveate.engine.feature_reducer import FeatureReducer
from foveate.engine.inputs import bound, tells
from foveate.engine.replaced_forward import bypassed, forward_of
from foveate.engine.state import Args, Kwargs
from foveate.engine.tags import Tags
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.forward import Encoding
from foveate.engine.vision.hooks import VisionAttachment
from foveate.errors import InputError
from foveate.families import Family
from foveate.families.family import AUDIO
from foveate.families.projection import project

Rows = dict[tuple[str, int], Tensor]  # (signal, encoder layer) -> what was collected of it


class FeatureHooks:
    """Hooks around `get_image_features` and `get_video_features`, and before the projector.

    Args:
        family: the model.
        state: what each thread is doing with the model.
        tags: what tags encoder output.
        reducer: what removes tokens from it.
        vision: the side that shortens the stream inside the encoder, if a method does.
        look_after: puts back hooks of the text side that others have taken off.
    """

    def __init__(
        self,
        family: Family,
        state: ThreadState,
        tags: Tags,
        reducer: FeatureReducer,
        vision: VisionAttachment | None,
        look_after: Callable[[], None],
    ) -> None:
        self.family, self.state, self.tags = family, state, tags
        self._reducer, self._vision, self._look_after = reducer, vision, look_after

    @untraced
    def features(
        self, modality: str, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around the method of the base model that makes the features of a modality."""
        if self.state.making_features:  # a model that encodes videos as images
            return original(*args, **kwargs)
        stack = ExitStack()
        try:
            arguments, rows, passes = self._collect(stack, modality, original, args, kwargs)
            output = original(*args, **kwargs)
        finally:
            self.state.making_features = False
            stack.close()
        return self._made(modality, output, arguments, rows, passes)

    @torch.compiler.disable
    def _collect(
        self,
        stack: ExitStack,
        modality: str,
        original: Callable[..., Any],
        args: Args,
        kwargs: Kwargs,
    ) -> tuple[Kwargs, Rows, list[Encoding]]:
        """Before features are made: the arguments by name, and what fills with signals and with
        passes of the encoder as long as the stack is open.
        """
        self._look_after()
        if self._vision is not None:
            self._vision.look_after()
        self._check_placed(modality)
        state, signals, vision = self.state, self.tags.signals, self._vision
        arguments = self._read(bound(original, args, kwargs))
        state.making_features, state.projector_input = True, None
        rows = {} if signals is None else stack.enter_context(signals.collect())
        if vision is None:
            return arguments, rows, []
        read = self._reducer.read_of(modality)
        return arguments, rows, stack.enter_context(vision.collect(modality, arguments, read))

    @torch.compiler.disable
    def _made(
        self,
        modality: str,
        output: Any,
        arguments: dict[str, Any],
        rows: Rows,
        passes: list[Encoding],
    ) -> Any:
        """After features were made: tag them, and remove tokens if budgets can be known."""
        state, signals = self.state, self.tags.signals
        if signals is not None and len(rows) < signals.count:
            raise self.tags.unmapped(modality)
        if self._vision is not None and not passes:
            raise bypassed(self._vision.root)
        project(self.family, modality, output)
        if features.pooled(output) is None:  # a tuple, asked for by a user's call
            return output
        self.tags.tag(modality, output, arguments, rows, passes, state.projector_input)
        state.projector_input = None
        self._reducer.reduce(modality, output)
        if state.now.inside:
            state.now.encoded[modality] = output
        if state.made is not None:
            state.made[modality] = output
        state.generate.awaited = not state.now.inside and state.generate.requests is not None
        return output

    @untraced
    def heard(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the method of the base model that makes the features of audio, which it calls only
        once the prompt is known.
        """
        output, now = original(*args, **kwargs), self.state.now
        return self._heard(output, bound(original, args, kwargs)) if now.inside else output

    @torch.compiler.disable
    def _heard(self, output: Any, arguments: dict[str, Any]) -> Any:
        """After features of audio were made: tag them, and remove tokens.

        Raises:
            InputError: the prompt has no such audio.
        """
        self._look_after()
        self._check_placed(AUDIO)
        now = self.state.now
        lengths, rows = clips(now.visual), output.pooler_output
        if sum(lengths) != len(rows):
            raise InputError(
                f"the prompt has {sum(lengths)} audio placeholders, but audio has {len(rows)} "
                "tokens; pass input_features as the processor returned them with the prompt, "
                "and no prefill_chunk_size"
            )
        features.check_order(lengths, now.visual[AUDIO], now.expanded)
        alike = output.get("last_hidden_state") is rows  # some models place the one, some the other
        self.tags.tag_audio(output, arguments, lengths)
        self._reducer.reduce(AUDIO, output)
        if alike:
            output.last_hidden_state = output.pooler_output
        now.encoded[AUDIO] = output
        return output

    @untraced
    def placed(
        self, modality: str, module: nn.Module, before: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of the forward of a module that puts features in the embeddings of a prompt."""
        place, now = forward_of(module, before), self.state.now
        if modality not in now.visual:
            return place(*args, **kwargs)
        mask, found = now.visual[modality], list[Tensor]()

        @functools.wraps(module.forward)
        def encode(*args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
            embeds = place(*args, **kwargs)
            arguments = self._read(bound(module.forward, args, kwargs))
            lengths = self.family.lengths(modality, arguments)
            features.check_order(lengths, mask, now.expanded)
            found.append(embeds)
            there = upload(mask.flatten().nonzero()[:, 0], embeds.device)
            rows: Any = embeds.flatten(0, 1).index_select(0, there).split(lengths)
            return BaseModelOutputWithPooling(pooler_output=rows)

        output = self.features(modality, encode, *args, **kwargs)
        if output.encoded.pixels is not None:  # of images that are repeated for each beam
            pixels = output.encoded.pixels[:: now.expanded]
            output.encoded = replace(output.encoded, pixels=pixels)
        rows = features.feature_rows(features.pooled(output))
        return found[0].masked_scatter(upload(mask[..., None], rows.device), rows)

    def _read(self, arguments: Kwargs) -> Kwargs:
        """Arguments with copies on the host of those that it reads, and of the prompt of `generate`
        with them.
        """
        now, prompt = self.state.now, self.state.generate.prompt
        listed = tables(arguments, self.family.placed_by)
        if listed and prompt is not None and not now.inside:
            now.read.fetch((*tells(*prompt), *listed.values()))
        return now.read.arguments(arguments, self.family.placed_by)

    def enter_projector(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the projector: keep what it is given, for methods that merge that."""
        if self.state.making_features:
            self.state.projector_input = args[0]

    def late_projector(
        self, modality: str, module: nn.Module, before: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the forward of a late projector: features that were projected when they were
        made, and have lost tokens since.
        """
        made = self.state.now.encoded.get(modality)
        if made is None:
            return forward_of(module, before)(*args, **kwargs)
        return features.feature_rows(made.pooler_output)

    def _check_placed(self, modality: str) -> None:
        """Refuse features whose place in the prompt is not known."""
        now = self.state.now
        if not now.inside or (modality in now.visual and modality not in now.encoded):
            return
        raise InputError(
            f"{self.family.model_type} encodes {modality}s for which the prompt has no {modality} "
            f"placeholders; supported here: {', '.join(self.family.placeholder_ids)}. A model that "
            "encodes videos as images cannot be served with videos: run them without a session"
        )
