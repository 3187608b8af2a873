"""Prompt columns: where query tokens and the text after images are, and what they see.

Shapes: `B` rows, `T` logical length, `P` physical columns, `Q` query or text tokens, `G` images.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from foveate.engine.images import ImageGroup
from foveate.engine.prompt import PromptTokens, QueryTokens, QuestionText, ends_of
from foveate.engine.slots import Slots
from foveate.engine.state import ForwardState


class PromptColumns:
    """Columns of one forward that signals are taken at.

    Args:
        state: the forward.
    """

    def __init__(self, state: ForwardState) -> None:
        self.state = state
        self.prompt = state.prompt

    @property
    def _window(self) -> int | None:
        """How many positions a token sees at most; `None` for all."""
        window, total = self.state.family.window, self.prompt.past + self.prompt.length
        return window if window is not None and window < total else None

    @cached_property
    def tokens(self) -> PromptTokens:
        """What each token of the forward is, on the host."""
        tokens, real = self.prompt.told.tokens, self.prompt.told.real
        assert tokens is not None  # there are images, or no step would read signals
        return replace(tokens, real=None if real is None else real[:, self.prompt.past :])

    @cached_property
    def query_tokens(self) -> QueryTokens:
        """The query tokens."""
        return self.tokens.query.on(self.prompt.device)

    @property
    def question_tokens(self) -> int:
        """Text tokens after images in the longest row; 0 if no signal reads them."""
        text = vars(self).get("question_text")
        return 0 if text is None else text.columns.shape[1]

    @property
    def without_text(self) -> tuple[int, ...]:
        """Rows in which no text follows an image, if a signal reads that text."""
        text = vars(self).get("question_text")
        return () if text is None else text.without

    @cached_property
    def question_text(self) -> QuestionText:
        """The text after the images, as far as it is not supervised."""
        groups = self.prompt.groups
        rows = [row for group in groups for row in group.rows]
        ends = [end for group in groups for end in group.ends]
        return self.tokens.question_text(rows, ends).on(self.prompt.device)

    @property
    def _real(self) -> Tensor | None:
        """(B, T) positions of this forward that are no padding; `None` for all."""
        real = self.prompt.real
        return None if real is None else real[:, self.prompt.past :]

    def physical(self, columns: Tensor) -> Tensor:
        """Physical columns of the nearest surviving tokens at or before logical ones."""
        index = self.state.layout.index.contiguous()
        found = torch.searchsorted(index, columns.contiguous(), right=True) - 1
        return found.clamp(min=0)

    @property
    def _surviving(self) -> Tensor | None:
        """(B, P) physical columns that are no padding; `None` for all."""
        real, layout = self._real, self.state.layout
        if real is None:
            return layout.index >= 0 if layout.ragged else None
        return real.gather(1, layout.index.clamp(min=0)) & (layout.index >= 0)

    def visible_to(self, columns: Tensor) -> Tensor:
        """(B, Q, P) physical columns that tokens in (B, Q) logical ones see."""
        seen = self._known_to(columns)
        if self._window is None:
            return seen
        return seen & (self.state.layout.index[:, None] > columns[..., None] - self._window)

    def _known_to(self, columns: Tensor) -> Tensor:
        """The same, without regard to sliding windows."""
        index, sample = self.state.layout.index, self.prompt.sample
        if self.prompt.sees is None:
            seen = index[:, None] <= columns[..., None]
        else:
            sees = self.prompt.sees.expand(len(index), -1, -1)
            sees = sees[torch.arange(len(index), device=sees.device)[:, None], columns]
            seen = sees.gather(2, index.clamp(min=0)[:, None].expand(-1, columns.shape[1], -1))
        if self._surviving is not None:
            seen = seen & self._surviving[:, None]
        if sample is not None:
            own = sample.gather(1, index.clamp(min=0))
            seen = seen & (own[:, None] == sample.gather(1, columns)[..., None])
        return seen

    @property
    def visible_to_query(self) -> Tensor | None:
        """(B, Q, P) physical columns that the query tokens see; `None` for all."""
        if self._plain and self._window is None:
            return None
        return self.visible_to(self.query_tokens.columns)

    @property
    def _plain(self) -> bool:
        """Whether each row is one prompt without padding, and its last token the query token."""
        prompt = self.prompt
        usual = prompt.supervised is None and prompt.sample is None
        plain = usual and not prompt.trailing and prompt.sees is None
        return plain and self._surviving is None

    @property
    def of_prompt(self) -> Tensor | None:
        """(B, P) physical columns of the prompt, neither drafted nor supervised; `None` for all."""
        prompt, index = self.prompt, self.state.layout.index
        if prompt.supervised is None:
            return None if self._plain else self._known_to(self.query_tokens.columns)[:, 0]
        unsupervised = ~prompt.supervised.gather(1, index.clamp(min=0))
        return unsupervised if self._surviving is None else unsupervised & self._surviving

    def at_text(self, states: Tensor) -> Tensor:
        """(B, Q, ...) of (B, P, ...) at the text after images."""
        columns = self.physical(self.question_text.columns).to(states.device)
        return states[torch.arange(len(columns), device=states.device)[:, None], columns]

    def ends_of(self, group: ImageGroup) -> tuple[Tensor, Tensor]:
        """(G) rows of a group's images, and (G) columns at which they end."""
        return ends_of(group, self.prompt.device)

    def text_mask(self, group: ImageGroup) -> Tensor:
        """(G, Q) which text comes after each image of a group."""
        return self.question_text.mask(*self.ends_of(group))

    def visible_past(self, columns: Tensor, past: Slots) -> Tensor | None:
        """(B, Q or 1, S) cached slots that tokens in (B, Q) logical columns see; `None` for all."""
        real = self.prompt.real
        if real is None and not past.ragged and self._window is None:
            return None
        seen = (past.index >= 0)[:, None]
        if real is not None:
            seen = seen & real.gather(1, past.index.clamp(min=0))[:, None]
        if self._window is not None:
            position = columns[..., None] + self.prompt.past
            seen = seen & (past.index[:, None] > position - self._window)
        return seen
