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
from foveate.method import Step
from foveate.record import Record
from foveate.signals import SIGNALS

_KEYS = ("text_attention", "content_attention", "question_attention", "llm_keys", "question_keys")


def decoder_flops(record: Record, shapes: Sequence[TextShape], steps: Iterable[Step]) -> int:
    """Signals of decoder layers: the keys of all tokens once for each layer, and rows of scores.

    Args:
        record: the forward.
        shapes: sizes of the decoder layers.
        steps: those that have acted.
    """
    taken: dict[int, set[str]] = {}
    rated = False
    for step in steps:
        for need in step.needs:
            if SIGNALS[need.name].source == "decoder":
                rated |= need.name == "question_relevance"
                for layer in need.layers:
                    taken.setdefault(layer, set()).add(need.name)
    total = 0
    for layer, names in taken.items():
        for row, tokens in enumerate(_tokens_before(record, layer)):
            if any(image.row == row for image in record.images):
                total += _look_flops(shapes[layer], names, tokens, record.question_tokens)
    if rated:
        visual = sum(image.total for image in record.images)
        total += 2 * visual * shapes[0].hidden * record.question_tokens
    return total


def _tokens_before(record: Record, layer: int) -> list[int]:
    """Tokens of each row when a layer's signals are taken, which is before its steps act."""
    if layer > 0:
        return record.layer_tokens[layer - 1]
    tokens = list(record.prompt_tokens)
    for image in record.images:
        if "pre_llm" in image.kept:
            tokens[image.row] -= image.total - len(image.kept["pre_llm"])
    return tokens


def _look_flops(shape: TextShape, names: set[str], tokens: int, asked: int) -> int:
    """2 T D g d for the keys; for each query row 2 D h d, and 2 h d T for its scores."""
    queries = shape.heads * shape.head_dim
    row = 2 * shape.hidden * queries + 2 * queries * tokens
    total = 0
    if names & set(_KEYS):
        total += 2 * tokens * shape.hidden * shape.kv_heads * shape.head_dim
    total += row * len(names & {"text_attention", "content_attention"})
    if "question_attention" in names:
        total += row * asked
    if "question_closeness" in names:
        total += 2 * asked * tokens * shape.head_dim
    return total


def encoder_flops(record: Record, traced: Traced, steps: Iterable[Step]) -> int:
    """Signals of encoder layers, from the projections that the encoder computes anyway.

    Args:
        record: the forward.
        traced: what the encoder did with all tokens.
        steps: those that have acted.
    """
    taken: dict[int, set[str]] = {}
    ahead = 0
    for step in steps:
        for need in step.needs:
            if SIGNALS[need.name].source != "encoder":
                continue
            before = step.stage == "vision" and not step.inside and need.layers == (step.layer,)
            ahead += traced.rows[0] * _ahead_flops(record, traced, step.layer) * before
            for layer in need.layers:
                taken.setdefault(layer, set()).add(need.name)
    total = ahead
    for layer, names in taken.items():
        pictures, rows = traced.rows[0], _rows(record, traced, layer)
        total += pictures * sum(_signal_flops(name, rows, traced.width) for name in names)
        if {"received_attention", "given_attention"} <= names:  # the same map
            total -= pictures * _signal_flops("given_attention", rows, traced.width)
    return total


def _rows(record: Record, traced: Traced, layer: int) -> int:
    """Rows of a picture that a layer's attention sees."""
    return record.encoder_tokens[layer][0] if record.encoder_tokens else traced.rows[1]


def _ahead_flops(record: Record, traced: Traced, layer: int) -> int:
    """One query and all keys of a layer that is about to run: 2 D^2 (N + 1)."""
    rows = _rows(record, traced, layer - 1) if layer else traced.rows[1]
    return 2 * traced.width**2 * (rows + 1)


def _signal_flops(name: str, rows: int, width: int) -> int:
    match name:
        case "cls_attention" | "joint_cls_attention":
            return 2 * width * rows
        case "information_flow":
            return 4 * width * rows
        case "received_attention" | "given_attention":
            return 2 * width * rows**2
        case "global_attention":
            return 4 * width * rows**2 + 2 * rows**2
    return 0
