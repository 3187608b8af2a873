"""Replay: what must come out when tokens are removed, worked out at full length.

The reductions that methods made are written down while a session runs; the model is then run
without a session, its layers one by one, nothing compacted and nothing cached: a removed token
stays in its row, but nobody attends to it. One row with one image. Only layers of Llama and Qwen2
kinds, and of CLIP for what happens inside the encoder.

Shapes: `T` tokens of the row, `N` rows of the encoder, `V` visual tokens, `D` hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.core import Adaptive, Method, Reduction, VisualTokens
from foveate.families import Family, find_family
from foveate.families.decoder_layer import last_norm_of
from foveate.families.encoder import Encoder

Log = list[tuple[Method, str, Reduction]]


def logged(method: Method, log: Log) -> Method:
    """The same method, which writes down what it does."""
    kind: Any = type(method)

    def note(tokens: VisualTokens, reduction: Reduction) -> Reduction:
        log.append((method, tokens.site, reduction))
        return reduction

    def reduce(self: Any, tokens: VisualTokens, count: int) -> Reduction:
        return note(tokens, kind.reduce(self, tokens, count))

    def reduce_each(self: Any, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        return [(members, note(tokens, made)) for members, made in kind.reduce_each(self, tokens)]

    changed = {"reduce_each": reduce_each} if isinstance(method, Adaptive) else {"reduce": reduce}
    twin = copy.copy(method)
    object.__setattr__(twin, "__class__", type(kind.__name__, (kind,), changed))
    return twin


class Row:
    """One row at full length.

    Args:
        model: without a session.
        inputs: a prompt with one image, and what follows it.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        self.model, self.family = model, find_family(model)
        self.ids = inputs["input_ids"][0]
        self.columns = (self.ids == self.family.placeholder_ids["image"]).nonzero()[:, 0]
        self.surviving = torch.ones(len(self.ids), dtype=torch.bool)
        self.shift = torch.zeros(len(self.ids), dtype=torch.long)
        self.states: Tensor = torch.empty(0)
        self.given: list[dict[str, Any]] = []
        self.unprojected: list[Tensor] = []
        projector = self.family.projector("image")
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(_watched(self.family.layers, self))
            if projector is not None:
                keep = lambda module, args: self.unprojected.append(args[0])  # noqa: E731
                stack.callback(projector.register_forward_pre_hook(keep).remove)
            self.family.base(**inputs, use_cache=False)

    @torch.no_grad()
    def run(self, log: Log, pixels: Tensor | None = None) -> Tensor:
        """(T, D) what the text model returns, under the reductions of a log.

        Args:
            log: what the methods did to the prompt.
            pixels: (1, 3, height, width) the image, where something happened in the encoder.
        """
        if inside := [entry for entry in log if entry[1].startswith("vision")]:
            self._enter(*encode(self.model, pixels, inside), inside[0][0])
        for entry in log:
            if entry[1] == "pre_llm":
                self._reduce(*entry)
        for number, layer in enumerate(self.family.layers):
            for entry in log:
                if entry[1] == f"llm:{number}":
                    self._reduce(*entry)
            given = dict(self.given[number])
            if self.shift.any():
                positions = given["position_ids"] - self.shift
                given["position_embeddings"] = self.family.rotary(self.states, positions, number)
            order = torch.arange(len(self.ids))
            seen = (order <= order[:, None]) & self.surviving
            lost = torch.finfo(self.states.dtype).min
            given["attention_mask"] = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, lost)
            self.states = layer(self.states, **given)
        return last_norm_of(self.family.text)(self.states)[0]

    def _enter(self, index: Tensor, rows: Tensor, method: Method) -> None:
        """Begin with the survivors of the encoder: (K) positions and their (1, K, C) rows."""
        self._keep(self.columns[index], method)
        self.unprojected = [rows]
        self.states[0, self.columns] = self.family.base.multi_modal_projector(rows)[0]

    def _reduce(self, method: Method, site: str, reduction: Reduction) -> None:
        made = reduction.apply(self.states[:, self.columns])[0]
        if self.unprojected:
            rows = self.unprojected[0]
            self.unprojected = [reduction.apply(rows.reshape(1, -1, rows.shape[-1]))]
            if any(s.site == site and s.before_projector for s in method.steps(self.family)):
                altered = reduction.altered(len(self.columns))[0]
                made[altered] = self.family.projector("image")(self.unprojected[0])[0][altered]
        kept = self.columns[reduction.index[0]]
        slots, order = kept.sort()
        if not reduction.ordered or method.positions_on(self.family) == "original":
            made = made[order]
        self._keep(slots, method)
        self.states[0, self.columns] = made

    def _keep(self, kept: Tensor, method: Method) -> None:
        dropped = torch.zeros_like(self.shift)
        dropped[self.columns] = 1
        dropped[kept] = 0
        self.surviving &= dropped == 0
        self.columns = kept
        if method.positions_on(self.family) == "renumbered":
            self.shift = self.shift + dropped.cumsum(0) - dropped


