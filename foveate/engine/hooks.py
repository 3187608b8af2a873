"""Hooks: what happens when a forward passes each point of the model.

The model's wrapper calls the base model, which encodes images and calls the text model, which
calls its layers. Each thread has its own state. Entering the text model makes a `ForwardPass`, or a
`CachedForward` where nothing can be dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.tokens import Shape
from foveate.engine import features
from foveate.engine.attachment import bypassed, forward_of, is_compiled, untraced
from foveate.engine.attentions import check_maps
from foveate.engine.boxes import ImageBoxes
from foveate.engine.build_record import describe
from foveate.engine.cache import check_cache, is_pruned, slots_before
from foveate.engine.cached_forward import CachedForward
from foveate.engine.feature_hooks import FeatureHooks, anywhere
from foveate.engine.forward import ForwardPass
from foveate.engine.gate import is_generating
from foveate.engine.grouping import ModalityImages, find_images
from foveate.engine.images import ImageGroup
from foveate.engine.inputs import (
    check_drafts,
    check_early_exit,
    check_labels,
    check_later_images,
    check_positions,
    labels_of,
    numbered_positions,
    only_labelled,
    placeholders,
    prompt_of,
    real_positions,
    seen_positions,
    supervised_text,
)
from foveate.engine.kernels import check_kernel, takes_2d_masks
from foveate.engine.prompt import IGNORED, samples
from foveate.engine.readout import check_readout
from foveate.engine.rollback import Rollback
from foveate.engine.state import Args, Kwargs, Prompt
from foveate.engine.thread_state import ModelCall
from foveate.errors import AttachError, InputError

ROPE = "rope_deltas"  # how far positions are ahead of the cache's length, on M-RoPE models


class Hooks(FeatureHooks):
    """The hooks of one session. Arguments as in `FeatureHooks`."""

    @untraced
    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `generate`: note its rows, and keep it from compiling the decoding step. A stream
        ends if it fails, or its reader would wait for ever.
        """
        names = ("inputs", "input_ids", "inputs_embeds")
        inputs = args[0] if args else next((kwargs[n] for n in names if n in kwargs), None)
        kwargs.setdefault("disable_compile", True)  # slots change shape with every token
        local, rope = self._local, getattr(self.family.base, ROPE, None)
        state = ("requests", "trailing", "awaited", "generating", "told", "asked")
        state_before = {name: getattr(local, name) for name in state}  # of a call around this one
        try:
            self.look_after()
            check_later_images(self.family, inputs, kwargs)
            check_early_exit(self.family, kwargs)
            local.requests = None if inputs is None else inputs.shape[0]
            local.asked = prompt_of(inputs, kwargs)
            local.trailing, local.awaited, local.generating = 0, False, True
            self._adopt_whole(kwargs)
            return original(*args, **kwargs)
        except BaseException:
            self._reset_rope(rope)
            end_stream(kwargs)
            raise
        finally:
            for name, value in state_before.items():
                setattr(local, name, value)

    def _reset_rope(self, before: Tensor | None) -> None:
        """After a call that has raised: where the cache goes on, on M-RoPE models."""
        if hasattr(self.family.base, ROPE):
            setattr(self.family.base, ROPE, before)

    def _adopt_whole(self, kwargs: Kwargs) -> None:
        """Reduce features that were made outside, before a prefill in chunks cuts images apart."""
        config = kwargs.get("generation_config") or self.family.model.generation_config
        given = kwargs.get("mm_encoder_outputs") or {}
        if not given or kwargs.get("prefill_chunk_size", config.prefill_chunk_size) is None:
            return
        given = dict(given)
        for modality, output in given.items():
            if output is not None and not features.is_tagged(output):
                given[modality] = self.tags.adopt(modality, output, kwargs)
                if not self.plan.waits:
                    self._mark(modality, given[modality])
        kwargs["mm_encoder_outputs"] = given

    def enter_top(
        self, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """Before the model with its head: see what is supervised, and how many tokens after the
        prompt are drafts.

        In assisted decoding the first forward holds drafts already, and logits are kept for each
        of them.
        """
        self.look_after()
        keep = kwargs.get("logits_to_keep", 0)
        drafting = self._local.requests is not None and isinstance(keep, int)
        self._local.trailing = max(keep - 1, 0) if drafting else 0
        labels = labels_of(module, args, kwargs)
        self._local.supervised = None if labels is None else labels != IGNORED
        if not self.labelled_logits or labels is None or not module.training:
            return None
        return args, only_labelled(labels, kwargs)

    @untraced
    def base(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the base model's forward: all that is known of it is forgotten after it."""
        rope = getattr(module, ROPE, None)
        self.compiled |= is_compiled()
        try:
            kwargs = self.enter_base(module, args, kwargs)
            output = forward_of(module, before)(*args, **kwargs)
            if self._local.now.visual and not self._local.now.entered:
                raise bypassed(self.family.text)
            return output
        except BaseException:
            self._reset_rope(rope)
            raise
        finally:
            self._local.now, self._local.supervised = ModelCall(), None

    @torch.compiler.disable
    def enter_base(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Kwargs:
        """Before the base model: find placeholders, and reduce features encoded before."""
        local = self._local
        local.now = now = ModelCall()
        ids = args[0] if args else kwargs.get("input_ids")
        given = {m: o for m, o in (kwargs.get("mm_encoder_outputs") or {}).items() if o is not None}
        now.inside = True
        if ids is None or ids.shape[1] > 1:
            check_kernel(self.family)
        untagged = [output for output in given.values() if not features.is_tagged(output)]
        if untagged and local.requests is None and is_generating(self.family.model):
            return kwargs  # it has begun before the session
        now.visual = placeholders(self.family, ids, kwargs, given)
        if not now.visual:
            return kwargs
        now.prompt = (ids, kwargs)
        if takes_2d_masks(self.family.text.config._attn_implementation) or not self._caches(kwargs):
            now.sample = samples(kwargs)
        check_positions(self.family, kwargs)
        if local.supervised is not None:
            real = self._real(local.supervised.shape[1])
            visual = anywhere(now.visual)
            local.supervised = supervised_text(module, local.supervised, visual, real)
        elif local.requests is None and self.plan.asks_text:
            check_labels(module, self.plan.asks_text)
        now.readout = self._read_from(now.visual, (ids, kwargs))
        self._check_requests(next(iter(now.visual.values())).shape[0])
        if not given:
            if local.awaited:
                raise InputError(
                    "the images that generate has encoded did not reach the model: chunked prefill "
                    "of the installed transformers loses them; use prefill_chunk_size=None"
                )
            return kwargs
        local.awaited = changed = False
        for modality in [m for m in given if m in now.visual]:
            if features.is_slice(given[modality]):
                self._check_slice()
            elif not features.is_tagged(given[modality]):
                given[modality], changed = self.tags.adopt(modality, given[modality], kwargs), True
            if not features.is_slice(given[modality]):
                self._mark(modality, given[modality])
            now.encoded[modality] = given[modality]
        return {**kwargs, "mm_encoder_outputs": given} if changed else kwargs

    def _caches(self, kwargs: Kwargs) -> bool:
        """Whether the text model is given a cache, or makes one."""
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.family.text.config, "use_cache", False)
        return kwargs.get("past_key_values") is not None or bool(use_cache)

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
        now = self._local.now
        if now.rollback is not None:
            now.rollback.restore()
        now.forward = now.cached = now.rollback = None

    @torch.compiler.disable
    def enter_text(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Before the text model: begin the forward pass."""
        now = self._local.now
        now.entered = True
        sequence = kwargs.get("inputs_embeds")
        if sequence is None:
            sequence = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        groups: list[ImageGroup] = []
        self._check_decoding(cache)
        before = slots_before(cache, past, self.plan.work)
        evicts = bool(now.visual) and any(
            "evict_cache" in planned.step.effects for planned in self.plan.llm
        )
        now.rollback = Rollback.of(cache, past, rewritten=evicts)
        if now.encoded or (self.plan.blind and is_pruned(cache)):
            check_maps(self.plan, self.family, kwargs)
        if now.visual and now.encoded:
            check_cache(cache)
            sliced = any(map(features.is_slice, now.encoded.values()))
            readout = None if sliced else now.readout
            parts = self._parts(now.visual, now.encoded, sequence)
            groups = find_images(parts, self._request(sequence.shape[0]), readout)
            check_readout(groups, self.plan)
        elif (
            cache is not None
            and past
            and self.plan.decode_step is None
            and (sequence.shape[1] == 1 or not self.plan.blind)
        ):
            now.cached = CachedForward.after(self.plan, self.family, cache, before, sequence)
            return args, kwargs
        now.forward = ForwardPass(
            self.plan, self.family, self._prompt(sequence, past, groups, kwargs)
        )
        if not groups or not self.plan.marks:
            return args, kwargs
        now.forward.begin(sequence)
        return args, now.forward.deepstack(kwargs)

    def _prompt(
        self, sequence: Tensor, past: int, groups: list[ImageGroup], kwargs: Kwargs
    ) -> Prompt:
        """What a forward of the text model is about."""
        local, now, (batch, length) = self._local, self._local.now, sequence.shape[:2]
        mask, real = kwargs.get("attention_mask"), None
        if groups or self.plan.decode_step:
            real = real_positions(mask, past + length)
            real = None if real is None else real.expand(batch, -1)
        prompt = Prompt(
            batch=batch,
            length=length,
            past=past,
            device=sequence.device,
            groups=groups,
            real=real,
            sees=seen_positions(mask, past, length) if groups else None,
            trailing=local.trailing if groups else 0,
            flash=takes_2d_masks(self.family.text.config._attn_implementation),
            visual=anywhere(now.visual) if groups else None,
            supervised=local.supervised if groups else None,
            sample=now.sample if groups else None,
            numbered=numbered_positions(kwargs.get("position_ids"), real, length),
            recurrent=bool(self.family.recurrent_layers),
        )
        check_drafts(prompt.sees, prompt.trailing)
        return prompt

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
        cached = self._local.now.cached
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
        """In place of a decoder layer's forward: hand it what is alive.

        Args:
            number: the decoder layer.
            module: its module.
            before: its forward, if that is not its class's; classes change under FSDP2.
            hidden: (B, T, D) its input.
            *args: its further arguments.
            **kwargs: its keyword arguments, in logical terms.
        """
        now = self._local.now
        if now.cached is not None or now.forward is not None or self.replays.any:
            output, hidden, kwargs = self.enter_layer(number, module, hidden, kwargs)
            if output is not None:
                return output
        if before is not None:
            return before(hidden, *args, **kwargs)
        return type(module).forward(module, hidden, *args, **kwargs)

    @torch.compiler.disable
    def enter_layer(
        self, number: int, module: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor | None, Tensor, Kwargs]:
        """Before a layer: its output, if it is known already, and what it is handed."""
        forward, cached = self._local.now.forward, self._local.now.cached
        if cached is not None:
            cached.enter(number, hidden, kwargs)
            for extension in cached.extensions:
                if (output := extension.run(number, module, hidden, kwargs)) is not None:
                    return output, hidden, kwargs
            return None, hidden, kwargs
        if forward is None:
            forward = self.replays.find(number, kwargs)
        elif module is not self.family.layers[number] and forward.groups:  # something is around it
            self.replays.keep(number, forward, kwargs)
        if forward is None:
            return None, hidden, kwargs
        hidden, kwargs = forward.enter(number, module, hidden, kwargs)
        for extension in forward.extensions:
            if (output := extension.run(number, module, hidden, kwargs)) is not None:
                return output, hidden, kwargs
        return None, hidden, kwargs

    def leave_module(
        self, number: int, module: nn.Module, args: Args, kwargs: Kwargs, output: Any
    ) -> None:
        """After the attention or the MLP of a decoder layer: see what it makes of its input."""
        forward = self._local.now.forward
        if forward is not None and forward.groups:
            given = args[0] if args else kwargs["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            forward.decoder_signals.collect_module(number, given, made)

    @torch.compiler.disable
    def leave_text(self, output: Any) -> Any:
        """After the text model: write the record, and go back to logical length."""
        now = self._local.now
        forward = now.forward
        if now.cached is not None:
            output = now.cached.leave(output)
        if forward is None:
            now.cached = now.rollback = None
            return output
        if forward.groups and len(forward.layer_layouts) < self.family.text_layers:
            raise bypassed(self.family.layers[0])
        record = describe(forward, output, now.encoded, self.vision, self.tags)
        if record is not None and self._tells(forward, output):
            self._local.record = self._last = record
        output = forward.leave(output)
        now.forward = now.rollback = None
        return output

    def _tells(self, forward: ForwardPass, output: Any) -> bool:
        """Whether the record of a forward is what the session reports.

        Within `generate` it is that of its own prompt: guidance and contrastive decoding run others
        beside it. Without a cache the prompt comes again, a token longer each time.
        """
        local, prompt = self._local, forward.prompt
        if not local.generating:
            return True
        again = output.past_key_values is None and local.told == (prompt.batch, prompt.length - 1)
        sliced = any(features.is_slice(part) for part in local.now.encoded.values())
        if local.told is not None and not again and not sliced:
            return False
        local.told = prompt.batch, prompt.length
        return True

    def _parts(
        self, visual: dict[str, Tensor], encoded: dict[str, Any], embeds: Tensor
    ) -> list[ModalityImages]:
        """Where the images of each modality are, and what is alive of them."""
        parts = []
        for modality, output in encoded.items():
            mask = visual[modality]
            dead = embeds[mask][:, 0].isnan() if self.plan.marks else None
            if features.is_slice(output):
                shapes = [Shape(n, (1, n)) for n in mask.sum(1).tolist() if n]
                parts.append(ModalityImages(mask, shapes, dead))
                continue
            known = output.encoded
            source = features.members(output, mask, self._expanded(mask.shape[0]))
            shapes = [known.shapes[i] for i in source]
            before = [known.kept_of(i) for i in source]
            states = known.states if self.plan.marks else []
            if states and len(states) != len(source):  # reduced before beams were made of it
                states = [states[i] for i in source]
            ids = None if self._local.now.prompt is None else self._local.now.prompt[0]
            where = ImageBoxes(self.family, modality, known, source, mask, ids)
            locate = [functools.partial(where.of, i) for i in range(len(source))]
            parts.append(ModalityImages(mask, shapes, dead, before, locate, states))
        return parts

    def _check_decoding(self, cache: Cache | None) -> None:
        """Refuse ways of generating in which a decoding step cannot choose."""
        local, step = self._local, self.plan.decode_step
        if step is None or local.requests is None or (cache is not None and not local.trailing):
            return
        raise InputError(
            f"{step.method.slug} chooses at each decoding step what it attends to in the cache, "
            "which needs one token a step and a cache; use greedy search, sampling or beam search "
            "with use_cache=True, or turn that step off"
        )

    def _check_slice(self) -> None:
        if self.plan.llm or self.plan.waits or self.plan.decode_step:
            names = ", ".join(m.slug for m in self.plan.methods)
            raise InputError(
                f"chunked prefill cannot be used with {names}: each chunk would choose tokens by "
                "its own last token, or "
                "without knowing its row; use prefill_chunk_size=None, or a pre_llm method with "
                "one keep for all"
            )


def end_stream(kwargs: Mapping[str, Any]) -> None:
    """Let whoever reads the stream of a `generate` that fails go on."""
    streamer = kwargs.get("streamer")
    if streamer is not None:
        with suppress(Exception):  # the error that matters is on its way
            streamer.end()


def refuse_late(*args: Any, **kwargs: Any) -> None:
    """Refuse a `generate` that was taken from the model within a session and begins after it.

    Raises:
        AttachError: always.
    """
    end_stream(kwargs)
    raise AttachError(
        "this `generate` was taken from the model within a foveate session that has been left "
        "since; begin within the block (join threads there), or take `model.generate` anew"
    )
