"""How often the host waits for a device: on a GPU by torch's warnings, elsewhere on a stand-in.

What is counted is what `torch.cuda.set_sync_debug_mode` warns of:

- a value that Python reads: `item`, `tolist`, `cpu`, `bool(tensor)`, a tensor as a size or bound;
- an operation whose result has as many elements as the data say: `nonzero`, `unique`, an index that
  is a mask, `repeat_interleave` without `output_size`;
- a copy to the device from memory that is not pinned, unless it is `non_blocking`: `torch.tensor`
  of a list with a device, `to`, an index that is a list or lives on the host. The driver takes what
  a `non_blocking` copy reads before it returns, and does not wait for the device.

The stand-in holds its tensors on the CPU behind another type, whose device is `cuda:0`, so that
code takes the ways that it takes on a GPU, and mixing devices fails as it does there. Tensors of
the CPU cost nothing to read. A kernel that waits twice counts once.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("cuda:0")
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.equal, aten.allclose, aten.nonzero, aten.masked_select,
    aten.bincount, aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.unique_dim_consecutive, aten._linalg_eigh, aten._linalg_svd, aten.linalg_inv_ex,
    aten.linalg_lu_factor_ex, aten.linalg_cholesky_ex, aten._linalg_solve_ex,
}  # fmt: skip
"""Operations whose kernel waits, whatever their arguments."""


def _nonzero(x: Tensor, as_tuple: bool = False) -> Any:
    found = aten.nonzero(x)
    return found.unbind(1) if as_tuple else found


def _new_tensor(x: Tensor, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    return torch.tensor(data, dtype=dtype or x.dtype, device=device or x.device)


def _histc(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of integers too, which a CPU does not count."""
    return aten.histc(x.double(), *args, **kwargs).to(x.dtype)


WHOLE = {
    F.scaled_dot_product_attention, F.multi_head_attention_forward, torch.quantile,
    torch.nanquantile, Tensor.quantile, Tensor.nanquantile,
}  # fmt: skip
"""Calls that do not wait, and that are not taken apart: their parts ask for a GPU, or change shapes
in place."""
GUARDED = {
    Tensor.nonzero: _nonzero, torch.nonzero: _nonzero, Tensor.__invert__: aten.bitwise_not,
    Tensor.contiguous: aten.contiguous, Tensor.copy_: aten.copy_, Tensor.new_tensor: _new_tensor,
    Tensor.__int__: lambda x: int(aten.item(x)), Tensor.__index__: lambda x: int(aten.item(x)),
    Tensor.__float__: lambda x: float(aten.item(x)), torch.histc: _histc,
    **{
        getattr(Tensor, name): functools.partial(aten.to.dtype, dtype=getattr(torch, name))
        for name in ("long", "int", "float", "double", "half", "bfloat16", "bool")
    },
}  # fmt: skip
"""Calls that look for a GPU before anything can answer for it, and what they amount to."""


