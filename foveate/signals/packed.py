"""Signals of vision encoders whose images lie in one sequence, or are rows padded to one length:
rotary positions, windows, cells.

The rows of a batch are taken one after another, padding included, which a bias hides. A token made
of a cell of patches gets the mean of its rows. Shapes: `N` rows of all images, `H` heads, `d` of a
head, `V` visual tokens of an image, `C` channels of a signal.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.transfer import Downloads, download, upload
from foveate.families import Encoder
from foveate.families.rows import EncoderImage
from foveate.signals import EncoderSignal
from foveate.signals.attention_maps import attention_sums, global_attention, queries
from foveate.signals.encoder_hooks import Attaching, EncoderSignals, Shortened
from foveate.signals.projections import Projections

ROWS = 2**14  # rows whose attention is summed up together
Attention = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
"""Makes (B, N) of (B, N, H d) queries and keys of segments, H and a bias (B, 1, 1, N)."""


@dataclass(frozen=True, eq=False)
class PackedProjections(Projections):
    """Projections (N, D) of images in one sequence; what is made of them is (N, C).

    Args:
        in_segments: makes (N) of the attention within each segment.
    """

    in_segments: Callable[[Attention], Tensor] = field(kw_only=True)

    @property
    def patch_keys(self) -> Tensor:
        """(N, D) keys."""
        return self.key

    @property
    def received(self) -> Tensor:
        """(N, 1) attention that rows receive, summed over queries."""
        return self.in_segments(received_sums)[:, None]

    @property
    def from_global(self) -> Tensor:
        """(N, 1) attention that rows receive from global rows of their segment."""
        return self.in_segments(partial(_from_global, self.threshold))[:, None]

    @property
    def given(self) -> Tensor:
        """(N, 1) share of its attention that a row gives to patches: there are only patches."""
        return torch.ones(len(self.key), 1, device=self.key.device)


class PackedSignals(EncoderSignals):
    """Collects signals while an encoder of packed images runs: (C, V) of each image.

    Args:
        encoder: the encoder.
        wanted: signal -> 0-based layers.
        running: gives the pass that this thread is in, where tokens are removed inside the encoder.
        threshold: how many times the mean global patches receive at least.
        side: side of a visual token in patches.
        read: gives what the host knows of the arguments of this thread's forward.
    """

    def __init__(
        self,
        encoder: Encoder,
        wanted: Mapping[str, tuple[int, ...]],
        running: Callable[[], Shortened | None] = lambda: None,
        threshold: float = 0.0,
        side: int = 1,
        read: Callable[[], Downloads] = Downloads,
    ) -> None:
        super().__init__(encoder, wanted, running, threshold)
        self.side, self._read = side, read

    def attach(self, on: Attaching) -> None:
        """Hook the tower, beside what is hooked in other encoders."""
        on.before(self.encoder.tower, self._see)
        super().attach(on)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.encoder.packed is not None
        names = inspect.signature(type(module).forward.__get__(module)).parameters
        arguments = self._read().arguments({**dict(zip(names, args, strict=False)), **kwargs})
        self._running.images = self.encoder.packed(arguments, self.side)
        self._running.arguments = arguments
        if self.encoder.later is not None:
            _, packed = self.encoder.later
            self._running.later = packed(arguments, self.side)

    def _images(self, number: int) -> Sequence[EncoderImage]:
        """The images as a layer has them."""
        later = self.encoder.later is not None and number >= self.encoder.later[0]
        return self._running.later if later else self._running.images

    def _keep(self, signal: EncoderSignal, number: int, row: Tensor) -> None:
        """Note (N, C) values as (C, V) of each image."""
        shortened = self._pass()
        whole = row if shortened is None else _flat(shortened.unpruned(row))
        found = []
        for image in self._images(number):
            values = whole[upload(image.rows, whole.device)].mean(1).T
            if signal.summed:
                values = values / self._queries(image, whole)
            found.append(values)
        self._running.rows[signal.name, number] = found

    def _queries(self, image: EncoderImage, whole: Tensor) -> Tensor:
        """(V) rows surviving in the frame of each token of an image, among (N, C) rows of all."""
        surviving = torch.ones(len(whole), device=whole.device)
        shortened = self._pass()
        if shortened is not None and (order := shortened.order) is not None:
            surviving = torch.zeros_like(surviving).index_fill(0, order, 1.0)
        frames = surviving[upload(image.rows, whole.device)].view(image.frames, -1)
        counts = frames.sum(1, keepdim=True).clamp(min=1)
        return counts.expand(-1, len(image.rows) // image.frames).flatten()

    def _states(self, output: Any) -> Tensor:
        states = output if isinstance(output, Tensor) else output[0]
        return _flat(states.detach())

    def _projections(self, parts: list[Tensor]) -> Projections:
        query, key, *_ = (_flat(part) for part in self.encoder.projected(parts))
        told, heads = self._running.told, self.encoder.heads_of(query.shape[-1])
        bias = self._bias
        bias = None if bias is None else bias.flatten()

        def in_segments(of: Attention) -> Tensor:
            q, k = (self._rotated(part, told) for part in (query, key))
            return by_segments(of, self._scaled(q), k, self._bounds(told, key), heads, bias)

        return PackedProjections(
            query, key, None, heads, bias=bias, threshold=self.threshold, in_segments=in_segments
        )

    def _scaled(self, query: Tensor) -> Tensor:
        """(N, H d) queries whose scores are the encoder's once divided by the root of d."""
        scaling = self.encoder.scaling
        width = query.shape[-1] // self.encoder.heads_of(query.shape[-1])
        return query if scaling is None else query * (scaling * math.sqrt(width))

    def _rotated(self, x: Tensor, told: Mapping[str, Any]) -> Tensor:
        """(N, H d) with rotary positions, where the layer has them: of the first part of each head
        in some, as wide as these.
        """
        if told.get("position_embeddings") is None:
            return x
        cos, sin = (_flat(part)[:, None].float() for part in told["position_embeddings"])
        heads = x.unflatten(-1, (self.encoder.heads_of(x.shape[-1]), -1)).float()
        heads, plain = heads.tensor_split([cos.shape[-1]], -1)
        first, second = heads.unflatten(-1, (self.encoder.axes, -1)).chunk(2, -1)
        rotated = heads * cos + torch.cat((-second, first), -1).flatten(-2) * sin
        return torch.cat((rotated, plain), -1).to(x.dtype).flatten(1)

    def _bounds(self, told: Mapping[str, Any], key: Tensor) -> Tensor:
        """(S + 1) where segments that see each other begin and end, on the host."""
        images = self._images(self._running.number)
        shortened, given = self._pass(), told.get("cu_seqlens")
        order = None if shortened is None else shortened.order
        if given is not None:
            for known in self._segments(images):
                if len(known) == len(given) and known[-1] == len(key):  # if both are, they agree
                    return known
            return self._read().of(given).long()
        if self.encoder.padded:
            return torch.arange(0, len(key) + 1, len(key) // len(images))
        bounds = torch.tensor([0, *(image.rows.numel() for image in images)]).cumsum(0)
        if order is None:
            return bounds
        return download([torch.searchsorted(order, upload(bounds, order.device))])[0]

    def _segments(self, images: Sequence[EncoderImage]) -> Iterator[Tensor]:
        """Where frames begin and end, and where windows do, while all rows are there."""
        frames = [one.rows.numel() // one.frames for one in images for _ in range(one.frames)]
        yield torch.tensor([0, *frames]).cumsum(0)
        if self.encoder.windows is not None:
            windows = self.encoder.windows(self._running.arguments, self.side)
            yield self._read().of(windows).long()


@torch.no_grad()
def by_segments(
    of: Attention,
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    heads: int,
    bias: Tensor | None = None,
) -> Tensor:
    """What is made of the attention of each segment by itself.

    Args:
        of: makes it of segments of equal length.
        query: (N, H d) queries, rotated.
        key: (N, H d) keys, rotated.
        bounds: (S + 1) where segments begin and end, on the host.
        heads: H.
        bias: (N) what the encoder adds to the scores of each key.

    Returns:
        (N) float32.
    """
    found = torch.zeros(len(key), device=key.device)
    starts, lengths = bounds[:-1], bounds.diff()
    for length in lengths.unique().tolist():
        alike = starts[lengths == length].split(max(ROWS // max(length, 1), 1))
        for begin in alike if length else ():
            rows = upload(begin[:, None] + torch.arange(length), key.device)
            added = None if bias is None else bias[rows][:, None, None]
            found[rows.flatten()] = of(query[rows], key[rows], heads, added).flatten()
    return found


def received_sums(query: Tensor, key: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """(B, N) attention that rows receive: head mean, summed over queries."""
    received, _ = attention_sums(query, key, heads, 0, bias)
    return received * queries(key, bias)


def _from_global(
    threshold: float, query: Tensor, key: Tensor, heads: int, bias: Tensor | None
) -> Tensor:
    """(B, N) attention that rows receive from global rows."""
    return global_attention(query, key, heads, 0, bias, threshold)


def _flat(states: Tensor) -> Tensor:
    """(N, D) of states that may be those of a batch, whose rows follow one another."""
    return states.flatten(0, 1) if states.dim() == 3 else states
