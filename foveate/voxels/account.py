"""FLOPs of sparse convolutions, counted from the pairs that they visit."""

from __future__ import annotations

from typing import Any

from torch import nn

from foveate.voxels.convolution import PairConvolution


class ConvolutionAccount:
    """Counts the FLOPs of the sparse convolutions of a module while it runs, in a `with` block.

    A pair of an input and an output voxel costs inputs x outputs x 2; biases, normalisation and
    attention are left out.

    Args:
        module: what contains them.

    Attributes:
        flops: by the name of each convolution, over all calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.flops: dict[str, int] = {}

    @property
    def total(self) -> int:
        """FLOPs of all of them."""
        return sum(self.flops.values())

    def __enter__(self) -> ConvolutionAccount:
        self._hooks = [
            part.register_forward_pre_hook(self._counter(name))
            for name, part in self.module.named_modules()
            if isinstance(part, PairConvolution)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _counter(self, name: str) -> Any:
        def count(part: PairConvolution, inputs: tuple[Any, ...]) -> None:
            self.flops[name] = self.flops.get(name, 0) + part.flops(*inputs)

        return count
