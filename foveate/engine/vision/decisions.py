"""Decisions: what a method makes of a group of images inside an encoder, and the groups after it.

Shapes: `G` images of a group, `V` tokens of each, `K` of them surviving, `R` rows of a token, `D`
hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor

from foveate.core import Need, Reduction, VisualTokens
from foveate.engine.plan import PlannedStep
from foveate.engine.readout import reduce_around
from foveate.engine.vision.encoder_group import EncoderGroup
from foveate.engine.vision.exits import Exits
from foveate.errors import UnsupportedModelError
from foveate.signals import SIGNALS, InputSignal
from foveate.signals.signal import EncoderInput

Signals = Callable[[Need, EncoderGroup], Tensor]


def told(
    encoding: EncoderInput, planned: PlannedStep, of: EncoderGroup, of_layers: Signals
) -> Mapping[str, Tensor]:
    """Signals of a group that a step has declared.

    Args:
        encoding: the pass.
        planned: the step.
        of: the group.
        of_layers: gives a signal of encoder layers; other signals are of the encoder's input.
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
    planned: PlannedStep,
    of: EncoderGroup,
    x: Tensor,
    shown: Callable[[int], VisualTokens],
    model_type: str,
) -> Reduction | None:
    """What a step's method makes of a group; `None` where it finds that all tokens stay.

    Args:
        planned: the step.
        of: the group.
        x: (G, V, R D) its values.
        shown: what the method is shown of it, from how many tokens are to survive.
        model_type: named where something is refused.

    Raises:
        UnsupportedModelError: it makes tokens of its own where a token has several rows.
    """
    effects, count = {*planned.step.effects}, of.survivors_of(planned)
    tokens = shown(count)
    reduce = functools.partial(planned.method.reduce, tokens)
    reduction = reduce_around(reduce, count, of.images.required, ascending=False)
    if reduction.values is not None and of.rows.shape[2] > 1:
        raise UnsupportedModelError(
            f"{planned.method.slug} makes tokens of its own, but in the encoder of this "
            f"{model_type!r} a token has {of.rows.shape[2]} rows"
        )
    if effects & {"exit", "ragged"} and of.keeps_all(reduction):
        return None
    if "exit" in effects:
        of.exits = of.exits or Exits(planned, tokens)
        of.exits.note(x, of.layout)
    return reduction


def apart(
    planned: PlannedStep, of: EncoderGroup, x: Tensor, reduction: Reduction, *, padded: bool
) -> list[tuple[EncoderGroup, Tensor]]:
    """Groups that a reduction leaves of one, with (G, K, R D) values: one for each number of
    survivors, or one with padding.

    Args:
        planned: the step.
        of: the group.
        x: (G, V, R D) its values.
        reduction: what its method has made of it.
        padded: whether images of one group stay in one; they must once something was removed.
    """
    parts = [(of, x, reduction)]
    if reduction.valid is not None and not padded:
        parts = list(of.by_survivors(x, reduction))
    left = [(part, one.apply(values)) for part, values, one in parts]
    for part, _, one in parts:
        part.reduce(one, planned)
    return left
