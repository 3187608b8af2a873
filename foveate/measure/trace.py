"""Tower and projector, counted by running them on shapes alone.

The model's own code runs once on the meta device: floating-point tensors have shapes and no data,
integers (grids, sizes, boundaries of windows) are real, and torch's counter sees every matrix
product. So no family needs a formula, and windows, mergers, packing and tiles are exact. Layers
that get the same shapes are run once. Modules are made from the config, and then get the shapes
that the model's have, which may have been pruned.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.tokens import Shape
from foveate.engine.features import pooled
from foveate.engine.inputs import bound
from foveate.engine.vision.encoder_group import patches_of
from foveate.engine.vision.segments import boundaries
from foveate.families import Encoder, Family, find_family
from foveate.families.family import AUDIO
from foveate.families.projection import project
from foveate.measure.changes import Change, change, changes
from foveate.measure.frozen import Frozen, freeze, frozen, thaw

_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
_TOWERS = ("vision_tower", "vision_model", "visual")


@dataclass(frozen=True)
class Traced:
    """FLOPs of one call of an encoder, a multiply-add counted as 2, attention without a mask.

    Args:
        embedding: what comes before the encoder's first layer.
        layers: each of the encoder's layers; empty for towers that methods cannot look into.
        projector: all after the last layer, and what reads layers: mergers, projector, heads. Of
            a tower that methods cannot look into, what is after the tower.
        shapes: visual tokens of each image; empty for an encoder alone.
        rows: images, and rows of each, that the first layer is given; one image where all lie
            in one sequence.
        pairs: of each layer, pairs of rows of an image that may see each other: all of it, or of
            its segments.
        weights: of each layer's matrices, those of the attention, and those others that a row
            passes: of experts, the ones that are chosen for it.
        width: of the encoder's rows.
        patches: (frames, height, width) of each image where images are rows of a batch.
        mixed: of each layer, width of all its heads.
    """

    embedding: int
    layers: tuple[int, ...]
    projector: int
    shapes: tuple[Shape, ...] = ()
    rows: tuple[int, int] = (0, 0)
    pairs: tuple[int, ...] = ()
    weights: tuple[tuple[int, int], ...] = ()
    width: int = 0
    patches: tuple[int, int, int] = (0, 0, 0)
    mixed: tuple[int, ...] = ()

    @property
    def tower(self) -> int:
        """Embedding and layers."""
        return self.embedding + sum(self.layers)

    def shortened(self, number: int, rows: tuple[int, int], bounds: Tensor | None) -> int:
        """FLOPs of a layer within which tokens were removed, or before.

        Args:
            number: the layer.
            rows: rows that its attention and its MLP see, of each image.
            bounds: boundaries of the segments within which rows attend; `None` for all in all.
        """
        images, full = self.rows
        if rows == (full, full):
            return self.layers[number]
        attention, mlp = rows
        pairs = attention**2 if bounds is None else int((bounds.diff().long() ** 2).sum())
        mixing, others = self.weights[number]
        linear = 2 * (mixing * attention + others * mlp)
        return images * (linear + 4 * self.mixed[number] * pairs)


def trace(family: Family, modality: str, arguments: Mapping[str, Any]) -> Traced:
    """Count what a model's encoder does with some input; equal input is counted once.

    Args:
        family: the model, of whose weights the shapes are looked at.
        modality: `image` or `video`; anything for an encoder alone.
        arguments: what `get_image_features` or the encoder is called with. Of floating-point
            tensors only the shape matters.
    """
    return _trace(_Recipe.of(family), modality, freeze(arguments))


def skeleton(family: Family) -> Family:
    """The same model without weights, on the meta device; decoder layers as the config says."""
    return _build(_Recipe.of(family)).family


@dataclass(frozen=True)
class _Recipe:
    """What a model is made from, compared by the config's text, and by how it differs from that."""

    kind: type
    text: str
    config: Any = field(compare=False, repr=False)
    changes: tuple[Change, ...] = ()

    @classmethod
    def of(cls, family: Family) -> _Recipe:
        config = family.model.config  # of a whole model, where the family is of one within
        recipe = cls(type(family.model), config.to_json_string(), config)
        return replace(recipe, changes=changes(_build(recipe).family, family))


@dataclass(frozen=True)
class _Skeleton:
    family: Family
    lock: threading.Lock = field(default_factory=threading.Lock)


