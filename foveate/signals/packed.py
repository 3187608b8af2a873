"""Signals of vision encoders whose images lie in one sequence: rotary positions, windows, cells.

A token made of a cell of patches gets the mean of its rows. Shapes: `N` rows of all images, `H`
heads, `d` of a head, `V` visual tokens of an image, `C` channels of a signal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveate.families import Encoder
from foveate.families.rows import EncoderImage
from foveate.signals import EncoderSignal
from foveate.signals.attention_maps import attention_sums, queries
from foveate.signals.encoder_hooks import Attaching, EncoderSignals, Shortened
from foveate.signals.projections import Projections

ROWS = 2**14  # rows whose attention is summed up together


@dataclass(frozen=True, eq=False)
class PackedProjections(Projections):
    """Projections (N, D) of images in one sequence; what is made of them is (N, C).

    Args:
        sums: (N) attention that rows receive, from queries, keys and bias.
    """

    sums: Callable[[Tensor, Tensor, Tensor | None], Tensor] = field(kw_only=True)

    @property
    def patch_keys(self) -> Tensor:
        """(N, D) keys."""
        return self.key

    @property
    def received(self) -> Tensor:
        """(N, 1) attention that rows receive, summed over queries."""
        return self.sums(self.query, self.key, self.bias)[:, None]

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
        side: side of a visual token in patches.
    """

    def __init__(
        self,
        encoder: Encoder,
        wanted: Mapping[str, tuple[int, ...]],
        running: Callable[[], Shortened | None] = lambda: None,
        side: int = 1,
    ) -> None:
        super().__init__(encoder, wanted, running)
        self.side = side

    def attach(self, on: Attaching) -> None:
        """Hook the tower, beside what is hooked in other encoders."""
        on.before(self.encoder.tower, self._see)
        super().attach(on)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.encoder.packed is not None
        names = inspect.signature(type(module).forward.__get__(module)).parameters
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self._running.images = self.encoder.packed(arguments, self.side)

    def _keep(self, signal: EncoderSignal, number: int, row: Tensor) -> None:
        """Note (N, C) values as (C, V) of each image."""
        shortened = self._pass()
        whole = row if shortened is None else _flat(shortened.unpruned(row))
        found = []
        for image in self._running.images:
            values = whole[image.rows.to(whole.device)].mean(1).T
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
        frames = surviving[image.rows.to(whole.device)].view(image.frames, -1)
        counts = frames.sum(1).clamp(min=1)
        return counts.repeat_interleave(len(image.rows) // image.frames)

    def _states(self, output: Any) -> Tensor:
        states = output if isinstance(output, Tensor) else output[0]
        return _flat(states.detach())

    def _projections(self, parts: list[Tensor]) -> Projections:
        query, key, *_ = (_flat(part) for part in self.encoder.projected(parts))
        return PackedProjections(
            query, key, None, self.encoder.heads, bias=self._bias, sums=self._sums
        )

    def _sums(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """(N) attention that rows receive, summed over queries."""
        told = self._running.told
        query, key = (self._rotated(part, told) for part in (query, key))
        return segment_sums(query, key, self._bounds(told, key), self.encoder.heads, bias)

    def _rotated(self, x: Tensor, told: Mapping[str, Any]) -> Tensor:
        """(N, H d) with rotary positions, where the layer has them."""
        if told.get("position_embeddings") is None:
            return x
        cos, sin = (_flat(part)[:, None].float() for part in told["position_embeddings"])
        heads = x.unflatten(-1, (self.encoder.heads, -1)).float()
        first, second = heads.chunk(2, -1)
        rotated = heads * cos + torch.cat((-second, first), -1) * sin
        return rotated.to(x.dtype).flatten(1)

    def _bounds(self, told: Mapping[str, Any], key: Tensor) -> Tensor:
        """(S + 1) where segments that see each other begin and end."""
        if "cu_seqlens" in told:
            return told["cu_seqlens"].long()
        images: Sequence[EncoderImage] = self._running.images
        lengths = torch.tensor([0, *(image.rows.numel() for image in images)])
        bounds, shortened = lengths.cumsum(0).to(key.device), self._pass()
        order = None if shortened is None else shortened.order
        return bounds if order is None else torch.searchsorted(order, bounds)


@torch.no_grad()
def segment_sums(
    query: Tensor, key: Tensor, bounds: Tensor, heads: int, bias: Tensor | None = None
) -> Tensor:
    """Attention that rows receive within segments: head mean, summed over queries.

    Args:
        query: (N, H d) queries, rotated.
        key: (N, H d) keys, rotated.
        bounds: (S + 1) where segments begin and end.
        heads: H.
        bias: (N) what the encoder adds to the scores of each key.

    Returns:
        (N) float32.
    """
    sums = torch.zeros(len(key), device=key.device)
    starts, lengths = bounds[:-1], bounds.diff()
    for length in lengths.unique().tolist():
        alike = starts[lengths == length].split(max(ROWS // max(length, 1), 1))
        for begin in alike if length else ():
            rows = begin[:, None] + torch.arange(length, device=key.device)
            added = None if bias is None else bias[rows][:, None, None]
            received, _ = attention_sums(query[rows], key[rows], heads, 0, added)
            sums[rows.flatten()] = (received * queries(key[rows], added)).flatten()
    return sums


def _flat(states: Tensor) -> Tensor:
    """(N, D) of states that may have a batch of one."""
    return states.squeeze(0) if states.dim() == 3 else states
