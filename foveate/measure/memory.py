"""Peak memory of a call: what it needs beyond what was there before, such as weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


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
