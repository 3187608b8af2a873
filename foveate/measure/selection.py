"""What the signals cost that methods ask for.

Only matrix products count, as everywhere: norms, softmaxes, sums and sorting do not, and neither
does a method's own arithmetic on its signals, except for modules that it has learned. A signal that
several steps share is taken once.

Symbols: `T` tokens of a row, `Q` text tokens after the image, `V` visual tokens; `N` rows of a
image in the encoder, its width `D`, and the width `C` of all heads of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.core import LayerShape, Method, ModelFacts, PerRequest, Step
from foveate.core.step import entries, site_of
from foveate.errors import UnsupportedModelError
from foveate.measure.latents import LatentAttention
from foveate.measure.mixers import Attention
from foveate.measure.shapes import TextShape
from foveate.measure.trace import Traced
from foveate.record.record import ImageRecord, Record
from foveate.signals import SIGNALS, DecoderSignal, EncoderSignal
from foveate.signals.signal import DecoderSizes, EncoderSizes, flops_of


@dataclass(frozen=True)
class Acted:
    """A step of a method that ran.

    Args:
        method: the method.
        number: which of its steps it is.
        step: the step.
        entry: its name in records.
        begun: entry of the method's first step.
    """

    method: Method
    number: int
    step: Step
    entry: str
    begun: str


def acted(methods: Sequence[Method], family: ModelFacts) -> list[Acted]:
    """All steps of some methods, in stream order."""
    steps = [(n, i, s) for n, m in enumerate(methods) for i, s in enumerate(m.steps(family))]
    steps.sort(key=lambda item: item[2].in_stream)
    names = entries([step for _, _, step in steps])
    begun: dict[int, str] = {}
    for (of, _, _), name in zip(steps, names, strict=True):
        if name:
            begun.setdefault(of, name)
    return [
        Acted(methods[of], number, step, name, begun[of])
        for (of, number, step), name in zip(steps, names, strict=True)
    ]


def decoder_flops(record: Record, shapes: Sequence[TextShape], steps: Sequence[Acted]) -> int:
    """Signals of decoder layers: the keys of all tokens once for each layer, and rows of scores.

    Args:
        record: the forward.
        shapes: sizes of the decoder layers.
        steps: what methods wanted to do.
    """
    # layer, whether of what it saw itself
    collected: dict[tuple[int, bool], set[DecoderSignal]] = {}
    of_input: set[DecoderSignal] = set()
    for acted in steps:
        for need in acted.step.needs:
            signal = SIGNALS[need.name]
            if not isinstance(signal, DecoderSignal):
                continue
            if signal.of_input is not None and _collected(record, acted, 0, -1):
                of_input.add(signal)
            for layer in need.layers if signal.layered else ():
                later = acted.step.layer > layer
                if _collected(record, acted, layer, layer if later else layer - 1):
                    cut = record.layer_tokens[layer] != _tokens_before(record, layer)
                    collected.setdefault((layer, later and cut), set()).add(signal)
    visual = sum(image.surviving(-1) for image in record.images)
    total = flops_of(of_input, _sizes(shapes[0], visual, record.question_tokens))
    for (layer, later), signals in collected.items():
        counts = record.layer_tokens[layer] if later else _tokens_before(record, layer)
        _check_counted(shapes[layer], layer, signals)
        for row, tokens in enumerate(counts):
            if any(image.row == row for image in record.images):
                sizes = _sizes(shapes[layer], tokens, record.question_tokens)
                total += flops_of(signals, sizes)
                if any(signal.before_layer for signal in signals):  # they read what is predicted
                    total += shapes[layer].streams.predicted(tokens)
    return total


def _collected(record: Record, acted: Acted, layer: int, seen: int) -> bool:
    """Whether signals of a layer were collected for a step: if it would remove tokens of any image
    as it was there (steps between the layer and its own may remove them first), or finds out from
    its signals how many stay. `seen` is the layer that saw them as they were.
    """
    images = [image for image in record.images if acted.entry in image.kept]
    if acted.method.adaptive:
        return any(image.surviving(seen) for image in images)
    return any(0 < _wanted(record, acted, i, layer, seen) < i.surviving(seen) for i in images)


def _wanted(record: Record, acted: Acted, image: ImageRecord, layer: int, seen: int) -> int:
    """Tokens of an image that a step would leave of those there."""
    remaining, keep = image.surviving(seen), acted.method.keep
    stage, begun, _ = site_of(acted.begun)
    began = stage != "llm" or begun < layer + (seen == layer)
    total = image.before(acted.begun) if began else remaining
    row = image.row * len(keep.values) // record.rows if isinstance(keep, PerRequest) else 0
    return acted.method.count(remaining, total, acted.step, acted.number, row)


def _tokens_before(record: Record, layer: int) -> list[int]:
    """Tokens of each row when a layer's signals are taken, which is before its steps act."""
    if layer > 0:
        return record.layer_tokens[layer - 1]
    tokens = list(record.prompt_tokens)
    for image in record.images:
        tokens[image.row] -= image.total - image.surviving(-1)
    return tokens


