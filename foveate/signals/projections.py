"""What an encoder layer projects its rows to, which signals are computed from.

Shapes: `B` images, `S` special tokens before the `V` patches, `N = S + V`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from foveate.signals.attention_maps import attention_sums, global_attention


@dataclass(frozen=True, eq=False)
class Projections:
    """Projections of one layer.

    Args:
        query: (B, N, D) queries, with rotary positions if there are any.
        key: (B, N, D) keys, likewise.
        value: (B, N, D) values, if a signal reads them.
        heads: attention heads.
        special: S.
        bias: (B, 1, 1, N) what the encoder adds to the scores of keys.
        threshold: how many times the mean a global patch receives at least.
        plain_key: (B, N, D) keys without rotary positions; `None` where there are none.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    heads: int
    special: int = 0
    bias: Tensor | None = None
    threshold: float = 0.0
    plain_key: Tensor | None = None

    @property
    def patch_keys(self) -> Tensor:
        """(B, D, V) keys of the patches, without rotary positions."""
        key = self.key if self.plain_key is None else self.plain_key
        return key[:, self.special :].transpose(1, 2)

    @property
    def received(self) -> Tensor:
        """(B, 1, V) attention that patches receive."""
        return self._sums[0][:, None]

    @property
    def given(self) -> Tensor:
        """(B, 1, V) attention that patches give to patches."""
        return self._sums[1][:, None]

    @property
    def from_global(self) -> Tensor:
        """(B, 1, V) attention that patches receive from global rows."""
        sizes = self.heads, self.special, self.bias
        return global_attention(self.query, self.key, *sizes, self.threshold)[:, None]

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        return attention_sums(self.query, self.key, self.heads, self.special, self.bias)
