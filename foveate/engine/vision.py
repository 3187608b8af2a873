"""The vision part of a session: shorten the stream inside the encoder.

Layers in which nothing is removed keep their own forward. A layer in which tokens are removed
between attention and MLP is run in two halves; that needs an instance-level forward, because hooks
do not reach in between.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.encoding import Encoding
from foveate.engine.part import Part
from foveate.engine.plan import Plan, PlannedStep
from foveate.errors import UnsupportedModelError
from foveate.models import Family
from foveate.record import ImageRecord, Record

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class _Local(threading.local):
    """What one thread is doing with the encoder."""

    encoding: Encoding | None = None
    collected: list[Encoding] | None = None  # finished passes, while somebody collects them
    as_tuple: bool = False  # the caller wants a tuple
    record: Record | None = None


class VisionPart(Part):
    """Steps inside an encoder, in an encoder alone or in the tower of a larger model.

    Args:
        plan: what to do where.
        family: the model.
    """

    def __init__(self, plan: Plan, family: Family) -> None:
        super().__init__()
        self.family = family
        assert family.encoder is not None  # the plan has checked it
        self.encoder = family.encoder
        self._before: dict[int, list[PlannedStep]] = defaultdict(list)
        self._inside: dict[int, list[PlannedStep]] = defaultdict(list)
        for planned in plan.vision:
            steps = self._inside if planned.step.inside else self._before
            steps[planned.step.layer].append(planned)
        self._first = min((s.step.layer for s in plan.vision), default=len(self.encoder.layers))
        self._local = _Local()
        self._last: Record | None = None

    @property
    def root(self) -> Any:
        """The encoder."""
        return self.encoder.tower

    @property
    def record(self) -> Record | None:
        """The last pass: this thread's, or else any thread's."""
        return self._local.record or self._last

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """Rows that each layer of the last pass saw."""
        return [] if self.record is None else self.record.encoder_tokens

    @property
    def running(self) -> Encoding | None:
        """The pass that this thread is in."""
        return self._local.encoding

    @contextmanager
    def collect(self) -> Iterator[list[Encoding]]:
        """While open, fill a list with the passes that end, in this thread only."""
        passes: list[Encoding] = []
        self._local.collected = passes
        try:
            yield passes
        finally:
            self._local.collected = None

    # -- attach

    def check(self) -> None:
        """Refuse layers that another library runs in its own way.

        Raises:
            UnsupportedModelError: a layer that must be run in halves has a forward of its own.
        """
        for number in self._inside:
            if "forward" in vars(self.encoder.layers[number]):
                raise UnsupportedModelError(
                    f"encoder layer {number} has had its forward replaced (accelerate does so to "
                    "spread a model over devices), but tokens can be removed within a layer only "
                    "if it runs as it is; load the encoder onto one device, or remove tokens "
                    "before a layer or behind the encoder"
                )

    def attach(self) -> None:
        """Install the hooks, and the forwards of layers that are run in halves."""
        self.before(self.root, self._enter)
        self.behind(self.root, self._leave, always=True)
        for number in range(self._first, len(self.encoder.layers)):
            layer = self.encoder.layers[number]
            self.before(layer, functools.partial(self._enter_layer, number))
            if steps := self._inside.get(number):
                self.wrap(layer, "forward", functools.partial(self._halves, layer, steps))
                if any(planned.step.needs for planned in steps):
                    for name in ("q_proj", "k_proj"):
                        projection = getattr(self.encoder.attention(layer), name)
                        self.behind(projection, functools.partial(self._tap, name))
        if self._first < len(self.encoder.layers) and self.encoder.head is not None:
            self.before(self.encoder.head, self._enter_head)
            for module in self.encoder.head.modules():
                if isinstance(module, nn.MultiheadAttention):
                    self.before(module, self._enter_pooling)

    # -- around the encoder

    def _enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        pixels = args[0] if args else kwargs.get("pixel_values")
        self._local.encoding = Encoding(self.family, self.encoder, pixels)
        self._local.as_tuple = not kwargs.get("return_dict", self.root.config.return_dict)
        return (args, {**kwargs, "return_dict": True}) if self._local.as_tuple else None

    def _leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        encoding, self._local.encoding = self._local.encoding, None
        if encoding is None or output is None:  # it raised
            return None
        encoding.see(output.last_hidden_state)
        if self._local.collected is not None:
            self._local.collected.append(encoding)
        self._local.record = self._last = self._describe(encoding)
        output = encoding.leave(output)
        return output.to_tuple() if self._local.as_tuple else output

    # -- around a layer

    def _enter_layer(self, number: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before a layer: run the steps due there, and hand it the mask that fits."""
        encoding = self._local.encoding
        if encoding is None:
            return None
        hidden = args[0]
        encoding.see(hidden)
        steps = self._before.get(number)
        if steps and encoding.removes(steps):
            hidden = encoding.reduce(steps, hidden, lambda _: encoding.ahead(module, args[0]))
        encoding.rows.append((hidden.shape[1], hidden.shape[1]))
        if encoding.layout is None:
            return None
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        mask = encoding.mask(given)
        if len(args) > 1:
            return (hidden, mask, *args[2:]), kwargs
        return (hidden,), {**kwargs, "attention_mask": mask}

    def _halves(
        self,
        layer: nn.Module,
        steps: list[PlannedStep],
        original: Any,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """A layer's forward with steps between its attention and its MLP."""
        encoding, block = self._local.encoding, self.encoder.block
        if encoding is None or not encoding.removes(steps):
            return original(hidden, attention_mask, **kwargs)
        assert block is not None  # checked in the plan
        encoding.mask(attention_mask)
        encoding.taps = {}
        hidden = block.attend(layer, hidden, attention_mask, **kwargs)
        hidden = encoding.reduce(steps, hidden, encoding.tapped)
        encoding.taps = None
        encoding.rows[-1] = (encoding.rows[-1][0], hidden.shape[1])
        return block.feed(layer, hidden)

    def _tap(self, name: str, module: nn.Module, args: Args, output: Tensor) -> None:
        encoding = self._local.encoding
        if encoding is not None and encoding.taps is not None:
            encoding.taps[name] = output

    # -- around a head that pools by attention

    def _enter_head(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before the head: its mask of all tokens, which hides none, no longer fits."""
        encoding = self._local.encoding
        if encoding is None or encoding.layout is None:
            return None
        return args[:1], {}

    def _enter_pooling(self, module: Any, args: Args, kwargs: Kwargs) -> Any:
        """Before the head's attention: count a merged token as often as it has sources."""
        encoding = self._local.encoding
        if encoding is None or encoding.merged is None:
            return None
        log = encoding.merged.log().to(args[0].dtype)[:, None]
        return args, {**kwargs, "attn_mask": log.repeat_interleave(module.num_heads, 0)}

    # -- what was done

    def _describe(self, encoding: Encoding) -> Record:
        kept = survivors([encoding])
        images = [
            ImageRecord(
                i, encoding.total, encoding.grid, {place: at[i] for place, at in kept.items()}
            )
            for i in range(encoding.images)
        ]
        full = encoding.total + self.encoder.special
        rows = [(full, full)] * min(self._first, len(self.encoder.layers)) + encoding.rows
        return Record(
            rows=len(images),
            prompt_tokens=[],
            images=images,
            layer_tokens=[],
            cache_slots=[],
            pixels=encoding.pixels,
            encoder_tokens=rows,
        )


def survivors(passes: list[Encoding], lengths: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Place -> (images, K) raster positions alive behind it, ascending.

    Args:
        passes: passes through the encoder, with the same places.
        lengths: visual tokens that the language model is given of each image.

    Raises:
        UnsupportedModelError: they are not the encoder's patches, one for one.
    """
    seen = [encoding.total for encoding in passes for _ in range(encoding.images)]
    if passes and lengths is not None and list(lengths) != seen:
        raise UnsupportedModelError(
            f"the encoder saw {len(seen)} images of {sorted(set(seen))} patches, but the language "
            f"model is given {len(lengths)} of {sorted(set(lengths))} tokens, so that what was "
            "removed inside the encoder cannot be followed; use a pre_llm or llm method"
        )
    places = passes[0].kept if passes else {}
    return {
        place: torch.cat([encoding.kept[place].sort(-1).values for encoding in passes])
        for place in places
    }