def _check_counted(shape: TextShape, layer: int, signals: Collection[DecoderSignal]) -> None:
    """Refuse to call free what costs products that nothing here counts.

    Raises:
        UnsupportedModelError: keys are read of a layer whose keys are made in another way.
    """
    keyed = sorted(signal.name for signal in signals if signal.keyed)
    if keyed and not isinstance(shape.mixer, Attention | LatentAttention):
        raise UnsupportedModelError(
            f"what {', '.join(keyed)} of layer {layer} costs is not known: its "
            f"{type(shape.mixer).__name__} makes keys in another way than grouped attention"
        )


def _sizes(shape: TextShape, tokens: int, text: int) -> DecoderSizes:
    mixer, hidden = shape.mixer, shape.hidden
    if isinstance(mixer, Attention):
        queries, held = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        made = hidden * mixer.query_width, hidden * held, hidden * held, 0
        if mixer.fused:
            whole = hidden * (queries + 2 * held)
            made = whole, 0, 0, whole
        return DecoderSizes(hidden, *made, queries, held, mixer.head_dim, tokens, text)
    if isinstance(mixer, LatentAttention):
        made = mixer.query, 0, 0, mixer.compressed + mixer.expanded
        queries, held = mixer.query_width, mixer.heads * mixer.value
        return DecoderSizes(hidden, *made, queries, held, mixer.rotary, tokens, text)
    # What is read there has no queries, keys or values.
    return DecoderSizes(hidden, 0, 0, 0, 0, 0, 0, 0, tokens, text)


def encoder_flops(record: Record, traced: Traced, steps: Sequence[Acted]) -> int:
    """Signals of encoder layers, from the projections that the encoder computes anyway.

    Args:
        record: the forward.
        traced: what the encoder did with all tokens.
        steps: what methods wanted to do.
    """
    collected: dict[int, set[EncoderSignal]] = {}
    total = 0
    for acted in steps:
        step = acted.step
        for need in step.needs:
            signal = SIGNALS[need.name]
            if not isinstance(signal, EncoderSignal):
                continue
            if step.stage == "vision" and need.layers == (step.layer,):  # of its own layer
                around = "around" in step.effects
                if not (around or _shortens(record, acted.entry)):
                    continue
                if not step.inside:
                    total += traced.rows[0] * _ahead_flops(record, traced, step.layer, around)
                if around:  # of all rows, though not all go through the layer
                    sizes = EncoderSizes(
                        traced.rows[1], traced.rows[1] ** 2, traced.mixed[step.layer]
                    )
                    total += traced.rows[0] * flops_of({signal}, sizes)
                    continue
            for layer in need.layers:
                collected.setdefault(layer, set()).add(signal)
    for layer, signals in collected.items():
        rows, pairs = _rows(record, traced, layer), _pairs(record, traced, layer)
        total += traced.rows[0] * flops_of(signals, EncoderSizes(rows, pairs, traced.mixed[layer]))
    return total


def learned_flops(record: Record, model: ModelFacts, steps: Sequence[Acted]) -> int:
    """What methods have learned, image by image.

    Args:
        record: the forward.
        model: the model.
        steps: what methods wanted to do.
    """
    total = 0
    for acted in steps:
        alike = Counter(
            (image.before(acted.entry), image.grid)
            for image in record.images
            if acted.entry in image.kept
        )
        for (tokens, grid), images in alike.items():
            total += images * acted.method.learned_flops(model, acted.step, tokens, grid)
    return total


def _shortens(record: Record, entry: str) -> bool:
    """Whether a step inside the encoder removes tokens of any image."""
    images = (image for image in record.images if entry in image.kept)
    return any(len(image.kept[entry]) < image.before(entry) for image in images)


def _rows(record: Record, traced: Traced, layer: int) -> int:
    """Rows of an image that a layer's attention sees."""
    return record.encoder_tokens[layer][0] if record.encoder_tokens else traced.rows[1]


def _pairs(record: Record, traced: Traced, layer: int) -> int:
    """Pairs of rows of an image, or of all that lie in one sequence, that may see each other."""
    bounds = record.encoder_bounds[layer] if record.encoder_bounds else None
    if bounds is not None:
        return int((bounds.diff().long() ** 2).sum())
    rows = _rows(record, traced, layer)
    return traced.pairs[layer] if rows == traced.rows[1] else rows**2


def _ahead_flops(record: Record, traced: Traced, layer: int, whole: bool = False) -> int:
    """One query and all keys of a layer that is about to run: 2 D C (N + 1); of all rows if nothing
    has been removed, as where steps act around layers.
    """
    rows = traced.rows[1] if whole or not layer else _rows(record, traced, layer - 1)
    return 2 * traced.width * traced.mixed[layer] * (rows + 1)


def attending_flops(record: Record, family: Any, traced: Traced, steps: Sequence[Acted]) -> int:
    """What encoder layers cost more, or less, whose attention a method computes.

    Args:
        record: the forward, inside whose encoder something was done.
        family: the model.
        traced: what the encoder did with all tokens.
        steps: what methods wanted to do.
    """
    total, special = 0, family.encoder.special if family.encoder is not None else 0
    frames, *grid = traced.patches
    for of in (acted for acted in steps if "attend" in acted.step.effects):
        rows, _ = record.encoder_tokens[of.step.layer]
        mixed = traced.mixed[of.step.layer]
        shape = LayerShape.of(rows, special, (grid[0], grid[1]), frames, traced.width, mixed)
        plain = 4 * mixed * rows**2
        total += traced.rows[0] * (of.method.attend_flops(of.step, shape) - plain)
    return total
