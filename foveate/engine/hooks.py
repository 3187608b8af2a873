"""ForwardHooks: what happens when a forward passes the text model and its layers.

Entering the text model makes a `ForwardPass`, or a `CachedForward` where nothing can be dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.tokens import Shape
from foveate.engine import features
from foveate.engine.attentions import check_maps
from foveate.engine.boxes import ImageBoxes
from foveate.engine.build_record import describe
from foveate.engine.cache_argument import CACHE, cache_of
from foveate.engine.cached_forward import CachedForward
from foveate.engine.caches import check_cache, is_pruned, slots_before
from foveate.engine.compilation import untraced
from foveate.engine.extensions.checkpointing import Replays
from foveate.engine.forward import ForwardPass
from foveate.engine.grouping import ModalityImages, find_images
from foveate.engine.images import ImageGroup
from foveate.engine.inputs import check_drafts, check_length
from foveate.engine.kernels import takes_2d_masks
from foveate.engine.layout import tokens_on, tokens_second
from foveate.engine.masks import numbered_positions, real_positions, seen_positions
from foveate.engine.plan import Plan
from foveate.engine.readout import check_readout
from foveate.engine.replaced_forward import bypassed, forward_of
from foveate.engine.rollback import Rollback
from foveate.engine.state import Args, Kwargs, Prompt, Told
from foveate.engine.tags import Tags
from foveate.engine.thread_state import ThreadState
from foveate.engine.total import forget_images
from foveate.errors import InputError
from foveate.families import Family
from foveate.families.decoder_layer import named_arguments
from foveate.families.family import AUDIO
from foveate.record.record import Record


class ForwardHooks:
    """Hooks around the text model, its rotary embedding and its layers.

    Args:
        plan: what to do where.
        family: the model.
        state: what each thread is doing with the model.
        tags: what tags encoder output.
    """

    def __init__(self, plan: Plan, family: Family, state: ThreadState, tags: Tags) -> None:
        self.plan, self.family, self.state, self.tags = plan, family, state, tags
        self.replays = Replays()
        self._last: Record | None = None

    @property
    def record(self) -> Record | None:
        """The last forward over a prompt: this thread's, or else any thread's."""
        return self.state.record or self._last

    @untraced
    def text(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the text model's forward: make a `ForwardPass`, or a `CachedForward`."""
        try:
            args, kwargs = self.enter_text(args, kwargs)
            return self.leave_text(forward_of(module, before)(*args, **kwargs))
        except BaseException:
            self.die()
            raise

    @torch.compiler.disable
    def die(self) -> None:
        """After a text model that has raised: leave the cache as it was."""
        now = self.state.now
        if now.rollback is not None:
            now.rollback.restore()
        now.forward = now.cached = now.rollback = None

    @torch.compiler.disable
    def enter_text(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Before the text model: begin the forward pass."""
        now = self.state.now
        now.entered = True
        sequence = kwargs.get("inputs_embeds")
        if sequence is None:
            sequence = args[0] if args else kwargs["input_ids"]
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        self._check_decoding(cache)
        before = slots_before(cache, past, self.plan.work)
        if now.encoded or (self.plan.visual_blind and is_pruned(cache)):
            check_maps(self.plan, self.family, kwargs)
        with_images = bool(now.visual and now.encoded)
        marked = self._marked(sequence, kwargs) if with_images else None
        groups = self._groups(sequence, marked, cache, past) if with_images else []
        now.rollback = self._rollback(cache, past, shortened=bool(groups) or any(before))
        if (
            not with_images
            and cache is not None
            and past
            and self.plan.decode_step is None
            and (sequence.shape[1] == 1 or not self.plan.visual_blind)
        ):
            now.cached = CachedForward.after(self.plan, self.family, cache, before, sequence)
            return args, kwargs
        now.forward = ForwardPass(
            self.plan, self.family, self._prompt(sequence, past, groups, kwargs)
        )
        if groups and self.plan.total is None:
            forget_images(cache)
        for extension in now.forward.extensions:
            extension.begin(cache, now.request_of)
        if not groups or marked is None:
            return args, kwargs
        if now.forward.begin(marked) and self.family.reads_embeddings:
            # Marks would become gradients, and so would zeros under the root of their mean square.
            kwargs = {**kwargs, "inputs_embeds": sequence.masked_fill(marked[..., None], 1.0)}
        return args, now.forward.deepstack(kwargs)

    def _marked(self, sequence: Tensor, kwargs: Kwargs) -> Tensor | None:
        """(B, T) which tokens were removed before the text model; `None` if no step does that."""
        return self.family.marked(sequence, kwargs) if self.plan.marks else None

    def _groups(
        self, sequence: Tensor, marked: Tensor | None, cache: Cache | None, past: int
    ) -> list[ImageGroup]:
        """The images of a forward over (B, T, ...) after a cache of some logical length."""
        now = self.state.now
        check_cache(cache, past)
        check_length(self.family, past + sequence.shape[1])
        sliced = any(map(features.is_slice, now.encoded.values()))
        holes = (of.encoded.mixes for of in now.encoded.values() if not features.is_slice(of))
        now.read.fetch((marked, *holes))
        removed = None if marked is None else now.read.of(marked)
        parts = self._parts(now.visual, now.encoded, removed)
        readout = None if sliced else now.readout
        groups = find_images(parts, now.request_of, sequence.device, readout)
        check_readout(groups, self.plan)
        return groups

    def _rollback(self, cache: Cache | None, past: int, *, shortened: bool) -> Rollback | None:
        """What a cache of some logical length is brought back to if this forward dies.

        Where tokens are neither removed now nor were before, running states are not worth a copy.
        """
        evicts = bool(self.state.now.visual) and any(
            "evict_cache" in planned.step.effects for planned in self.plan.llm
        )
        return Rollback.of(
            cache,
            past,
            rewritten=evicts or (self.plan.total is not None and bool(self.state.now.visual)),
            copies=shortened,
            replaced=self.family.replaces_state,
        )

    def _prompt(
        self, sequence: Tensor, past: int, groups: list[ImageGroup], kwargs: Kwargs
    ) -> Prompt:
        """What a forward of the text model is about."""
        state, now, (batch, length) = self.state, self.state.now, sequence.shape[:2]
        mask, recurrent = kwargs.get("attention_mask"), bool(self.family.recurrent_layers)
        real = now.real if groups else None
        if not groups and self.plan.decode_step:
            real = real_positions(mask, past + length, now.read)
        told = Told(now.tokens if groups else None, real, past, recurrent)
        prompt = Prompt(
            batch=batch,
            length=length,
            past=past,
            device=sequence.device,
            groups=groups,
            told=told,
            sees=self._sees(mask, past, sequence) if groups else None,
            trailing=state.generate.trailing if groups else 0,
            flash=takes_2d_masks(self.family.text.config._attn_implementation),
            recurrent=recurrent,
            given=kwargs.get("position_ids"),
            training=state.training,
        )
        numbered = numbered_positions(prompt.given, prompt.real, length)
        prompt = prompt if numbered is None else replace(prompt, numbered=numbered)
        check_drafts(prompt.sees, prompt.trailing)
        return prompt

    def _sees(self, mask: Any, past: int, sequence: Tensor) -> Tensor | None:
        """(B or 1, T, T) what each position sees; `None` where that is those before it."""
        length = sequence.shape[1]
        sees = seen_positions(mask, past, length)
        if sees is not None or self.family.causal:
            return sees
        return torch.ones((), dtype=torch.bool, device=sequence.device).expand(1, length, length)

    @untraced
    def rotate(
        self,
        module: nn.Module,
        before: Callable[..., Any] | None,
        hidden: Tensor,
        position_ids: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """In place of the forward of rotary embeddings: make those of renumbered layers too."""
        embed = functools.partial(forward_of(module, before), hidden)
        cached = self.state.now.cached
        if cached is None:
            return embed(position_ids, *args, **kwargs)
        return cached.rotate(lambda positions: embed(positions, *args, **kwargs), position_ids)

    @untraced
    def layer(
        self,
        number: int,
        module: nn.Module,
        before: Callable[..., Any] | None,
        hidden: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """In place of a decoder layer's forward: hand it what survives.

        Args:
            number: the decoder layer.
            module: its module.
            before: its forward, if that is not its class's; classes change under FSDP2.
            hidden: its input, (B, T, D) or with tokens on the family's own axis.
            *args: its further arguments.
            **kwargs: its keyword arguments, in logical terms.
        """
        now = self.state.now
        forward = now.cached or now.forward
        if forward is None:
            forward = self.replays.find(number, kwargs) if self.replays.any else None
        elif forward is now.forward and module is not self.family.layers[number]:
            self.replays.keep(number, forward, kwargs)  # as something is around the layer
        if forward is not None:
            if args:
                kwargs, args = {**kwargs, **named_arguments(type(module), args)}, ()
            axis = self.family.token_axis
            hidden = hidden if axis == 1 else tokens_second(hidden, axis)
            output, hidden, kwargs = forward.enter(number, module, hidden, kwargs)
            hidden = hidden if axis == 1 else tokens_on(hidden, axis)
            if output is not None:
                return output
        if before is not None:
            return before(hidden, *args, **kwargs)
        return type(module).forward(module, hidden, *args, **kwargs)

    def leave_module(
        self, number: int, module: nn.Module, args: Args, kwargs: Kwargs, output: Any
    ) -> None:
        """After the attention or the MLP of a decoder layer: see what it makes of its input."""
        forward = self.state.now.forward
        if forward is not None and forward.groups:
            given = args[0] if args else kwargs["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            made = made.view(given.shape)  # some mixtures of experts return all rows as one
            forward.decoder_signals.collect_module(number, given, made)

    @torch.compiler.disable
    def leave_text(self, output: Any) -> Any:
        """After the text model: write the record, and go back to logical length."""
        now = self.state.now
        forward = now.forward
        if now.cached is not None:
            output = now.cached.leave(output)
        if forward is None:
            now.cached = now.rollback = None
            return output
        if forward.groups and len(forward.layer_layouts) < self.family.text_layers:
            raise bypassed(self.family.layers[0])
        record = describe(forward, output, now.encoded, self.tags, now.placed)
        if record is not None and self._tells(forward, output):
            self.state.record = self._last = record
        if self.family.embedding is not None and forward.layout is not forward.full:
            self.state.layout = forward.layout
        output = forward.leave(output)
        now.forward = now.rollback = None
        return output

    def _tells(self, forward: ForwardPass, output: Any) -> bool:
        """Whether the record of a forward is what the session reports.

        Within `generate` it is that of its own prompt: guidance and contrastive decoding run others
        beside it. Without a cache the prompt comes again, a token longer each time.
        """
        call, prompt = self.state.generate, forward.prompt
        if not call.running:
            return True
        again = output.get(CACHE) is None and call.told == (prompt.batch, prompt.length - 1)
        sliced = any(features.is_slice(part) for part in self.state.now.encoded.values())
        if call.told is not None and not again and not sliced:
            return False
        call.told = prompt.batch, prompt.length
        return True

    def _parts(
        self, visual: dict[str, Tensor], encoded: dict[str, Any], marked: Tensor | None
    ) -> list[ModalityImages]:
        """Where the images of each modality are, and which of their tokens survive."""
        parts = []
        for modality, output in encoded.items():
            mask = visual[modality]
            removed = None if marked is None else marked[mask]
            if features.is_slice(output):
                shapes = [Shape(n, (1, n)) for n in mask.sum(1).tolist() if n]
                parts.append(ModalityImages(mask, shapes, removed))
                continue
            known = output.encoded
            source = self.state.now.images_of(output, mask)
            shapes = [known.shapes[i] for i in source]
            before = [known.kept_of(i) for i in source]
            states = known.states if self.plan.marks else []
            if states and len(states) != len(source):  # reduced before beams were made of it
                states = [states[i] for i in source]
            if modality == AUDIO:
                audio = ModalityImages(mask, shapes, removed, before, (), states, audio=True)
                parts.append(audio)
                continue
            ids = None if self.state.now.prompt is None else self.state.now.prompt[0]
            where = ImageBoxes(self.family, modality, known, source, mask, ids)
            locate = [functools.partial(where.of, i) for i in range(len(source))]
            parts.append(ModalityImages(mask, shapes, removed, before, locate, states))
        return parts

    def _check_decoding(self, cache: Cache | None) -> None:
        """Refuse ways of generating in which a decoding step cannot choose."""
        call, step = self.state.generate, self.plan.decode_step
        if step is None or call.requests is None or (cache is not None and not call.trailing):
            return
        raise InputError(
            f"{step.method.slug} chooses at each decoding step what it attends to in the cache, "
            "which needs one token a step and a cache; use greedy search, sampling or beam search "
            "with use_cache=True, or turn that step off"
        )
