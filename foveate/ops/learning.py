"""Learning: modules of methods that learn, as they are before they have learned anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def untrained(make: Callable[[], M]) -> M:
    """A new module whose weights are the same each time; the caller's random numbers go on."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return make()


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs of what is done on the meta device, a multiply-add counted as 2."""
    from torch.utils.flop_counter import FlopCounterMode  # late: few runs are counted

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()
