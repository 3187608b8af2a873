"""What a session knows while the model runs: of each thread, and of the forward that it is in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from foveate.core import TrainingPass
from foveate.core.transfer import upload
from foveate.engine.masks import present_positions

if TYPE_CHECKING:
    from foveate.engine.images import ImageGroup
    from foveate.engine.layout import Layout
    from foveate.engine.plan import Plan
    from foveate.engine.prompt import PromptTokens
    from foveate.engine.slots import Slots
    from foveate.families import Family

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Told:
    """What the host knows of a prompt.

    Args:
        tokens: what each token of this forward is; `None` without images.
        real: (B or 1, past + T) which positions are neither padding nor hidden by the caller;
            `None` for all.
        past: logical length of what the cache holds.
        recurrent: as in `Prompt`.
    """

    tokens: PromptTokens | None
    real: Tensor | None
    past: int
    recurrent: bool

    @cached_property
    def present(self) -> Tensor | None:
        """(B, T) which positions have a column once any is removed: those of
        `present_positions`; where a running state steps over hidden positions, all but padding
        around a row. `None` for all.
        """
        if self.real is None or (self.recurrent and self.past):
            return None
        visual = None if self.tokens is None else self.tokens.visual
        present = present_positions(self.real[:, self.past :], visual)
        if present is None or not self.recurrent:
            return present
        begun, goes_on = present.cumsum(1), present.flip(1).cumsum(1).flip(1)
        return (begun > 0) & (goes_on > 0)

    @cached_property
    def hidden(self) -> Tensor | None:
        """(B, T) visual tokens that the caller hides; `None` if there are none."""
        if self.real is None or self.tokens is None:
            return None
        hidden = self.tokens.visual & ~self.real[:, self.past :]
        return hidden if bool(hidden.any()) else None

    @cached_property
    def tail(self) -> int:
        """Positions at the end that have a column in every row, whatever methods remove."""
        if self.tokens is None:
            return 0
        stays = ~self.tokens.visual
        stays = stays if self.present is None else stays & self.present
        return int(stays.all(0).flip(0).long().cumprod(0).sum())


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a forward is about, in logical terms.

    Args:
        batch: rows, B.
        length: tokens of this forward, T.
        past: logical length of what the cache holds.
        device: where the sequence lives.
        groups: images of this forward and which of their tokens survive; empty in decoding steps
            and for text alone.
        told: what the host knows of it; of the same tensors, those on the device are made of these.
        trailing: drafted tokens after the prompt, in assisted decoding.
        flash: whether the attention kernel takes 2-D masks.
        sees: (B or 1, T, T) what each position sees; `None` where that is those before it.
        numbered: (B, T) which positions make those after them go on by one; `None` for all.
        recurrent: whether some layers mix tokens into a running state; a hidden position is a step
            of zeros there.
        given: (B or 1, T) position ids that the text model was given; `None` for none.
        training: the forward as methods that learn see it, in training.
    """

    batch: int
    length: int
    past: int
    device: torch.device
    groups: list[ImageGroup]
    told: Told
    trailing: int
    flash: bool
    sees: Tensor | None = None
    numbered: Tensor | None = None
    recurrent: bool = False
    given: Tensor | None = None
    training: TrainingPass | None = None

    @property
    def positions(self) -> Tensor:
        """(B or 1, T) position ids, along one axis."""
        if self.given is not None:
            return self.given
        return torch.arange(self.past, self.past + self.length, device=self.device)[None]

    @cached_property
    def real(self) -> Tensor | None:
        """(B, past + T) which positions are neither padding nor hidden by the caller; `None` for
        all.
        """
        real = self._here(self.told.real)
        return None if real is None else real.expand(self.batch, -1)

    @cached_property
    def visual(self) -> Tensor | None:
        """(B, T) placeholders of all images, removed ones too; `None` without images."""
        return None if self.told.tokens is None else self._here(self.told.tokens.visual)

    @cached_property
    def supervised(self) -> Tensor | None:
        """(B, T) positions with a label; `None` without labels."""
        return None if self.told.tokens is None else self._here(self.told.tokens.supervised)

    @cached_property
    def sample(self) -> Tensor | None:
        """(B, T) which sample of its row each position is of; `None` where rows are samples."""
        return None if self.told.tokens is None else self._here(self.told.tokens.sample)

    @cached_property
    def present(self) -> Tensor | None:
        """(B, T) as of `Told`."""
        return self._here(self.told.present)

    @cached_property
    def hidden(self) -> Tensor | None:
        """(B, T) as of `Told`."""
        return self._here(self.told.hidden)

    def _here(self, told: Tensor | None) -> Tensor | None:
        return None if told is None else upload(told, self.device)


class ForwardState(Protocol):
    """A forward as decoder signals read it.

    Args:
        plan: the session's plan.
        family: the model's family.
        prompt: what the forward is about.
        groups: images, and which of their tokens survive so far.
        layout: physical columns of now.
    """

    plan: Plan
    family: Family
    prompt: Prompt
    groups: list[ImageGroup]
    layout: Layout

    def slots_of(self, cache: Any, number: int) -> Slots:
        """What a cache layer held before this forward."""

    def positions(
        self, number: int, before: Slots, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Any, Tensor | None]:
        """(cos, sin) and position ids of the physical columns."""

    def row_index(self, part: ImageGroup) -> Tensor:
        """(G, 1) row of the batch of each image."""

    def columns_of(self, part: ImageGroup, layout: Layout) -> Tensor:
        """(G, V) physical columns of a group in a layout."""

    def seen(self, group: ImageGroup) -> Tensor | None:
        """(G, V) which surviving tokens of a group the caller has not hidden; `None` for all."""
