"""Layers that fewer rows go through than there are: what enters them, and what all go on with.

Shapes: `B` images, `G` of a group, `S` special rows, `V` tokens of an image, `M` of what enters,
`R` rows of a token, `D` hidden, `N` rows of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from foveate.core import Need, VisualTokens
from foveate.engine.plan import PlannedStep
from foveate.engine.vision.decisions import told
from foveate.engine.vision.encoder_group import EncoderGroup
from foveate.engine.vision.forward import Encoding
from foveate.errors import FoveateError


@dataclass(frozen=True, eq=False)
class Entered:
    """What goes through a layer that a step acts around.

    Args:
        rows: (B, S + M R, D) the layer's input.
        tokens: what the method is shown.
        values: (G, V, R D) of all tokens before the layer.
    """

    rows: Tensor
    tokens: VisualTokens
    values: Tensor


def enter(
    encoding: Encoding,
    planned: PlannedStep,
    hidden: Tensor,
    signals: Callable[[Need, EncoderGroup], Tensor],
) -> Entered:
    """What goes through the layer that is about to run, where a step acts around it.

    Args:
        encoding: the pass.
        planned: the step.
        hidden: the layer's input.
        signals: a signal of a group.

    Raises:
        FoveateError: the method hands over another number of tokens than it promises.
    """
    values = encoding.layout.take(hidden, 0)
    found = told(encoding, planned, encoding.groups[0], signals)
    tokens = encoding.shown(planned, 0, values, found)
    states = planned.method.enter(tokens, values)
    promised = planned.method.entering(values.shape[1], planned.step)
    if states.shape[1] != promised:
        raise FoveateError(
            f"{planned.method.slug} promises that {promised} of {values.shape[1]} tokens go "
            f"through encoder layer {planned.step.layer}, but hands over {states.shape[1]}"
        )
    specials = hidden if encoding.reduced else encoding.encoder.specials_first(hidden)
    rows = encoding.layout.lay(specials, [states])
    encoding.rows[-1] = rows.shape[-2], rows.shape[-2]
    return Entered(rows, tokens, values)


def leave(encoding: Encoding, planned: PlannedStep, entered: Entered, output: Tensor) -> Tensor:
    """(B, N, D) states of all tokens after that layer, from its output."""
    cell = encoding.groups[0].rows.shape[2]
    passed = output[:, encoding.encoder.special :].unflatten(1, (-1, cell)).flatten(2)
    values = planned.method.leave(entered.tokens, entered.values, passed)
    place = encoding.layout.lay if encoding.reduced else encoding.layout.place
    return place(output, [values])