@contextmanager
def _watched(layers: Sequence[Any], row: Row) -> Iterator[None]:
    """While open, keep what enters the layers."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not row.given:
            row.states = args[0].clone()
        row.given.append(dict(kwargs))

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def encode(model: Any, pixels: Tensor | None, log: Log) -> tuple[Tensor, Tensor]:
    """(K) surviving patches of an image, ascending, and (1, K, C) what the projector is given.

    The CLIP encoder at full length: survivors stand at the rows of a source, dropped rows are
    hidden, and where a method wants it merged rows count as often as they have sources.
    """
    assert pixels is not None  # there is no encoding without
    family = find_family(model)
    encoder = family.encoder
    assert encoder is not None
    assert encoder.block is not None
    stream = _Patches(family, _entering(family, encoder, pixels), encoder.special, log)
    for number, layer in enumerate(encoder.layers[: family.feature_layer + 1]):
        stream.reduce(number, inside=False)
        mask = stream.mask(number)
        stream.states = encoder.block.attend(layer, stream.states, attention_mask=mask)
        stream.reduce(number, inside=True)
        stream.states = encoder.block.feed(layer, stream.states)
    order = stream.rows.argsort()
    rows = stream.rows[order]
    return rows - encoder.special, stream.states[:, rows]


def _entering(family: Family, encoder: Encoder, pixels: Tensor) -> Tensor:
    """(1, N, C) what enters the first layer of the encoder."""
    caught: list[Tensor] = []
    hook = encoder.layers[0].register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    family.base.get_image_features(pixels)
    hook.remove()
    return caught[0].clone()


class _Patches:
    """States of the encoder at full length, and which of its rows survive.

    Args:
        family: the model.
        states: (1, N, C) what enters the first layer.
        special: rows before the first patch.
        log: what methods did inside the encoder.
    """

    def __init__(self, family: Family, states: Tensor, special: int, log: Log) -> None:
        self.states, self.special, self.log = states, special, log
        self.rows = torch.arange(self.special, states.shape[1])  # where the survivors stand
        self.sizes = torch.ones(len(self.rows))
        self.steps = {s.site: s for method, _, _ in log for s in method.steps(family)}

    def reduce(self, number: int, *, inside: bool) -> None:
        """Apply what was done before a layer, or inside it."""
        for _, site, made in self.log:
            if site == f"vision:{number}" and self.steps[site].inside == inside:
                values = made.apply(self.states[:, self.rows])
                if made.merges:
                    sources = (made.matrix(len(self.rows))[0] > 0).float()
                    self.sizes = sources @ self.sizes
                else:
                    self.sizes = self.sizes[made.index[0]]
                self.rows = self.rows[made.index[0]]
                self.states[:, self.rows] = values

    def mask(self, number: int) -> Tensor:
        """(1, 1, 1, N) additive attention mask of a layer."""
        bias = torch.full((self.states.shape[1],), torch.finfo(self.states.dtype).min)
        bias[: self.special] = 0
        steps = self.steps.values()
        weigh = any("proportional" in s.effects and s.layer <= number for s in steps)
        bias[self.rows] = self.sizes.log() if weigh else 0.0
        return bias[None, None, None]
