"""Peak memory of a call, beyond what was there before, such as weights; what weights and a cache
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes that a cache holds in slots of tokens, and in running states.

    Args:
        cache: a KV cache of transformers, filled.
    """
    parts = ("keys", "values", "prefill_keys", "prefill_values", "indexer_keys")
    slots = [getattr(layer, part, None) for layer in cache.layers for part in parts]
    tables = [
        getattr(layer, part, {})
        for layer in cache.layers
        for part in ("conv_states", "recurrent_states")
    ]
    states = [state for table in tables for state in table.values()]
    return _bytes(slots), _bytes(states)


def weight_bytes(model: nn.Module) -> int:
    """Bytes that parameters and buffers take as they are stored: packed, with scales and zero
    points where they are quantised by torchao. What several modules share counts once.

    Args:
        model: any module, such as a quantised or pruned model.
    """
    tensors = (*model.parameters(), *model.buffers())
    return _bytes(part for tensor in tensors for part in _stored(tensor))


def _stored(tensor: Any) -> list[Tensor]:
    """The plain tensors that one is made of, such as a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [plain for part in parts if part is not None for plain in _stored(part)]


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def peak_memory(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that tensors hold at the worst moment of a call, less those held before it.

    On a CUDA device, torch's caching allocator is asked (`max_memory_allocated`). On a CPU, every
    allocation and release of a tensor's storage is recorded by torch's profiler and summed; scratch
    memory that math libraries take for themselves is not seen there.

    Args:
        fn: what is called, once.
        device: where it works.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn()
    assert recorded.profiler is not None
    found = recorded.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    return max(accumulate(size for _, size in events), default=0)


def how_peaks_are_measured(device: torch.device | str) -> str:
    """What `peak_memory` counts on a device, in words for results."""
    if torch.device(device).type == "cuda":
        return "CUDA: max_memory_allocated during one prompt, less what was allocated before it"
    return (
        "CPU: tensor storage alive at the worst moment of one prompt, by torch's profiler, weights "
        "and inputs left out; scratch memory of math libraries is not seen"
    )
