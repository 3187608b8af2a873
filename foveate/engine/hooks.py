"""Hooks: what happens when a forward passes each point of the model.

The model's wrapper calls the base model, which encodes images and calls the text model, which
calls its layers. Each thread has its own state; the state of a forward is a `Turn`, made when the
text model is entered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.engine import features
from foveate.engine.asking import IGNORED, samples
from foveate.engine.cache import check_cache
from foveate.engine.compute import run_layer
from foveate.engine.feature_hooks import FeatureHooks, anywhere
from foveate.engine.images import Group, Part, locate
from foveate.engine.inputs import (
    check_labels,
    check_later_images,
    check_positions,
    labels_of,
    only_labelled,
    placeholders,
    real_positions,
    seen_positions,
    supervised_text,
)
from foveate.engine.kernels import check_kernel, takes_2d_masks
from foveate.engine.onward import Onward
from foveate.engine.part import forward_of
from foveate.engine.places import Places
from foveate.engine.recording import describe
from foveate.engine.state import Args, Forward, Kwargs
from foveate.engine.turn import Prompt, Turn
from foveate.errors import InputError
from foveate.tokens import Shape


class Hooks(FeatureHooks):
    """The hooks of one session. Arguments as in `FeatureHooks`."""

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `generate`: note its rows, and keep it from compiling the decoding step."""
        names = ("inputs", "input_ids", "inputs_embeds")
        inputs = args[0] if args else next((kwargs[n] for n in names if n in kwargs), None)
        kwargs.setdefault("disable_compile", True)  # slots change shape with every token
        check_later_images(self.family, inputs, kwargs)
        self._local.requests = None if inputs is None else inputs.shape[0]
        try:
            self._adopt_whole(kwargs)
            return original(*args, **kwargs)
        finally:
            self._local.requests, self._local.trailing, self._local.awaited = None, 0, False

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

    def enter_top(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before the model with its head: see what is supervised, and how many tokens behind the
        prompt are drafts.

        In assisted decoding the first forward holds drafts already, and logits are kept for each
        of them.
        """
        keep = kwargs.get("logits_to_keep", 0)
        drafting = self._local.requests is not None and isinstance(keep, int)
        self._local.trailing = max(keep - 1, 0) if drafting else 0
        labels = labels_of(module, args, kwargs)
        self._local.supervised = None if labels is None else labels != IGNORED
        if not self.labelled_logits or labels is None or not module.training:
            return None
        return args, only_labelled(labels, kwargs)

    def base(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the base model's forward: all that is known of it is forgotten behind it."""
        try:
            kwargs = self.enter_base(module, args, kwargs)
            return forward_of(module, before)(*args, **kwargs)
        finally:
            self._local.now, self._local.supervised = Forward(), None

    def enter_base(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Kwargs:
        """Before the base model: find placeholders, and reduce features encoded before."""
        local = self._local
        local.now = now = Forward()
        ids = args[0] if args else kwargs.get("input_ids")
        given = {m: o for m, o in (kwargs.get("mm_encoder_outputs") or {}).items() if o is not None}
        now.inside = True
        if ids is None or ids.shape[1] > 1:
            check_kernel(self.family)
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

    def text(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the text model's forward: a turn, or one forward onward."""
        args, kwargs = self.enter_text(args, kwargs)
        try:
            return self.leave_text(forward_of(module, before)(*args, **kwargs))
        except BaseException:
            now = self._local.now
            if now.onward is not None:
                now.onward.cancel()
            now.turn = now.onward = None
            raise

    def enter_text(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Before the text model: begin the turn."""
        local, now = self._local, self._local.now
        sequence = kwargs.get("inputs_embeds")
        if sequence is None:
            sequence = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        batch, length = sequence.shape[:2]
        groups: list[Group] = []
        self._check_decoding(cache)
        if now.visual and now.encoded:
            check_cache(cache)
            groups = locate(self._parts(now.visual, now.encoded, sequence))
        elif (
            cache is not None
            and past
            and self.plan.focus is None
            and (length == 1 or not self.plan.blind)
        ):
            now.onward = Onward.behind(self.family, cache, sequence)
            return args, kwargs
        prompt = Prompt(
            batch=batch,
            length=length,
            past=past,
            device=sequence.device,
            groups=groups,
            real=real_positions(kwargs.get("attention_mask"), past + length)
            if groups or self.plan.focus
            else None,
            sees=seen_positions(kwargs.get("attention_mask"), past, length) if groups else None,
            trailing=0 if past else local.trailing,
            request=self._request(batch),
            flash=takes_2d_masks(self.family.text.config._attn_implementation),
            visual=anywhere(now.visual) if groups and self.plan.asks else None,
            supervised=local.supervised if groups else None,
            sample=now.sample if groups else None,
        )
        now.turn = Turn(self.plan, self.family, prompt)
        if not groups or not self.plan.marks:
            return args, kwargs
        now.turn.begin(sequence)
        return args, now.turn.deepstack(kwargs)

    def rotate(
        self,
        module: nn.Module,
        before: Callable[..., Any] | None,
        hidden: Tensor,
        position_ids: Tensor,
        *args: Any,
    ) -> Any:
        """In place of the forward of rotary embeddings: make those of renumbered layers too."""
        embed = functools.partial(forward_of(module, before), hidden)
        onward = self._local.now.onward
        if onward is None:
            return embed(position_ids, *args)
        return onward.rotate(lambda positions: embed(positions, *args), position_ids)

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
        now, output = self._local.now, None
        if now.onward is not None:
            now.onward.enter(number, hidden, kwargs)
            if (work := self.plan.blind.get(number)) is not None:
                output = now.onward.run(number, module, work, hidden, kwargs)
        elif now.turn is not None or self.replays.any:
            output, hidden, kwargs = self.enter_layer(number, module, hidden, kwargs)
        if output is not None:
            return output
        if before is not None:
            return before(hidden, *args, **kwargs)
        return type(module).forward(module, hidden, *args, **kwargs)

    def enter_layer(
        self, number: int, module: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor | None, Tensor, Kwargs]:
        """Before a layer of a turn: its output, if it is known already, and what it is handed."""
        turn = self._local.now.turn
        if turn is None:
            turn = self.replays.find(number, kwargs)
        elif module is not self.family.layers[number] and turn.groups:  # something is around it
            self.replays.keep(number, turn, kwargs)
        if turn is None:
            return None, hidden, kwargs
        hidden, kwargs = turn.enter(number, module, hidden, kwargs)
        if number not in turn.splits:
            return None, hidden, kwargs
        work, split = self.plan.work[number], turn.splits[number]
        rotary, mask = kwargs["position_embeddings"], kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        return run_layer(module, work, split, hidden, rotary, mask, cache), hidden, kwargs

    def leave_module(
        self, number: int, module: nn.Module, args: Args, kwargs: Kwargs, output: Any
    ) -> None:
        """After the attention or the MLP of a decoder layer: see what it makes of its input."""
        turn = self._local.now.turn
        if turn is not None and turn.groups:
            given = args[0] if args else kwargs["hidden_states"]
            turn.looks.changed(number, given, output[0] if isinstance(output, tuple) else output)

    def leave_text(self, output: Any) -> Any:
        """After the text model: write the record, and go back to logical length."""
        now = self._local.now
        turn, now.turn, now.onward = now.turn, None, None
        if turn is None:
            return output
        record = describe(turn, output, now.encoded, self.vision, self.tags)
        if record is not None:
            self._local.record = self._last = record
        return turn.leave(output, self.plan.first_layer)

    def _parts(
        self, visual: dict[str, Tensor], encoded: dict[str, Any], embeds: Tensor
    ) -> list[Part]:
        """Where the images of each modality are, and what is alive of them."""
        parts = []
        for modality, output in encoded.items():
            mask = visual[modality]
            dead = embeds[mask][:, 0].isnan() if self.plan.marks else None
            if features.is_slice(output):
                shapes = [Shape(n, (1, n)) for n in mask.sum(1).tolist() if n]
                parts.append(Part(mask, shapes, dead))
                continue
            known = output.encoded
            source = features.members(output, mask, self._expanded(mask.shape[0]))
            shapes = [known.shapes[i] for i in source]
            before = [known.kept_of(i) for i in source]
            left = known.left if self.plan.marks else []
            if left and len(left) != len(source):  # reduced before beams were made of it
                left = [left[i] for i in source]
            ids = None if self._local.now.prompt is None else self._local.now.prompt[0]
            where = Places(self.family, modality, known, source, mask, ids)
            places = [functools.partial(where.of, i) for i in range(len(source))]
            parts.append(Part(mask, shapes, dead, before, places, left))
        return parts

    def _check_decoding(self, cache: Cache | None) -> None:
        """Refuse ways of generating in which a decoding step cannot choose."""
        local, focus = self._local, self.plan.focus
        if focus is None or local.requests is None or (cache is not None and not local.trailing):
            return
        raise InputError(
            f"{focus.method.slug} chooses at each decoding step what it attends to in the cache, "
            "which needs one token a step and a cache; use greedy search, sampling or beam search "
            "with use_cache=True, or turn that step off"
        )

    def _check_slice(self) -> None:
        if self.plan.llm or self.plan.waits or self.plan.focus:
            names = ", ".join(m.slug for m in self.plan.methods)
            raise InputError(
                f"chunked prefill cannot be used with {names}: each chunk would choose tokens by "
                "its own last token, or "
                "without knowing its row; use prefill_chunk_size=None, or a pre_llm method with "
                "one keep for all"
            )
