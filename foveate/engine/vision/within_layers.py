"""What acts within the layers of an encoder: around their attention, between their halves, and in
place of their forward where fewer rows go through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import Need
from foveate.engine.compilation import untraced
from foveate.engine.plan import PlannedStep
from foveate.engine.replaced_forward import forward_of
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.encoder_group import EncoderGroup
from foveate.engine.vision.fewer_rows import Entered, enter, leave
from foveate.engine.vision.forward import Encoding
from foveate.engine.vision.running_layer import RunningLayer
from foveate.errors import UnsupportedModelError
from foveate.families import Encoder, Family
from foveate.signals.encoder_hooks import EncoderSignals
from foveate.signals.rotary import rotated
from foveate.signals.signal import over_layers

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class WithinLayers:
    """Hooks and forwards of an encoder's layers, for the pass that a thread is in.

    Args:
        family: the model.
        encoder: its encoder.
        state: what each thread is doing with the model.
        signals: what is collected of earlier layers; `None` for nothing.
    """

    def __init__(
        self,
        family: Family,
        encoder: Encoder,
        state: ThreadState,
        signals: EncoderSignals | None,
    ) -> None:
        self.family = family
        self.encoder = encoder
        self.state = state
        self._signals = signals

    @property
    def _layer(self) -> RunningLayer | None:
        """The layer that runs, or runs again; `None` outside of a pass, and with all rows back."""
        if self.state.recomputed is not None:
            return self.state.recomputed
        encoding = self.state.encoding
        return None if encoding is None or encoding.restored else encoding.layer

    def named(self, by_place: Args, kwargs: Kwargs) -> Kwargs:
        """What a layer is handed besides states, by name."""
        return {**kwargs, **dict(zip(self.encoder.by_place, by_place, strict=False))}

    def signal(
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
            return encoding.layer.ahead(layer, hidden, of)
        assert self._signals is not None  # as planned
        rows = [encoding.at_tokens(self.state.signals[need.name, i], of) for i in need.layers]
        return self._signals.deliver(need.name, over_layers(need, rows))

    @untraced
    def rotate(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of a projection's forward: turn queries or keys, where layers cannot."""
        return self._turned(forward_of(module, before)(*args, **kwargs))

    @torch.compiler.disable
    def _turned(self, output: Tensor) -> Tensor:
        layer = self._layer
        if layer is None or not layer.turning:
            return output
        return rotated(output, layer.rotary, self.encoder.heads_of(output.shape[-1]))

    def enter_attention(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before the attention of a layer that takes no mask: hand it one."""
        layer = self._layer
        if layer is None or layer.bias is None:
            return None
        return args, {**kwargs, "attention_mask": layer.bias}

    @torch.compiler.disable
    def mask(self, given: Tensor | None) -> Tensor | None:
        """What the kernel of a layer that takes no mask is handed as one."""
        layer = self._layer
        return given if layer is None else layer.kernel_mask(given)

    @torch.compiler.disable
    def attend(self, planned: PlannedStep, *parts: Any) -> Tensor | None:
        """In place of a layer's kernel, where a method attends; `None` outside of a pass."""
        encoding = self.state.encoding
        return None if encoding is None else encoding.attend(planned, *parts)

    def note_normed(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the attention of a layer in which a method attends: note what it is given."""
        if self.state.encoding is not None:
            self.state.encoding.layer.normed = args[0] if args else kwargs["hidden_states"]

    @untraced
    def run_fewer(
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
        arguments = self.named(masks, kwargs)
        if self.encoder.masks_kernels:
            arguments["attention_mask"] = encoding.bias
        told = [name for name, value in arguments.items() if _of_rows(value, hidden.shape[-2])]
        if told:
            raise UnsupportedModelError(
                f"{planned.method.slug} lets some rows go through encoder layer {number}, but this "
                f"{self.family.model_type} tells its layers something of every row "
                f"({', '.join(told)})"
            )
        signals = functools.partial(self.signal, encoding, number, layer, hidden)
        return enter(encoding, planned, hidden, signals)

    @torch.compiler.disable
    def _leave_fewer(self, planned: PlannedStep, entered: Entered, output: Tensor) -> Tensor:
        assert self.state.encoding is not None  # within a pass
        return leave(self.state.encoding, planned, entered, output)

    @untraced
    def run_halves(
        self,
        steps: list[PlannedStep],
        module: nn.Module,
        before: Callable[..., Any] | None,
        hidden: Tensor,
        *by_place: Any,
        **kwargs: Any,
    ) -> Any:
        """A layer's forward with steps between its attention and its MLP."""
        encoding, block = self.state.encoding, self.encoder.block
        assert block is not None  # checked in the plan
        bias, removes = (None, False) if encoding is None else self._due(encoding, steps)
        if encoding is None or (bias is None and not removes):
            return forward_of(module, before)(hidden, *by_place, **kwargs)
        kwargs = self.named(by_place, kwargs)
        encoding.layer.taps = {}
        hidden = block.attend(module, hidden, bias=bias, **kwargs)
        hidden = self._between(encoding, steps if removes else [], hidden)
        return self.encoder.output_of(block.feed(module, hidden, **kwargs))

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
        encoding.layer.taps = None
        encoding.rows[-1] = (encoding.rows[-1][0], hidden.shape[-2])
        return hidden

    def tap(self, name: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> None:
        """After a projection of a layer run in halves: note what it has made."""
        encoding = self.state.encoding
        if encoding is not None and encoding.layer.taps is not None:
            encoding.layer.taps[name] = output


def _of_rows(value: Any, rows: int) -> bool:
    """Whether an argument of a layer says something of each of its rows."""
    if isinstance(value, tuple):
        return any(_of_rows(part, rows) for part in value)
    return isinstance(value, Tensor) and value.dim() > 1 and rows in value.shape[-2:]
