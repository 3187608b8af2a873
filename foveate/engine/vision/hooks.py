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

from foveate.core import Need
from foveate.core.tokens import Shape
from foveate.engine.attachment import Attachment
from foveate.engine.compilation import untraced
from foveate.engine.gate import Gate
from foveate.engine.images import Locate
from foveate.engine.inputs import bound, of_shapes
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.planning import check_mixing
from foveate.engine.replaced_forward import bypassed, forward_of, has_own_forward
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.attending import hand_over
from foveate.engine.vision.encoder_group import EncoderGroup
from foveate.engine.vision.forward import Encoding, Entered
from foveate.engine.vision.segments import boundaries
from foveate.errors import UnsupportedModelError
from foveate.families import Family
from foveate.record.record import ImageRecord, Record
from foveate.record.tiles import TokenBoxes
from foveate.signals.encoder_hooks import EncoderSignals
from foveate.signals.rotary import rotated
from foveate.signals.signal import over_layers

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


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
        self._first = min((s.step.layer for s in plan.vision), default=len(self.encoder.layers))
        self._unmasked = self._without_masks(plan)
        earlier = plan.earlier_signals
        self._signals = (
            EncoderSignals(self.encoder, earlier, lambda: state.encoding) if earlier else None
        )
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
            self.state.readout = sources[read.cpu()] if len(sources) == len(read) else None
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
                self.before(attention, self._enter_attention)
            if steps or number in self._unmasked:
                self.replace_forward(layer, functools.partial(self._halves, steps))
            if number in self._around:
                around = functools.partial(self._layer_of_fewer, self._around[number])
                self.replace_forward(layer, around)
            self.hook(layer, functools.partial(self._enter_layer, number))
            if number in self._attends:
                self.before(attention, self._note_normed)
            if number in self._attends or kernel:
                attends, masked = self._attends.get(number), self._mask if kernel else None
                attend = None if attends is None else functools.partial(self._attend, attends)
                hand_over(self, attention, attend, masked)
            if any(planned.step.needs for planned in steps):
                for name in self.encoder.projections:
                    self.tap(attention, name, functools.partial(self._tap, name))
            if self.encoder.shared_rotary:
                for name in self.encoder.projections:
                    self.replace_forward(getattr(attention, name), self._rotate)
        if self._whole_after_layers and self._first < len(self.encoder.layers):
            self.replace_forward(self.encoder.layers[-1], self._last_layer)
        for reader in self.encoder.readers:
            self.before(reader, self._enter_reader)
        if self._signals is not None:
            self._signals.attach(self)
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
            slugs = ", ".join(sorted({s.method.slug for s in own}))
            raise UnsupportedModelError(
                f"{slugs} computes the attention of encoder layers itself, and returns no map of "
                "it; leave output_attentions out"
            )
        arguments = self.state.fed or bound(type(module).forward.__get__(module), args, kwargs)
        self.state.fed = None
        side = self.family.tower_side(self.state.modality, arguments)
        read = self.state.readout
        self.state.encoding = Encoding(
            self.family, self.encoder, arguments, side, read, self._steps
        )
        if self._signals is not None:
            self.state.signals = self.state.collecting.enter_context(self._signals.collect())
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
        encoding.see(output.last_hidden_state[:, self.encoder.queries :])
        if self.state.passes is not None:
            self.state.passes.append(encoding)
        self.state.encoder_record = self._last = self._describe(encoding)
        output = encoding.leave(output)
        return output.to_tuple() if self.state.as_tuple else output

    # -- around a layer

    def _enter_layer(self, number: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before a layer: run the steps due there, and hand it the mask that fits."""
        encoding = self.state.encoding
        if encoding is None:
            return None
        hidden, encoding.turning = args[0], False
        kwargs = self._named(args[1:], kwargs)
        encoding.see(hidden, kwargs.get("attention_mask"))
        steps, told = self._before.get(number), encoding.tell(kwargs)
        if steps and encoding.removes(steps):
            hidden = encoding.reduce(
                steps, hidden, functools.partial(self._signal, encoding, number, module, args[0])
            )
            told = encoding.tell(kwargs)
        encoding.input = hidden
        encoding.rows.append((hidden.shape[-2], hidden.shape[-2]))
        encoding.points[number] = encoding.layout.now
        if encoding.reduced and self.encoder.masks_kernels:
            _check_not_run_again(module)
        encoding.bounds.append(boundaries(told))
        encoding.turning = self.encoder.shared_rotary and encoding.reduced
        return ((hidden,), told) if encoding.reduced else None

    def _named(self, by_place: Args, kwargs: Kwargs) -> Kwargs:
        """What a layer is handed besides states, by name."""
        return {**kwargs, **dict(zip(self.encoder.by_place, by_place, strict=False))}

    @untraced
    def _rotate(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of a projection's forward: turn queries or keys, where layers cannot."""
        return self._turned(forward_of(module, before)(*args, **kwargs))

    @torch.compiler.disable
    def _turned(self, output: Tensor) -> Tensor:
        encoding = self.state.encoding
        if encoding is None or not encoding.turning:
            return output
        return rotated(output, encoding.rotary, self.encoder.heads_of(output.shape[-1]))

    def _signal(
        self,
        encoding: Encoding,
        number: int,
        layer: Any,
        hidden: Tensor,
        need: Need,
        of: EncoderGroup,
    ) -> Tensor:
        """A signal before a layer: of earlier layers, or of the one that is about to run."""
        if need.layers == (number,):
            return encoding.ahead(layer, hidden, of)
        assert self._signals is not None  # as planned
        rows = [encoding.at_tokens(self.state.signals[need.name, i], of) for i in need.layers]
        return self._signals.deliver(need.name, over_layers(need, rows))

    def _enter_attention(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before the attention of a layer that takes no mask: hand it one."""
        encoding = self.state.encoding
        if encoding is None or encoding.bias is None:
            return None
        return args, {**kwargs, "attention_mask": encoding.bias}

    @torch.compiler.disable
    def _mask(self, given: Tensor | None) -> Tensor | None:
        """What the kernel of a layer that takes no mask is handed as one."""
        encoding = self.state.encoding
        return given if encoding is None else encoding.kernel_mask(given)

    @torch.compiler.disable
    def _attend(self, planned: PlannedStep, *parts: Any) -> Tensor | None:
        """In place of a layer's kernel, where a method attends; `None` outside of a pass."""
        encoding = self.state.encoding
        return None if encoding is None else encoding.attend(planned, *parts)

    def _note_normed(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the attention of a layer in which a method attends: note what it is given."""
        if self.state.encoding is not None:
            self.state.encoding.normed = args[0] if args else kwargs["hidden_states"]

    @untraced
    def _last_layer(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of the last layer's forward, where all rows are there after it."""
        return self._whole(forward_of(module, before)(*args, **kwargs))

    @torch.compiler.disable
    def _whole(self, output: Tensor) -> Tensor:
        encoding = self.state.encoding
        return output if encoding is None else encoding.restore(output)

    def _enter_reader(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before a module that reads rows: hand it all of them."""
        encoding = self.state.encoding
        if encoding is None or not encoding.reduced:
            return None
        if not args:
            return args, {**kwargs, "hidden_states": encoding.unpruned(kwargs["hidden_states"])}
        states, *others = args
        if self.encoder.taps:
            others[0] = encoding.whole(others[0], self.encoder.taps)
        return (encoding.unpruned(states), *others), kwargs

    @untraced
    def _layer_of_fewer(
        self,
        planned: PlannedStep,
        module: nn.Module,
        before: Callable[..., Any] | None,
        hidden: Tensor,
        *masks: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """A layer's forward that fewer rows go through than there are."""
        forward = forward_of(module, before)
        entered = self._enter_fewer(planned, module, hidden, masks, kwargs)
        if entered is None:
            return forward(hidden, *masks, **kwargs)
        return self._leave_fewer(planned, entered, forward(entered.rows, *masks, **kwargs))

    @torch.compiler.disable
    def _enter_fewer(
        self, planned: PlannedStep, layer: Any, hidden: Tensor, masks: Args, kwargs: Kwargs
    ) -> Entered | None:
        encoding, number = self.state.encoding, planned.step.layer
        if encoding is None:
            return None
        arguments = self._named(masks, kwargs)
        arguments.pop("dataset_index", None)  # of each image, not of each row
        if self.encoder.masks_kernels:
            arguments["attention_mask"] = encoding.bias
        told = [name for name, value in arguments.items() if _of_rows(value, hidden.shape[-2])]
        if told:
            raise UnsupportedModelError(
                f"{planned.method.slug} lets some rows go through encoder layer {number}, but this "
                f"{self.family.model_type} tells its layers something of every row "
                f"({', '.join(told)})"
            )
        signals = functools.partial(self._signal, encoding, number, layer, hidden)
        return encoding.enter(planned, hidden, signals)

    @torch.compiler.disable
    def _leave_fewer(self, planned: PlannedStep, entered: Entered, output: Tensor) -> Tensor:
        assert self.state.encoding is not None  # within a pass
        return self.state.encoding.leave_layer(planned, entered, output)

    @untraced
    def _halves(
        self,
        steps: list[PlannedStep],
        module: nn.Module,
        before: Callable[..., Any] | None,
        hidden: Tensor,
        *by_place: Any,
        **kwargs: Any,
    ) -> Tensor:
        """A layer's forward with steps between its attention and its MLP."""
        encoding, block = self.state.encoding, self.encoder.block
        assert block is not None  # checked in the plan
        bias, removes = (None, False) if encoding is None else self._due(encoding, steps)
        if encoding is None or (bias is None and not removes):
            return forward_of(module, before)(hidden, *by_place, **kwargs)
        kwargs = self._named(by_place, kwargs)
        encoding.taps = {}
        hidden = block.attend(module, hidden, bias=bias, **kwargs)
        hidden = self._between(encoding, steps if removes else [], hidden)
        return block.feed(module, hidden, **kwargs)

    @torch.compiler.disable
    def _due(self, encoding: Encoding, steps: list[PlannedStep]) -> tuple[Tensor | None, bool]:
        """What a layer's scores get besides a mask, and whether steps within it remove anything."""
        assert self.encoder.block is not None  # checked in the plan
        bias = encoding.bias if self.encoder.block.output is not None else None
        return bias, encoding.removes(steps)

    @torch.compiler.disable
    def _between(self, encoding: Encoding, steps: list[PlannedStep], hidden: Tensor) -> Tensor:
        """Between a layer's attention and its MLP."""
        if steps:
            hidden = encoding.reduce(steps, hidden, encoding.tapped)
        encoding.taps = None
        encoding.rows[-1] = (encoding.rows[-1][0], hidden.shape[-2])
        return hidden

    def _tap(
        self, name: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor
    ) -> None:
        encoding = self.state.encoding
        if encoding is not None and encoding.taps is not None:
            encoding.taps[name] = output

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

    # -- what was done

    def _describe(self, encoding: Encoding) -> Record:
        images = [
            ImageRecord(
                n, shape.total, shape.grid, dict(kept), self._locate(encoding, n, shape),
                shape.frames,
            )
            for n, (shape, kept) in enumerate(encoding.survivors())
        ]  # fmt: skip
        return Record(
            rows=len(images),
            prompt_tokens=[],
            images=images,
            layer_tokens=[],
            cache_slots=[],
            pixels=None if any(image.frames > 1 for image in images) else encoding.pixels,
            encoder_tokens=encoding.layer_rows,
            encoder_bounds=encoding.layer_bounds,
            encoded={"image": of_shapes(encoding.arguments)},
            results=encoding.results(),
        )

    def _locate(self, encoding: Encoding, number: int, shape: Shape) -> Locate | None:
        """What finds out where the tokens of an image of an encoder alone lie, if that depends on
        what it was called with.
        """
        if self.family.text_layers or not self.family.placed_by:
            return None
        arguments = {n: a for n, a in encoding.arguments.items() if n in self.family.placed_by}
        boxes = functools.partial(self.family.boxes, "image", number, shape, arguments)
        return lambda: TokenBoxes(boxes())


def _check_not_run_again(layer: nn.Module) -> None:
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        raise UnsupportedModelError(
            f"gradient checkpointing runs a {type(layer).__name__} again after the pass, when the "
            "mask that foveate hands to its kernel is gone; turn it off "
            "(`gradient_checkpointing_disable()`)"
        )


def _of_rows(value: Any, rows: int) -> bool:
    """Whether an argument of a layer says something of each of its rows."""
    if isinstance(value, tuple):
        return any(_of_rows(part, rows) for part in value)
    return isinstance(value, Tensor) and rows in value.shape[-2:]