class Far(Tensor):
    """A tensor of the stand-in device; its values are those of `near`."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, layout=near.layout, device=FAR,
        )  # fmt: skip
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside the stand-in device")


class _Operations(TorchDispatchMode):
    """Runs operations on what tensors of the stand-in hold, and notes those that wait."""

    def __init__(self, note: Callable[[int], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with self:  # under `inference_mode` nothing has taken it apart
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = any(isinstance(x, Far) for x in tensors)
        to = kwargs.get("device")
        if far or (to is not None and torch.device(to).type != "cpu"):
            self.note(_waits(func.overloadpacket, far, args, kwargs))
        if to is not None:
            far, kwargs["device"] = torch.device(to).type != "cpu", torch.device("cpu")
            kwargs.pop("pin_memory", None)
        _check_together(func, tensors)
        made = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        if func.overloadpacket is aten._to_copy and made is args[0]:
            made = made.clone()
        known = {id(x.near): x for x in tensors if isinstance(x, Far)}
        for x in known.values():
            assert x.shape == x.near.shape, f"{func} changes a shape in place"
        return tree_map(lambda x: _far(x, known) if far else x, made)


class _Calls(TorchFunctionMode):
    """Calls that torch takes apart, or answers, before a mode of operations sees them."""

    def __init__(self, note: Callable[[int], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(isinstance(x, Far) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in (Tensor.tolist, Tensor.__format__, Tensor.__repr__):
            return func(args[0].cpu(), *args[1:])
        if func is torch.tensor:  # of numbers of the device
            data = tree_map(lambda x: x.item() if isinstance(x, Far) else x, args[0])
            return func(data, *args[1:], **kwargs)
        if func in GUARDED:
            return GUARDED[func](*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            self.note(_waits_of_index(args[1], args[2:]))
            args = args[0], _near_index(args[1]), *args[2:]
        elif func not in WHOLE:
            return func(*args, **kwargs)
        with _disable_current_modes():
            made = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        return tree_map(_far, made)


class StandIn:
    """The stand-in device. Within the context, tensors of it can be made and used."""

    def __init__(self) -> None:
        self._places: Counter[str] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> StandIn:
        enter = self._stack.enter_context
        before = torch._C._only_lift_cpu_tensors()  # else `torch.tensor` looks for a device
        torch._C._set_only_lift_cpu_tensors(True)
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        enter(mock.patch.object(torch.cuda, "_lazy_init"))
        enter(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # not their data
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        enter(torch.no_grad())
        enter(_Operations(self._note))
        enter(_Calls(self._note))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def put(self, x: Any) -> Any:
        """Tensors, or a model in place, on the device."""
        if isinstance(x, nn.Module):
            known: dict[int, Any] = {}  # tied weights stay tied
            for module in x.modules():
                for table in (module._parameters, module._buffers):
                    for name, value in table.items():
                        if value is not None:
                            known.setdefault(id(value), (_placed(value), value))
                            table[name] = known[id(value)][0]
            return x
        return tree_map(_far, x)

    @contextmanager
    def waits(self) -> Iterator[dict[str, Any]]:
        """How often the host waits within: `total`, and `places` in foveate or transformers."""
        found: dict[str, Any] = {}
        outer, self._places = self._places, Counter()
        try:
            yield found
        finally:
            found |= {"total": self._places.total(), "places": dict(self._places.most_common())}
            self._places = outer

    def _note(self, count: int) -> None:
        if count and self._places is not None:
            self._places[_caller()] += count


class Cuda:
    """A GPU, of which torch's own warnings say where the host waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Cuda:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def put(self, x: Any) -> Any:
        """Tensors, or a model, on the device."""
        if isinstance(x, nn.Module):
            return x.to(self.device)
        return tree_map(lambda one: one.to(self.device) if isinstance(one, Tensor) else one, x)

    @contextmanager
    def waits(self) -> Iterator[dict[str, Any]]:
        """As of the stand-in; with what the profiler saw of runtime calls beside them."""
        found: dict[str, Any] = {}
        torch.cuda.synchronize(self.device)
        before = torch.cuda.get_sync_debug_mode()
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as seen, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        spots = Counter(
            _place(one.filename, one.lineno) or "elsewhere"
            for one in told
            if "synchronizing CUDA operation" in str(one.message)
        )
        calls = {event.key: event.count for event in seen.key_averages()}
        names = ("cudaStreamSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
        found |= {"total": spots.total(), "places": dict(spots.most_common())}
        found["profiler"] = {name: calls.get(name, 0) for name in names}


def machine(device: torch.device) -> StandIn | Cuda:
    """A GPU, or the stand-in where there is none."""
    return Cuda(device) if device.type == "cuda" else StandIn()


# -- what waits


def _waits(operation: Any, far: bool, args: Any, kwargs: Any) -> int:
    """How often the host waits in an operation on tensors of the device, or that makes some."""
    if operation in READS:
        return 1
    if operation in (aten._to_copy, aten.copy_):
        moves = far and operation is aten._to_copy and _is_cpu(kwargs.get("device"))
        comes = not isinstance(args[operation is aten.copy_], Far)
        if operation is aten.copy_ and not isinstance(args[0], Far):
            moves, comes = True, False
        patient = kwargs.get("non_blocking") or (operation is aten.copy_ and args[2:] == (True,))
        return int(bool(args[0].numel()) and (moves or (comes and not patient)))
    if operation is aten.repeat_interleave:
        return int(kwargs.get("output_size") is None and len(args) < 2)
    if operation in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return sum(_waits_of_part(part, alone=False) for part in args[1] if part is not None)
    if operation is aten.isin:  # few are compared one by one, many are sorted
        few = isinstance(args[0], Tensor) and isinstance(args[1], Tensor)
        return int(few and args[1].numel() >= 10 * args[0].numel() ** 0.145)
    return 0


def _waits_of_index(index: Any, values: tuple[Any, ...]) -> int:
    """How often the host waits for `x[index]`, or for `x[index] = value`."""
    parts = index if isinstance(index, tuple) else (index,)
    masks = sum(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)
    number = bool(values) and not isinstance(values[0], Far)
    if number and masks == 1 and all(isinstance(p, Tensor) for p in parts if not _is_slice(p)):
        return int(not all(isinstance(p, Far) for p in parts if not _is_slice(p)))
    placed = any(isinstance(part, Tensor | list) and _dims(part) for part in parts)
    return sum(_waits_of_part(part, alone=True) for part in parts) + int(number and placed)


def _waits_of_part(part: Any, *, alone: bool) -> int:
    """How often the host waits for one part of an index."""
    if isinstance(part, slice):
        return sum(isinstance(x, Far) for x in (part.start, part.stop, part.step))
    if isinstance(part, list):
        return 1
    if not isinstance(part, Tensor):
        return 0
    if alone and not part.dim() and part.dtype != torch.bool:
        return int(isinstance(part, Far))
    return int(part.dtype in (torch.bool, torch.uint8)) + int(not isinstance(part, Far))


def _is_slice(part: Any) -> bool:
    return part is None or part is Ellipsis or (isinstance(part, slice) and part == slice(None))


def _dims(part: Any) -> int:
    return part.dim() if isinstance(part, Tensor) else 1


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


# -- the stand-in's tensors


def _near(x: Any) -> Any:
    return x.near if isinstance(x, Far) else x


def _near_index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_near_index, index))
    if isinstance(index, slice):
        return slice(*(_number(x) for x in (index.start, index.stop, index.step)))
    return index


