"""Decisions: what a method makes of a group of images inside an encoder, and the groups after it.

Shapes: `G` images of a group, `V` tokens of each, `K` of them surviving, `R` rows of a token, `D`
hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from foveate.core import Need, Reduction
from foveate.engine.plan import PlannedStep
from foveate.engine.readout import reduce_around
from foveate.engine.vision.encoder_group import EncoderGroup
from foveate.engine.vision.exits import Exits
from foveate.errors import UnsupportedModelError
from foveate.signals import SIGNALS, InputSignal

if TYPE_CHECKING:
    from foveate.engine.vision.forward import Encoding

Signals = Callable[[Need, EncoderGroup], Tensor]


def told(
    encoding: Encoding, planned: PlannedStep, of: EncoderGroup, of_layers: Signals
) -> dict[str, Tensor]:
    """Signals of a group that a step has declared.

    Args:
        encoding: the pass.
        planned: the step.
        of: the group.
        of_layers: a signal of encoder layers; others are of what the encoder was handed.
    """
    found: dict[str, Tensor] = {}
    for need in planned.step.needs:
        signal = SIGNALS[need.name]
        if isinstance(signal, InputSignal):
            found[need.name] = signal.of_images(encoding, of)
        else:
            found[need.name] = of_layers(need, of)
    return found


def decided(
    encoding: Encoding, planned: PlannedStep, number: int, x: Tensor, of_layers: Signals
) -> Reduction | None:
    """What a step's method makes of a group; `None` where it finds that all tokens stay.

    Args:
        encoding: the pass.
        planned: the step.
        number: the group's.
        x: (G, V, R D) its values.
        of_layers: see `told`.

    Raises:
        UnsupportedModelError: it makes tokens of its own where a token has several rows.
    """
    of, effects = encoding.groups[number], {*planned.step.effects}
    count = of.survivors_of(planned)
    signals = told(encoding, planned, of, of_layers)
    tokens = encoding.shown(planned, number, x, signals, quota=count)
    reduce = functools.partial(planned.method.reduce, tokens)
    reduction = reduce_around(reduce, count, of.images.required, ascending=False)
    if reduction.values is not None and of.rows.shape[2] > 1:
        raise UnsupportedModelError(
            f"{planned.method.slug} makes tokens of its own, but in the encoder of this "
            f"{encoding.family.model_type!r} a token has {of.rows.shape[2]} rows"
        )
    if effects & {"exit", "ragged"} and of.keeps_all(reduction):
        return None
    if "exit" in effects:
        of.exits = of.exits or Exits(planned, tokens)
        of.exits.note(x, of.layout)
    return reduction


def apart(
    encoding: Encoding, planned: PlannedStep, of: EncoderGroup, x: Tensor, reduction: Reduction
) -> list[tuple[EncoderGroup, Tensor]]:
    """Groups that a reduction leaves of one, with (G, K, R D) values: one for each number of
    survivors where images need not be equally long and nothing has been removed before, or else
    one, with padding.

    Args:
        encoding: the pass.
        planned: the step.
        of: the group.
        x: (G, V, R D) its values.
        reduction: what its method has made of it.
    """
    parts = [(of, x, reduction)]
    if reduction.valid is not None and encoding.layout.packed and not encoding.reduced:
        parts = list(of.by_survivors(x, reduction))
    left = [(part, one.apply(values)) for part, values, one in parts]
    for part, _, one in parts:
        part.reduce(one, planned)
    return left
