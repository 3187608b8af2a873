"""Signals of vision towers inside vLLM whose images lie in one sequence.

The arithmetic is foveate's own. What differs is what layers are told: rotary embeddings of half a
head, and bounds of segments in units of the attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from foveate.integrations.vllm.signals import Hooks
from foveate.signals.packed import PackedSignals


class BlockHooks(Hooks):
    """Hooks on layers that vLLM may call past their hooks, as it does with what it can compile.

    What a layer is told, its attention is told as well; what it makes, the norm that comes next is
    given.

    Args:
        blocks: the layers, with `attn` and `norm1`.
        last: the norm after the last of them.
    """

    def __init__(self, blocks: Sequence[Any], last: nn.Module) -> None:
        super().__init__()
        self._next = dict(zip(blocks, [*(block.norm1 for block in blocks[1:]), last], strict=True))

    def before(self, module: Any, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before a module's forward."""
        super().before(module.attn if module in self._next else module, hook)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after a module's forward."""
        if module not in self._next:
            return super().after(module, hook)

        def given(norm: nn.Module, args: Any, kwargs: Any) -> None:
            hook(module, (), {}, args[0])

        return super().before(self._next[module], given)


class TowerSignals(PackedSignals):
    """Collects signals while a tower of vLLM runs."""

    def _note(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before a layer: what it is told, in the terms of transformers."""
        half = kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"]
        told = {
            "position_embeddings": tuple(torch.cat((part, part), -1) for part in half),
            "cu_seqlens": bounds(kwargs),
        }
        super()._note(number, module, (), told)


def bounds(told: Mapping[str, Any]) -> torch.Tensor:
    """(S + 1) rows where segments that see each other begin and end.

    Args:
        told: what vLLM calls a layer with. For FlashInfer it gives lengths as well, with bounds in
            elements of its buffers.
    """
    lengths = told.get("sequence_lengths")
    if lengths is None:
        cumulative: torch.Tensor = told["cu_seqlens"]
        return cumulative
    return torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))
