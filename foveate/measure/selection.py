"""What the signals cost that methods ask for.

Only matrix products count, as everywhere: norms, softmaxes, sums and sorting do not, and neither
does a method's own arithmetic on its signals. A signal that several steps share is taken once.

Symbols: `T` tokens of a row, `Q` text tokens behind the image, `V` visual tokens; `N` rows of a
picture in the encoder, and its width `D`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from foveate.measure.flops import TextShape
from foveate.measure.trace import Traced
from foveate.method import Method, Step
from foveate.record import Record
from foveate.signals import SIGNALS

_KEYS = {"text_attention", "content_attention", "question_attention", "llm_keys", "question_keys"}
_VALUES = {"llm_values", "value_attention"}


def decoder_flops(
    record: Record, shapes: Sequence[TextShape], steps: Iterable[tuple[Method, Step]]
) -> int:
    """Signals of decoder layers: the keys of all tokens once for each layer, and rows of scores.

    Args:
        record: the forward.
        shapes: sizes of the decoder layers.
        steps: what methods wanted to do, of each its method too.
    """
    taken: dict[int, set[str]] = {}
    for method, step in steps:
        for need in step.needs:
            if SIGNALS[need.name].source == "decoder":
                for layer in need.layers if SIGNALS[need.name].layered else (0,):
                    if _taken(record, method, step, layer):
                        taken.setdefault(layer, set()).add(need.name)
    total = 0
    for layer, names in taken.items():
        for row, tokens in enumerate(_tokens_before(record, layer)):
            if any(image.row == row for image in record.images):
                total += _look_flops(shapes[layer], names, tokens, record.question_tokens)
    if "question_relevance" in taken.get(0, ()):
        visual = sum(image.alive(-1) for image in record.images)
        total += 2 * visual * shapes[0].hidden * record.question_tokens
    return total


def _taken(record: Record, method: Method, step: Step, layer: int) -> bool:
    """Whether a step removes tokens of any image, so that it was told about a layer; one that finds
    out from its signals how many stay is always told.
    """
    images = [
        (i.alive(layer - 1), i.kept[step.place]) for i in record.images if step.place in i.kept
    ]
    if method.adaptive:
        return any(before for before, _ in images)
    return any(0 < len(kept) < before for before, kept in images)


def _tokens_before(record: Record, layer: int) -> list[int]:
    """Tokens of each row when a layer's signals are taken, which is before its steps act."""
    if layer > 0:
        return record.layer_tokens[layer - 1]
    tokens = list(record.prompt_tokens)
    for image in record.images:
        tokens[image.row] -= image.total - image.alive(-1)
    return tokens


def _look_flops(shape: TextShape, names: set[str], tokens: int, asked: int) -> int:
    """2 T D g d for the keys, and for the values; for each query row 2 D h d, and 2 h d T for its
    scores; 2 g d T for a row of products of values.
    """
    queries, held = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    row = 2 * shape.hidden * queries + 2 * queries * tokens
    total = 2 * tokens * shape.hidden * held * (bool(names & _KEYS) + bool(names & _VALUES))
    if "value_attention" in names:
        total += 2 * tokens * held
    total += row * len(names & {"text_attention", "content_attention"})
    if "question_attention" in names:
        total += row * asked
    if "question_closeness" in names:
        total += 2 * asked * tokens * shape.head_dim
    return total


def encoder_flops(record: Record, traced: Traced, steps: Iterable[tuple[Method, Step]]) -> int:
    """Signals of encoder layers, from the projections that the encoder computes anyway.

    Args:
        record: the forward.
        traced: what the encoder did with all tokens.
        steps: what methods wanted to do, of each its method too.
    """
    taken: dict[int, set[str]] = {}
    total = 0
    for _, step in steps:
        for need in step.needs:
            if SIGNALS[need.name].source != "encoder":
                continue
            if step.stage == "vision" and need.layers == (step.layer,):  # of its own layer
                if not _shortens(record, step):
                    continue
                if not step.inside:
                    total += traced.rows[0] * _ahead_flops(record, traced, step.layer)
            for layer in need.layers:
                taken.setdefault(layer, set()).add(need.name)
    for layer, names in taken.items():
        pictures, rows = traced.rows[0], _rows(record, traced, layer)
        pairs = _pairs(record, traced, layer)
        if {"received_attention", "given_attention"} <= names:  # the same map
            names = names - {"given_attention"}
        total += pictures * sum(_signal_flops(n, rows, pairs, traced.width) for n in names)
    return total


def _shortens(record: Record, step: Step) -> bool:
    """Whether a step inside the encoder removes tokens of any image."""
    for image in record.images:
        places = list(image.kept)
        if step.place in places:
            number = places.index(step.place)
            before = len(image.kept[places[number - 1]]) if number else image.total
            if len(image.kept[step.place]) < before:
                return True
    return False


def _rows(record: Record, traced: Traced, layer: int) -> int:
    """Rows of a picture that a layer's attention sees."""
    return record.encoder_tokens[layer][0] if record.encoder_tokens else traced.rows[1]


def _pairs(record: Record, traced: Traced, layer: int) -> int:
    """Pairs of rows of a picture, or of all that lie in one sequence, that may see each other."""
    bounds = record.encoder_bounds[layer] if record.encoder_bounds else None
    if bounds is not None:
        return int((bounds.diff().long() ** 2).sum())
    rows = _rows(record, traced, layer)
    return traced.pairs[layer] if rows == traced.rows[1] else rows**2


def _ahead_flops(record: Record, traced: Traced, layer: int) -> int:
    """One query and all keys of a layer that is about to run: 2 D^2 (N + 1)."""
    rows = _rows(record, traced, layer - 1) if layer else traced.rows[1]
    return 2 * traced.width**2 * (rows + 1)


def _signal_flops(name: str, rows: int, pairs: int, width: int) -> int:
    match name:
        case "cls_attention" | "joint_cls_attention":
            return 2 * width * rows
        case "information_flow":
            return 4 * width * rows
        case "received_attention" | "given_attention":
            return 2 * width * pairs
        case "global_attention":
            return 4 * width * pairs + 2 * pairs
    return 0