@functools.lru_cache(maxsize=8)
def _build(recipe: _Recipe) -> _Skeleton:
    kind: Any = recipe.kind
    config = copy.deepcopy(recipe.config)
    with Shapes(), torch.device("meta"):
        model = kind._from_config(config, attn_implementation="eager")
    for module in model.modules():  # experts may have configs of their own
        experts: Any = getattr(module, "config", None)
        if hasattr(experts, "_experts_implementation"):
            experts._experts_implementation = "batched_mm"  # products that are counted
    change(model, recipe.changes)
    # The counter wants to know what made an input that needs a gradient; here nothing needs one.
    return _Skeleton(find_family(model.eval().requires_grad_(False)))


@functools.lru_cache(maxsize=256)
def _trace(recipe: _Recipe, modality: str, given: Frozen) -> Traced:
    built = _build(recipe)
    arguments = {name: thaw(value) for name, value in given}
    with built.lock:
        return _Run(built.family).trace(modality, arguments)


class _Run:
    """One call of an encoder, counted."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.counter = FlopCounterMode(display=False)
        self.again = 0  # FLOPs of layers that were not run anew
        self.layers: dict[int, int] = {}
        self.embedding = 0
        self._entered: int | None = None  # what was counted when the tower was entered
        self.rows = 0, 0
        self.pairs: dict[int, int] = {}
        self.others: dict[int, int] = {}  # weights outside the attention that a row passes
        self._attention = 0  # FLOPs of attention modules that were run
        self._told: Mapping[str, Any] = {}  # what the encoder was called with
        self._image_rows: list[int] = []  # rows of each image, where all lie in one sequence
        self._seen: dict[Any, tuple[Any, int, int]] = {}

    @property
    def total(self) -> int:
        """Counted so far."""
        return self.counter.get_total_flops() + self.again

    def trace(self, modality: str, arguments: Mapping[str, Any]) -> Traced:
        """Run the encoder; the model is as it was afterwards."""
        family, encoder = self.family, self.family.encoder
        layers = [] if encoder is None else list(encoder.layers)
        handles = []
        for tower in {*_towers(family, modality), *([] if encoder is None else [encoder.entry])}:
            handles.append(tower.register_forward_pre_hook(self._enter))
            handles.append(tower.register_forward_hook(self._leave))
        if encoder is not None and encoder.packed is not None and not encoder.padded:
            look = functools.partial(self._look, encoder.packed, family.side(modality))
            handles.append(encoder.tower.register_forward_pre_hook(look, with_kwargs=True))
        if encoder is not None and encoder.packed is None and encoder.block is not None:
            handles.append(encoder.entry.register_forward_pre_hook(self._note, with_kwargs=True))
        for number, layer in enumerate(layers):
            layer.forward = functools.partial(self._layer, number, layer, layer.forward)
            if encoder is not None and encoder.block is not None:
                handles += self._attending(getattr(layer, encoder.block.attention))
        try:
            with torch.no_grad(), self.counter, Shapes(), _Made():
                shapes = self._encode(modality, arguments)
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers:
                del layer.forward
        of_layers, pairs, others = (
            tuple(noted.get(number, 0) for number in range(len(layers)))
            for noted in (self.layers, self.pairs, self.others)
        )
        projector = self.total - self.embedding - sum(of_layers)
        of_attention, width, mixed = _matrices(encoder)
        weights = tuple(zip(of_attention, others, strict=True))
        return Traced(
            self.embedding, of_layers, projector, shapes, self.rows, pairs, weights, width,
            self._patches(encoder), mixed,
        )  # fmt: skip

    def _patches(self, encoder: Encoder | None) -> tuple[int, int, int]:
        if encoder is None or not self._told:
            return 0, 0, 0
        return patches_of(self.family, encoder, self._told, self.rows[1] - encoder.special)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._told = bound(type(module).forward.__get__(module), args, kwargs)

    def _encode(self, modality: str, arguments: Mapping[str, Any]) -> tuple[Shape, ...]:
        if not self.family.text_layers:
            self.family.base(**arguments)
            return ()
        output = self.family.encode(modality, arguments)
        if modality == AUDIO:
            return ()
        project(self.family, modality, output)
        return tuple(self.family.shapes(modality, pooled(output), arguments))

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._entered is None:
            self._entered = self.total

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered is not None:  # no layer has run that is known
            self.embedding += self.total - self._entered
            self._entered = None

    def _look(self, packed: Any, side: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        images = packed(bound(module.forward, args, kwargs), side)
        self._image_rows = [image.rows.numel() for image in images]

    def _layer(
        self, number: int, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._entered is not None:
            self.embedding += self.total - self._entered
            self._entered = None
        if number == 0:
            self.rows = args[0].shape[:-1].numel() // args[0].shape[-2], args[0].shape[-2]
        bounds = boundaries(kwargs)
        lengths = self._image_rows or [args[0].shape[-2]]
        if bounds is not None:
            lengths = bounds.diff().tolist()
        self.pairs[number] = sum(length**2 for length in lengths)
        weights = tuple(p.shape for p in layer.parameters())
        leaves, spec = tree_flatten((args, kwargs))
        key = weights, str(spec), tuple(frozen(leaf) for leaf in leaves)
        if key in self._seen:
            output, flops, outside = self._seen[key]
            self.again += flops
        else:
            before, self._attention = self.total, 0
            output = forward(*args, **kwargs)
            flops = self.total - before
            outside = flops - self._attention
            self._seen[key] = output, flops, outside
        self.layers[number] = self.layers.get(number, 0) + flops
        self.others[number] = outside // (2 * args[0].shape[:-1].numel())
        return output

    def _attending(self, attention: nn.Module) -> list[Any]:
        """Note what a layer's attention takes, matrices included."""

        def enter(module: nn.Module, args: Any) -> None:
            self._attention -= self.total

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._attention += self.total

        return [
            attention.register_forward_pre_hook(enter),
            attention.register_forward_hook(leave),
        ]


