"""What an encoder returns, brought back to full length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from foveate.engine.attentions import spread
from foveate.engine.vision.forward import Encoding
from foveate.errors import UnsupportedModelError


def whole(encoding: Encoding, outputs: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """Outputs of layers at full length."""
    points = [encoding.point(number + 1) for number in layers]
    return [
        states if point is None else encoding.layout.full_length(states, point)
        for states, point in zip(outputs, points, strict=True)
    ]


def restore_outputs(encoding: Encoding, output: Any) -> Any:
    """Bring what the encoder returns back to full length, in place."""
    if not encoding.reduced:
        return output
    merged = None  # what is made of the last rows, which may stand for the last hidden state
    if output.get("last_hidden_state") is None:
        pass  # a head has read it
    elif encoding.encoder.returns_rows:
        output.last_hidden_state = encoding.unpruned(output.last_hidden_state)
    else:
        merged = output.last_hidden_state
    if output.get("hidden_states") is not None and not encoding.encoder.maps_states:
        output.hidden_states = tuple(
            states
            if states is None or states is merged or (point := encoding.point(number)) is None
            else encoding.layout.full_length(states, point)
            for number, states in enumerate(output.hidden_states)
        )
    if output.get("attentions"):
        _widen(encoding, output)
    return output


def _widen(encoding: Encoding, output: Any) -> None:
    """Bring attention maps (B, H, N', N') back to (B, H, N, N), in place.

    Raises:
        UnsupportedModelError: it is not known which map is which layer's.
    """
    maps, layers = output.attentions, len(encoding.encoder.layers)
    if len(maps) < layers or (len(maps) > layers and not encoding.encoder.queries):
        raise UnsupportedModelError(
            f"this encoder returns {len(maps)} attention maps of {layers} layers, so that it "
            "is not known which is which; leave output_attentions out"
        )
    output.attentions = tuple(
        of if of is None or number not in encoding.points else _widened(encoding, of, number)
        for number, of in enumerate(maps)
    )


def _widened(encoding: Encoding, of: Tensor, number: int) -> Tensor:
    """An attention map at full length; some encoders return what attention makes, (N', D)."""
    point = encoding.points[number]
    if point.order is None:
        return of
    if of.dim() != 4:
        return encoding.layout.full_length(of, point)
    rows, total = encoding.layout.rows_of(point), encoding.layout.shape[-1]
    return spread(of, rows, rows, (total, total))
