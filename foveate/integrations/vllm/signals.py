"""Signals of a vision tower that runs inside vLLM.

The hooks and the arithmetic are foveate's own. What differs is what they are handed: linear layers
of vLLM return a pair, and under tensor parallelism the heads of one rank. All heads are brought
together, so that every rank computes the same scores and keeps the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Gather = Callable[[Tensor], Tensor]
"""Brings the (..., n) parts of all ranks together along the last axis."""


class Hooks:
    """Puts hooks on modules of vLLM, and takes them off again; an `Attaching`."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before a module's forward."""

        def call(module: nn.Module, args: Any, kwargs: Any) -> None:
            hook(module, args, kwargs)

        self._stack.callback(module.register_forward_pre_hook(call, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after a module's forward."""

        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hook(module, args, kwargs, output)

        self._stack.callback(module.register_forward_hook(call, with_kwargs=True).remove)

    def tap(self, parent: nn.Module, name: str, hook: Callable[..., Any]) -> None:
        """The same for a linear layer, whose output of all ranks the hook is handed."""

        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hook(module, args, kwargs, whole(module, output))

        self.after(getattr(parent, name), call)


def whole(module: Any, output: Any, gather: Gather | None = None) -> Tensor:
    """What a linear layer makes, of all ranks.

    Args:
        module: the layer.
        output: what it has returned: a tensor, or that and a bias.
        gather: `tensor_model_parallel_all_gather` of vLLM by default.
    """
    made: Tensor = output[0] if isinstance(output, tuple) else output
    ranks = getattr(module, "tp_size", 1)
    if ranks == 1:
        return made
    parts = (gather or _all_gather)(made).unflatten(
        -1, (ranks, 3, -1)
    )  # each rank has queries, keys, values
    return parts.transpose(-3, -2).flatten(-3)


def _all_gather(part: Tensor) -> Tensor:
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(part)


@contextmanager
def inputs_of(module: nn.Module) -> Any:
    """While open, a list of what a module is given."""
    given: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)))

    with Hooks() as hooks:
        hooks.before(module, note)
        yield given