def _number(x: Any) -> Any:
    return int(x.near) if isinstance(x, Far) else x


def _far(x: Any, known: dict[int, Far] | None = None) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, Far):
        return x
    found = (known or {}).get(id(x))
    return Far(x) if found is None else found


def _placed(value: Tensor) -> Tensor:
    if isinstance(value, Far):
        return value
    far = Far(value.detach())
    return nn.Parameter(far, requires_grad=False) if isinstance(value, nn.Parameter) else far


MIXING = {
    aten._to_copy, aten.copy_, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_
}  # fmt: skip


def _check_together(func: Any, tensors: list[Tensor]) -> None:
    """Refuse what a GPU refuses: tensors of both devices, save single numbers of the host."""
    wide = [x for x in tensors if isinstance(x, Far) or x.dim()]
    if func.overloadpacket not in MIXING and len({isinstance(x, Far) for x in wide}) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


# -- places

TRANSFERS = "foveate/core/transfer.py"


def _caller() -> str:
    """Where in foveate, or else in transformers, the running call comes from."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        found = _place(frame.f_code.co_filename, frame.f_lineno)
        if found is not None and not found.startswith(TRANSFERS):  # but who asks for them
            return found
        frame = frame.f_back
    return "elsewhere"


def _place(file: str, line: int | None) -> str | None:
    """A file of the package or of transformers, with its line; `None` for others."""
    for package in ("foveate", "transformers"):
        head, slash, rest = file.rpartition(f"/{package}/")
        if slash and head:
            return f"{package}/{rest}:{line}"
    return None
