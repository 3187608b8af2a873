"""Extensions: what one or two methods need of a forward beyond dropping tokens.

The core calls an extension at the points below and knows no more of it. Each forward makes its own,
so an extension may keep what it needs from layer to layer. What must outlive the forward is
attached to the layers of the key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from foveate.engine.plan import Plan, PlannedStep

if TYPE_CHECKING:
    from foveate.engine.cache import PrunedLayer
    from foveate.engine.images import ImageGroup
    from foveate.engine.slots import Slots

Kwargs = dict[str, Any]


class Extension:
    """One extension in one forward; by default each point does nothing.

    Args:
        forward: the forward: a `ForwardPass`, or a `CachedForward` for extensions of decoding.
        plan: the session's plan.
    """

    tracks_visual: ClassVar[bool] = False
    """Whether the cache must know which of its slots hold visual tokens."""

    def __init__(self, forward: Any, plan: Plan) -> None:
        self.forward, self.plan = forward, plan

    def begin(self, cache: Any, request_of: Callable[[int], int]) -> None:
        """Before the text model.

        Args:
            cache: the key-value cache, or `None`.
            request_of: row of the batch to entry of a per-request budget.
        """

    def enter(self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """Before a layer: its keyword arguments, in logical terms.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in logical terms.
        """
        return kwargs

    def before_step(self, planned: PlannedStep, hidden: Tensor) -> Tensor | None:
        """Before a step: the states after it, if the extension takes its place.

        Args:
            planned: the step.
            hidden: (B, P, D) states.
        """
        return None

    def after_step(self, planned: PlannedStep, cache: Any) -> None:
        """After a step that has dropped tokens.

        Args:
            planned: the step.
            cache: the key-value cache, or `None`.
        """

    def gate(self, part: ImageGroup, gates: Tensor) -> None:
        """Note how much later layers attend to the tokens of a group.

        Args:
            part: G images of V tokens.
            gates: (G, V) in (0, 1].
        """

    def attending(self, slots: Slots, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """Before a layer: its keyword arguments, in physical terms.

        Args:
            slots: what its cache layer holds after the forward.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in physical terms.
        """
        return kwargs

    def runs(self, number: int) -> bool:
        """Whether it may run a decoder layer itself, and wants its arguments in physical terms."""
        return False

    def see(self, number: int, slots: Slots, held: PrunedLayer | None) -> None:
        """Note what the layer's attention will see.

        Args:
            number: the decoder layer.
            slots: what its cache layer holds after the forward.
            held: that cache layer; `None` without a cache.
        """

    def run(self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Tensor | None:
        """Run a layer in its place, and return its output; `None` where the layer does right.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in physical terms.
        """
        return None

    def record(self) -> Mapping[str, Any]:
        """What it has to say of the forward: fields of `Record`."""
        return {}
