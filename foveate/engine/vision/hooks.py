"""The vision side of a session: shorten the stream inside the encoder.

Layers in which nothing is removed keep their own forward. A layer in which tokens are removed
between attention and MLP is run in two halves; that needs an instance-level forward, because hooks
do not reach in between. So are layers whose attention takes no mask, once merged tokens count as
often as they have sources.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.attachment import Attachment
from foveate.engine.compilation import untraced
from foveate.engine.gate import Gate
from foveate.engine.inputs import bound
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.planning import check_mixing
from foveate.engine.replaced_forward import bypassed, forward_of, has_own_forward
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.attending import hand_over
from foveate.engine.vision.describe import describe
from foveate.engine.vision.forward import Encoding
from foveate.engine.vision.outputs import restore_outputs, whole
from foveate.engine.vision.recomputed import follow, is_checkpointed, leaves_hooks_outside
from foveate.engine.vision.segments import boundaries
from foveate.engine.vision.within_layers import Args, Kwargs, WithinLayers
from foveate.errors import UnsupportedModelError
from foveate.families import Family
from foveate.io.quoting import each_of
from foveate.record.record import Record
from foveate.signals.encoder_hooks import EncoderSignals


class VisionAttachment(Attachment):
    """Steps inside an encoder, in an encoder alone or in the tower of a larger model.

    Args:
        plan: what to do where.
        family: the model.
        state: what each thread is doing with the model.
        gate: counts the threads inside the model.
    """

    def __init__(self, plan: Plan, family: Family, state: ThreadState, gate: Gate) -> None:
        super().__init__(gate)
        self.family = family
        self.methods = [s.method for s in plan.vision]
        assert family.encoder is not None  # the plan has checked it
        self.encoder = family.encoder
        self._before: dict[int, list[PlannedStep]] = defaultdict(list)
        self._inside: dict[int, list[PlannedStep]] = defaultdict(list)
        for planned in plan.vision:
            steps = self._inside if planned.step.inside else self._before
            steps[planned.step.layer].append(planned)
        self._steps = plan.vision
        self._attends = {s.step.layer: s for s in plan.vision if "attend" in s.step.effects}
        self._around = {s.step.layer: s for s in plan.vision if "around" in s.step.effects}
        last = len(self.encoder.layers) - self.encoder.whole_after_layers
        self._first = min((s.step.layer for s in plan.vision), default=last)
        self._unmasked = self._without_masks(plan)
        earlier = plan.earlier_signals
        self._signals = (
            EncoderSignals(self.encoder, earlier, lambda: state.encoding) if earlier else None
        )
        self._within = WithinLayers(family, self.encoder, state, self._signals)
        self.state = state
        self._last: Record | None = None

    @property
    def root(self) -> Any:
        """The encoder."""
        return self.encoder.tower

    @property
    def record(self) -> Record | None:
        """The last pass: this thread's, or else any thread's."""
        return self.state.encoder_record or self._last

    @contextmanager
    def collect(
        self, modality: str, arguments: Mapping[str, Any], read: Tensor | None = None
    ) -> Iterator[list[Encoding]]:
        """While open, fill a list with the passes that end, in this thread only.

        Args:
            modality: `image` or `video`.
            arguments: what features are made from.
            read: (N) which of all visual tokens of it may not be removed; `None` for none.

        Raises:
            UnsupportedModelError: the model mixes the patches of it.
        """
        check_mixing(self.family, self.methods, modality, arguments)
        passes: list[Encoding] = []
        self.state.passes, self.state.modality = passes, modality
        if read is not None:
            sources = self.family.sources(modality, len(read), arguments)
            self.state.readout = sources[read] if len(sources) == len(read) else None
        try:
            yield passes
        finally:
            self.state.passes, self.state.modality = None, "image"
            self.state.readout = None

    def _without_masks(self, plan: Plan) -> frozenset[int]:
        """Layers that may get a bias and cannot take it as a mask."""
        block = self.encoder.block
        if block is None or block.output is None:
            return frozenset()
        biased = [
            s.step.layer
            for s in plan.vision
            if "proportional" in s.step.effects or "ragged" in s.step.effects
        ]
        return frozenset(
            range(min(biased, default=len(self.encoder.layers)), len(self.encoder.layers))
        )

    # -- attach

    def check(self) -> None:
        """Refuse layers that another library runs in its own way; accelerate does not, it only
        moves what they are given.

        Raises:
            UnsupportedModelError: a layer that must be run in halves has a forward of its own.
        """
        for number in {*self._inside, *self._unmasked, *self._around}:
            if has_own_forward(self.encoder.layers[number]):
                raise UnsupportedModelError(
                    f"encoder layer {number} has had its forward replaced, but tokens can be "
                    "removed within a layer only if it runs as it is; take off what has replaced "
                    "it, or remove tokens before a layer or after the encoder"
                )

    def attach(self) -> None:
        """Install what acts around the encoder and its layers, and within those run in halves."""
        within = self._within
        self.uncopied(self.root)
        below = self.family.base if self.family.text_layers else None
        if self.encoder.fed is not None:
            self.before(self.encoder.fed, self._enter_fed)
        self.replace_forward(self.root, self._tower, outer=True, below=below, anchor=below is None)
        for number in range(self._first, len(self.encoder.layers)):
            layer = self.encoder.layers[number]
            attention, steps = self.encoder.attention(layer), self._inside.get(number, [])
            kernel = self.encoder.masks_kernels
            if not (self.encoder.masks_layers or kernel):
                self.before(attention, within.enter_attention)
            if steps or number in self._unmasked:
                self.replace_forward(layer, functools.partial(within.run_halves, steps))
            if number in self._around:
                around = functools.partial(within.run_fewer, self._around[number])
                self.replace_forward(layer, around)
            self.hook(layer, functools.partial(self._enter_layer, number))
            if number in self._attends:
                self.before(attention, within.note_normed)
            if number in self._attends or kernel:
                attends, masked = self._attends.get(number), within.mask if kernel else None
                attend = None if attends is None else functools.partial(within.attend, attends)
                hand_over(self, attention, attend, masked)
            if any(planned.step.needs for planned in steps):
                for name in self.encoder.projections:
                    self.tap(attention, name, functools.partial(within.tap, name))
            if self.encoder.shared_rotary:
                for name in self.encoder.projections:
                    self.replace_forward(getattr(attention, name), within.rotate)
        if self._signals is not None:
            self._signals.attach(self)
        if self._whole_after_layers and self._first < len(self.encoder.layers):
            self.replace_forward(self.encoder.layers[-1], self._last_layer)
        if self.encoder.maps_states:
            for layer in self.encoder.layers[self._first : -1]:
                self.replace_forward(layer, self._mapped_layer)
        for reader in self.encoder.readers:
            self.before(reader, self._enter_reader)
        if self._first < len(self.encoder.layers) and self.encoder.head is not None:
            self.before(self.encoder.head, self._enter_head)
            for module in self.encoder.head.modules():
                if isinstance(module, nn.MultiheadAttention):
                    self.before(module, self._enter_pooling)

    @property
    def _whole_after_layers(self) -> bool:
        """Whether all rows are there once the layers have run."""
        exits = any("exit" in planned.step.effects for planned in self._steps)
        return self.encoder.whole_after_layers or exits

    # -- around the encoder

    @untraced
    def _tower(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the encoder's forward: one pass."""
        output = None
        kwargs = self._enter(module, args, kwargs)
        try:
            output = forward_of(module, before)(*args, **kwargs)
        finally:
            output = self._leave(output)
        return output

    def _enter_fed(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the module around the encoder: learn the pixels, as the encoder sees rows."""
        self.state.fed = bound(type(module).forward.__get__(module), args, kwargs)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Kwargs:
        self.look_after()
        own = [*self._attends.values(), *self._around.values()]
        if own and kwargs.get("output_attentions", self.root.config.output_attentions):
            who = each_of(sorted({s.method.slug for s in own}))
            raise UnsupportedModelError(
                f"{who} computes the attention of encoder layers itself, and returns no map of "
                "it; leave output_attentions out"
            )
        arguments = self.state.fed or bound(type(module).forward.__get__(module), args, kwargs)
        arguments = self.state.now.read.arguments(arguments)
        self.state.fed = None
        side = self.family.tower_side(self.state.modality, arguments)
        read = self.state.readout
        self.state.encoding = Encoding(
            self.family, self.encoder, arguments, side, read, self._steps
        )
        if self.encoder.runs_again is not None and self.encoder.runs_again():
            raise UnsupportedModelError(
                f"gradient checkpointing of this {type(module).__name__} runs layers again with "
                "what foveate does before them; turn it off (`gradient_checkpointing_disable()`)"
            )
        if self._signals is not None:
            self.state.signals = self.state.collecting.enter_context(self._signals.collect())
        asked = kwargs.get("output_hidden_states", self.root.config.output_hidden_states)
        self.state.maps_states = asked not in (None, False)
        self.state.as_tuple = not kwargs.get("return_dict", self.root.config.return_dict)
        return {**kwargs, "return_dict": True} if self.state.as_tuple else kwargs

    @torch.compiler.disable
    def _leave(self, output: Any) -> Any:
        encoding, self.state.encoding = self.state.encoding, None
        self.state.collecting.close()
        if encoding is None or output is None:  # it raised
            return None
        if len(encoding.rows) < len(self.encoder.layers) - self._first:
            raise bypassed(self.encoder.layers[-1])
        if not encoding.groups:
            encoding.see(output.last_hidden_state[:, self.encoder.queries :])
        if self.state.passes is not None:
            self.state.passes.append(encoding)
        self.state.encoder_record = self._last = describe(encoding)
        output = restore_outputs(encoding, output)
        return output.to_tuple() if self.state.as_tuple else output

    # -- around a layer

    def _enter_layer(self, number: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before a layer: run the steps due there, and hand it the mask that fits."""
        encoding = self.state.encoding
        if encoding is None:
            return None
        given = args[0] if encoding.between is None else encoding.between
        hidden, encoding.layer.turning = given, False
        kwargs = self._within.named(args[1:], kwargs)
        encoding.see(hidden, kwargs.get("attention_mask"))
        steps, told = self._before.get(number), encoding.tell(kwargs)
        if steps and encoding.removes(steps):
            hidden = encoding.reduce(
                steps,
                hidden,
                functools.partial(self._within.signal, encoding, number, module, given),
            )
            told = encoding.tell(kwargs)
        encoding.layer.input = hidden
        encoding.rows.append((hidden.shape[-2], hidden.shape[-2]))
        encoding.points[number] = encoding.layout.now
        if is_checkpointed(module) and number not in self._inside:  # halves run once
            self._enter_checkpointed(encoding, number, module)
        encoding.bounds.append(boundaries(told))
        encoding.layer.turning = self.encoder.shared_rotary and encoding.reduced
        return ((hidden,), told) if encoding.reduced else None

    def _enter_checkpointed(self, encoding: Encoding, number: int, layer: nn.Module) -> None:
        """Before a layer that runs again in the backward pass: see to it that it runs alike.

        Raises:
            UnsupportedModelError: it cannot.
        """
        if number in self._attends or (encoding.reduced and not leaves_hooks_outside()):
            raise UnsupportedModelError(
                f"gradient checkpointing runs a {type(layer).__name__} again after the pass, when "
                "what foveate does within it is over; turn it off "
                "(`gradient_checkpointing_disable()`)"
            )
        if encoding.reduced:
            follow(self, self._life, self.state, layer)

    @untraced
    def _last_layer(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the last layer's forward, where all rows are there after it."""
        return self._whole(forward_of(module, before)(*args, **kwargs))

    @torch.compiler.disable
    def _whole(self, output: Any) -> Any:
        encoding = self.state.encoding
        if encoding is None:
            return output
        return self.encoder.output_of(encoding.restore(self.encoder.states_in(output)))

    @untraced
    def _mapped_layer(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of a layer's forward, where the model may make maps of what it returns."""
        return self._mapped(forward_of(module, before)(*args, **kwargs))

    @torch.compiler.disable
    def _mapped(self, output: Any) -> Any:
        encoding = self.state.encoding
        if encoding is None or not encoding.reduced or not self.state.maps_states:
            return output
        encoding.between = self.encoder.states_in(output)
        return self.encoder.output_of(encoding.unpruned(encoding.between))

    def _enter_reader(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before a module that reads rows: hand it all of them."""
        encoding = self.state.encoding
        if encoding is None or not encoding.reduced:
            return None
        if not args:
            return args, {**kwargs, "hidden_states": encoding.unpruned(kwargs["hidden_states"])}
        states, *others = args
        if self.encoder.taps:
            others[0] = whole(encoding, others[0], self.encoder.taps)
        return (encoding.unpruned(states), *others), kwargs

    # -- around a head that pools by attention

    def _enter_head(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before the head: its mask of all tokens no longer fits; its attention gets another."""
        encoding = self.state.encoding
        if encoding is None or not encoding.shortened:
            return None
        return args[:1], {}

    def _enter_pooling(self, module: Any, args: Args, kwargs: Kwargs) -> Any:
        """Before the head's attention: count a merged token as often as it has sources, and padding
        not at all.
        """
        encoding = self.state.encoding
        if encoding is None or not encoding.shortened:
            return None
        counts = encoding.counts(args[1], merged=True)
        if counts is None:
            return None
        log = counts.log().to(args[1].dtype)[:, None]
        return args, {**kwargs, "attn_mask": log.repeat_interleave(module.num_heads, 0)}