def _matrices(encoder: Any) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Weights in the matrices of each layer's attention, the width of rows, and that of all heads
    of each layer.
    """
    if encoder is None or encoder.block is None:
        return (0,) * (0 if encoder is None else len(encoder.layers)), 0, ()
    block = encoder.block
    of_attention = tuple(
        sum(p.numel() for p in getattr(layer, block.attention).parameters() if p.dim() == 2)
        for layer in encoder.layers
    )
    attentions = [encoder.attention(layer) for layer in encoder.layers]
    made = [len(next(getattr(of, block.matrices[0]).parameters())) for of in attentions]
    if len(block.matrices) == 1:  # queries, keys and values
        made = [n * encoder.groups // (encoder.groups + 2) for n in made]
    return of_attention, getattr(encoder.layers[0], block.norm1).weight.shape[0], tuple(made)


def _towers(family: Family, modality: str) -> list[Any]:
    """Towers of a model, as it names them."""
    names = (*_TOWERS, f"{modality}_tower") if family.text_layers else ()
    return [tower for name in names if (tower := getattr(family.base, name, None)) is not None]


class Shapes(TorchDispatchMode):
    """Run code on shapes: floating-point tensors stay on the meta device, integers are real.

    What is compared with floats that have no data is taken to be different, so that no image
    counts as padding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Dispatch an operator: all to the meta device, or, of integers only, none."""
        kwargs = dict(kwargs or {})
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_flatten(args)[0]):
            if func._schema.name in _INDEXING:
                args = (args[0], _by_number(args[1]), *args[2:])
            leaves, spec = tree_flatten((args, kwargs))
            args, kwargs = tree_unflatten([_meta(leaf) for leaf in leaves], spec)
            if kwargs.get("device") is not None:  # codes that an encoder looks up on the CPU
                kwargs["device"] = torch.device("meta")
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.dtype == torch.bool:
                made = torch.zeros if func._schema.name == "aten::eq" else torch.ones
                return made(result.shape, dtype=torch.bool, device="cpu")
            return result
        if kwargs.get("device") is not None and _whole(func, args, kwargs.get("dtype")):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    """Make tensors of integers from Python's real, which no operator does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor or "device" not in kwargs:
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"})
        return made.to(kwargs["device"]) if made.is_floating_point() else made


def _meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf


def _by_number(index: Any) -> list[Any]:
    """Indices in which masks have become numbers, since shapes depend on them."""
    found: list[Any] = []
    for part in index:
        real = part is not None and part.dtype == torch.bool and not part.is_meta
        found += part.nonzero(as_tuple=True) if real else [part]
    return found


def _whole(func: Any, args: Any, dtype: torch.dtype | None) -> bool:
    """Whether what an operator makes has integers or booleans."""
    if dtype is not None:
        return not dtype.is_floating_point
    if func._schema.name == "aten::_to_copy":
        return not args[0].is_floating_point()
    numbers = [arg for arg in args if not isinstance(arg, list | tuple)]
    return func._schema.name == "aten::arange" and all(isinstance(n, int) for n in numbers)
