"""What a session knows while the model runs: of each thread, and of the forward that it is in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foveate.engine.cached_forward import Onward
    from foveate.engine.forward import Turn
    from foveate.engine.images import Group
    from foveate.engine.layout import Layout, Slots
    from foveate.engine.plan import Plan
    from foveate.engine.rollback import Rollback
    from foveate.families import Family
    from foveate.record.record import Record
    from foveate.signals.clip import ClipQuestions

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a forward is about, in logical terms.

    Args:
        batch: rows, B.
        length: tokens of this forward, T.
        past: logical length of what the cache holds.
        device: where the sequence lives.
        groups: images of this forward and what is alive of them; empty in decoding steps and for
            text alone.
        real: (B, past + T) which positions are neither padding nor hidden by the caller, or `None`
            for all.
        trailing: drafted tokens behind the prompt, in assisted decoding.
        request: batch row to entry of a per-request budget.
        flash: whether the attention kernel takes 2-D masks.
        sees: (B or 1, T, T) what each position sees; `None` where that is those before it.
        visual: (B, T) placeholders of all images, removed ones too; `None` without images.
        supervised: (B, T) positions with a label; `None` without labels.
        sample: (B, T) which sample of its row each position is of; `None` where rows are samples.
        numbered: (B, T) which positions make those after them go on by one; `None` for all.
    """

    batch: int
    length: int
    past: int
    device: torch.device
    groups: list[Group]
    real: Tensor | None
    trailing: int
    request: Callable[[int], int]
    flash: bool
    sees: Tensor | None = None
    visual: Tensor | None = None
    supervised: Tensor | None = None
    sample: Tensor | None = None
    numbered: Tensor | None = None

    @cached_property
    def present(self) -> Tensor | None:
        """(B, T) which positions have a column once any is removed: real ones, and visual tokens
        that nobody sees because the caller hides them; `None` for all.
        """
        if self.real is None:
            return None
        real = self.real[:, self.past :]
        return real if self.visual is None else real | self.visual

    @cached_property
    def hidden(self) -> Tensor | None:
        """(B, T) visual tokens that the caller hides; `None` if there are none."""
        if self.real is None or self.visual is None:
            return None
        hidden = self.visual & ~self.real[:, self.past :]
        return hidden if bool(hidden.any()) else None


class ForwardState(Protocol):
    """A forward as decoder signals read it.

    Args:
        plan: the session's plan.
        family: the model's family.
        prompt: what the forward is about.
        groups: images, and what is alive of them now.
        layout: physical columns of now.
        begin_of: (method, image) -> tokens it had where the method began.
    """

    plan: Plan
    family: Family
    prompt: Prompt
    groups: list[Group]
    layout: Layout
    begin_of: dict[tuple[int, int], int]

    def slots_of(self, cache: Any, number: int) -> Slots:
        """What a cache layer held before this forward."""

    def positions(
        self, number: int, before: Slots, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Any, Tensor | None]:
        """(cos, sin) and position ids of the physical columns."""

    def row_index(self, part: Group) -> Tensor:
        """(G, 1) row of the batch of each image."""

    def columns_of(self, part: Group, layout: Layout) -> Tensor:
        """(G, V) physical columns of a group in a layout."""

    def seen(self, group: Group) -> Tensor | None:
        """(G, V) which living tokens of a group the caller has not hidden; `None` for all."""


class Forward:
    """One forward of the base model. Made anew for each, and for the time between them."""

    inside: bool = False  # within the base model's forward
    entered: bool = False  # has come to the text model
    prompt: tuple[Tensor | None, Kwargs] | None = None  # ids and arguments
    sample: Tensor | None = None  # (B, T) packed sample of each position, where rows hold several
    readout: Tensor | None = None  # (B, T) visual tokens that a next token is read from, if any
    turn: Turn | None = None
    onward: Onward | None = None  # instead of a turn, where nothing can be removed
    rollback: Rollback | None = None  # what the cache is brought back to if it dies

    def __init__(self) -> None:
        self.visual: dict[str, Tensor] = {}  # modality -> (B, T) placeholders
        self.encoded: dict[str, Any] = {}  # modality -> its features, a tagged ModelOutput


class Local(threading.local):
    """What one thread is doing with the model."""

    encoding: bool = False  # within get_image_features or get_video_features
    given: Tensor | None = None  # what the projector was given there
    requests: int | None = None  # rows that `generate` was called with, while it runs
    asked: tuple[Tensor | None, Kwargs] | None = None  # ids and arguments that it was called with
    trailing: int = 0  # drafted tokens behind the prompt
    supervised: Tensor | None = None  # (B, T) positions with a label, where labels are given
    awaited: bool = False  # `generate` has encoded images that no forward was given yet
    generating: bool = False  # within `generate`
    told: tuple[int, int] | None = None  # rows and length of the prompt whose record stands there
    record: Record | None = None
    clip: ClipQuestions | None = None

    def __init__(self) -> None:
        self.now = Forward()
