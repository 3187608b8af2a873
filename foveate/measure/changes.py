"""How a model differs from what its config makes: widths, heads and layers that were pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from foveate.errors import UnsupportedModelError
from foveate.families import Family
from foveate.measure.mixers import Attention
from foveate.measure.shapes import TextShape
from foveate.measure.widths import size_of

Change: TypeAlias = tuple[str, str, Any]
"""Name of a module, of a parameter or an attribute, and its shape or value; without a second name,
layers that a list has.
"""


def changes(plain: Family, family: Family) -> tuple[Change, ...]:
    """All that is not as the config says, but for decoder layers, whose `widths` are read.

    Args:
        plain: made from the config.
        family: the model. What has other modules there, as if sharded, counts as unchanged.
    """
    others = dict(family.model.named_modules())
    text = {module for layer in plain.layers for module in layer.modules()}
    pairs = [
        (name, module, others[name])
        for name, module in plain.model.named_modules()
        if module not in text and name in others
    ]
    found = [change for pair in pairs for change in _shapes(*pair)]
    found += [
        (name, "", len(other))
        for name, module, other in pairs
        if isinstance(module, nn.ModuleList) and module is not plain.layers
        if isinstance(other, nn.ModuleList) and len(other) < len(module)
    ]
    if found:  # heads are not seen in shapes
        found += [change for pair in pairs for change in _numbers(*pair)]
    return tuple(found)


def change(model: nn.Module, changed: Sequence[Change]) -> None:
    """Make a model differ from its config.

    Args:
        model: without weights, on the meta device.
        changed: how, see `changes`.
    """
    for name, part, value in changed:
        module: Any = model.get_submodule(name)
        if not part:
            del module[value:]
        elif part in module._parameters:
            like = module._parameters[part]
            module._parameters[part] = nn.Parameter(like.new_empty(value), like.requires_grad)
        else:
            setattr(module, part, value)


def check_counted(family: Family, plain: Callable[[], Family], shapes: Sequence[TextShape]) -> None:
    """Refuse to count decoder layers that were changed where `widths` cannot read them.

    Args:
        family: the model.
        plain: makes it from the config.
        shapes: what is known of each layer.

    Raises:
        UnsupportedModelError: experts, latent attention or recurrent layers have other sizes than
            the config says.
    """
    for number, shape in enumerate(shapes):
        if isinstance(shape.mixer, Attention) and not shape.mlp.router:
            continue
        others = dict(family.layers[number].named_modules())
        for name, module in plain().layers[number].named_modules():
            for _, part, found in _shapes(name, module, others.get(name)):
                raise UnsupportedModelError(
                    f"{name}.{part} of decoder layer {number} has the shape {tuple(found)}, which "
                    "its config does not say; pruned attention and MLPs can be counted, but not "
                    "layers with pruned experts, latent attention or running states"
                )


def _shapes(name: str, plain: nn.Module, other: Any) -> list[Change]:
    """Parameters with other shapes."""
    found = []
    for part, parameter in plain._parameters.items():
        if parameter is None or other is None:
            continue
        shape = _shape(plain, other, part, parameter.dim())
        if shape is not None and shape != parameter.shape:
            found.append((name, part, shape))
    return found


def _shape(plain: nn.Module, other: Any, part: str, dims: int) -> tuple[int, ...] | None:
    """A parameter's shape; `None` where it is not known, as of packed or sharded ones."""
    if part == "weight" and isinstance(plain, nn.Linear):
        return size_of(other)
    own: Tensor | None = other._parameters.get(part)
    known = own is not None and own.dim() == dims and own.is_floating_point() and own.numel()
    return tuple(own.shape) if own is not None and known else None


def _numbers(name: str, plain: nn.Module, other: nn.Module) -> list[Change]:
    """Whole numbers, and tuples of them, that a module holds beside its parameters."""
    theirs = vars(other)
    return [
        (name, key, theirs[key])
        for key, value in vars(plain).items()
        if _counts(value) and _counts(theirs.get(key)) and theirs[key] != value
    ]


def _counts(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(type(n) is int for n in value)
    return type(value) is int
