"""Looks: what steps between decoder layers are told about the tokens.

Signals are taken just before a layer runs, or while it runs, and handed out at the steps that need
them, at the tokens that are alive there.
Shapes: `B` rows, `P` physical columns, `G` images of a group, `V` tokens of each, `Q` text tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.core import Need
from foveate.engine.images import ImageGroup
from foveate.engine.inputs import from_first
from foveate.engine.layout import Layout, Slots
from foveate.engine.prompt import Asked, starts
from foveate.engine.question import Question
from foveate.engine.readout import prompt_ends
from foveate.errors import InputError
from foveate.signals import SIGNALS
from foveate.signals.decoder import LayerView, transition

if TYPE_CHECKING:
    from foveate.engine.forward import Turn

_COLUMNS = {  # axis of the columns, of what is taken of all columns
    "text_attention": 3,
    "content_attention": 3,
    "question_attention": 3,
    "question_closeness": 2,
    "llm_states": 1,
    "normed_states": 1,
    "llm_keys": 2,
    "llm_values": 2,
    "value_attention": 3,
    "transition": 1,
}
_PLACES = ("prompt_positions", "question_positions")  # known without a look at a layer
_ELSEWHERE = {"transition", "question_relevance", *_PLACES}
_ALONE = ("content_attention", "value_attention")  # softmax over the image's tokens alone
_KEYS = ("llm_keys", "question_keys")  # which depend on where in its row a token stands
_ASKED = ("text_attention", *_ALONE)  # of tokens that ask


class Looks:
    """Signals of one forward.

    Args:
        turn: the forward.
    """

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.prompt = turn.prompt
        self._taken: dict[tuple[str, int], tuple[Tensor, Layout]] = {}
        self._relevance: dict[int, Tensor] = {}
        self._viewed: tuple[Any, ...] = (None, None)  # layer, layout, view of it, slots before it

    def take(
        self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any], later: bool = False
    ) -> None:
        """Take what steps need of a layer that is about to run: what those before it need, of what
        is there; and `later`, once they have acted, what those before later layers need, of what
        the layer will see.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in logical terms.
            later: for which of them.
        """
        if not later and "question_relevance" in self._due(number):
            self._rate(hidden.detach())  # of what entered the language model, for all of them
        due = self._due(number, operator.gt if later else operator.eq) - _ELSEWHERE
        due = {name for name in due if not self._is_taken(name, number)}
        if due and self._viewed[:2] != (number, self.turn.layout):
            self._viewed = number, self.turn.layout, *self.view(number, layer, hidden, kwargs)
        *_, view, past = self._viewed
        if later:  # it holds what a recomputation of the layer is known by
            self._viewed = None, None
        keyed = view
        if due & {*_KEYS} and (counted := self._from_first(number, hidden, kwargs)):
            keyed, _ = self.view(number, layer, hidden, counted)
        for name in due:
            taken = self._look(name, keyed if name in _KEYS else view, past)
            self._taken[name, number] = taken, self.turn.layout

    def changed(self, number: int, given: Tensor, made: Tensor) -> None:
        """Note what a module of a layer made of its input, both (B, P, D)."""
        if "transition" not in self._due(number):
            return
        if self.prompt.sample is not None:
            raise InputError(
                "how much layers change a token is told among all tokens of a row, so packed "
                "samples would see each other; leave packing off, or use another method"
            )
        real = self._prompted
        if real is None:
            real = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        before, _ = self._taken.get(("transition", number), (0, None))
        now = before + transition(given, made, real.to(given.device))
        self._taken["transition", number] = now, self.turn.layout

    def of(self, needs: tuple[Need, ...], part: ImageGroup) -> dict[str, Tensor]:
        """Signals of a group, at the tokens that are alive of it."""
        signals: dict[str, Tensor] = {}
        for need in needs:
            if need.name.startswith("question"):
                signals["question_mask"] = self._mask(part)
            if need.name == "question_relevance":
                signals[need.name] = torch.stack([self._relevance[i] for i in part.numbers])
            elif need.name in _PLACES:
                signals[need.name] = self._places(need.name, part)
            else:
                taken = [self._at(need.name, number, part) for number in need.layers]
                signals[need.name] = torch.stack(taken, 1)
        return signals

    # -- taking

    def _due(self, number: int, chosen: Callable[[int, int], bool] = operator.ge) -> set[str]:
        """Signals of a layer that some step needs which removes anything; `chosen` compares the
        layer of a step with it.
        """
        looks = self.turn.plan.looks.get(number, {})
        return {
            name
            for name, steps in looks.items()
            if any(self._drops(s) for s in steps if chosen(s.step.layer, number))
        }

    def _is_taken(self, name: str, number: int) -> bool:
        """Whether a signal of a layer was taken of what is there now."""
        return (name, number) in self._taken and self._taken[name, number][1] is self.turn.layout

    def _drops(self, planned: Any) -> bool:
        if planned.method.adaptive:
            return any(group.index.shape[1] for group in self.turn.groups)
        return any(
            0 < count < group.index.shape[1]
            for group in self.turn.groups
            for count in group.by_count(planned)
        )

    def _look(self, name: str, view: LayerView, past: Slots) -> Tensor:
        match name:
            case "text_attention":
                cached = self.seen_before(self.asked.columns, past)
                return view.attention(self._last, self._visible, cached)
            case "content_attention":
                return view.content_logits(self._last)
            case "question_attention":
                asking = self.question.columns
                cached = self.seen_before(asking, past)
                return view.attention(self._asking, self._seen_by(asking), cached)
            case "question_closeness":
                return view.closeness(self._asking)
            case "llm_states":
                return view.hidden
            case "llm_keys":
                return view.keys
            case "llm_values":
                return view.values
            case "value_attention":
                return view.value_logits(self._last)
            case "normed_states":
                return self._norm(view.hidden)
            case "question_states":
                return self._text_of(view.hidden)
            case "question_normed_states":
                return self._norm(self._text_of(view.hidden))
            case "question_keys":
                return self._text_of(view.keys.transpose(1, 2)).transpose(1, 2)
        raise AssertionError(name)  # the plan knows all names

    def view(
        self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[LayerView, Slots]:
        """What a layer that is about to run attends with, and the slots of the keys that it has
        cached; arguments as in `take`.
        """
        turn, prompt = self.turn, self.prompt
        cache = kwargs.get("past_key_values")
        held = cache.layers[number] if cache is not None and len(cache.layers) > number else None
        before = turn.slots_of(cache, number)
        rotary = None
        if turn.family.rotates(number):
            rotary, _ = turn.positions(number, before, hidden, kwargs)
        past = None
        if held is not None and prompt.past:
            before = before.last(held.keys.shape[2])  # all that a layer with a window holds
            past = held.keys[:, :, : before.count]
        return LayerView(layer, hidden, rotary, past), before

    def _from_first(
        self, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Keyword arguments with positions counted from the first token of each row; `None` where
        they are so.
        """
        prompt, family = self.prompt, self.turn.family
        positions = from_first(kwargs.get("position_ids"), prompt.real, prompt.past)
        if positions is None or not family.one_dimensional:
            return None
        rotary = family.rotary(hidden, positions, number)
        return {**kwargs, "position_ids": positions, "position_embeddings": rotary}

    def seen_before(self, columns: Tensor, past: Slots) -> Tensor | None:
        """(B, Q or 1, S) cached slots that tokens in (B, Q) logical columns see, or `None` for
        all.
        """
        real = self.prompt.real
        if real is None and not past.ragged and self._window is None:
            return None
        seen = (past.index >= 0)[:, None]
        if real is not None:
            seen = seen & real.gather(1, past.index.clamp(min=0))[:, None]
        if self._window is not None:
            asking = columns[..., None] + self.prompt.past
            seen = seen & (past.index[:, None] > asking - self._window)
        return seen

    @property
    def _window(self) -> int | None:
        """Positions that a token sees at most, where there are more."""
        window, total = self.turn.family.window, self.prompt.past + self.prompt.length
        return window if window is not None and window < total else None

    @torch.no_grad()
    def _norm(self, states: Tensor) -> Tensor:
        return self.turn.family.text.norm(states)

    def _rate(self, hidden: Tensor) -> None:
        """Softmax over text of visual times text embeddings, mean over an image's tokens."""
        text = self._text_of(hidden)
        for group in self.turn.groups:
            rows = self.turn.row_index(group)
            visual = hidden[rows, self.turn.columns_of(group, self.turn.layout)].float()
            scores = torch.matmul(visual, text[rows[:, 0]].float().transpose(1, 2))
            mask = self._mask(group)[:, None]
            share = scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
            self._relevance |= dict(zip(group.numbers, share.nan_to_num(), strict=True))

    # -- columns

    @cached_property
    def asked(self) -> Asked:
        """The tokens that ask."""
        prompt, real = self.prompt, self._real
        if prompt.supervised is not None:
            return Asked.before_spans(prompt.supervised, real, prompt.sample)
        if prompt.sample is not None:
            return Asked.last_of_samples(prompt.sample)
        asked = Asked.last(prompt.batch, prompt.length, real, prompt.trailing)
        return replace(asked, columns=asked.columns.to(prompt.device))

    @property
    def question_tokens(self) -> int:
        """Text tokens behind images that were looked at, in the longest row; 0 if none were."""
        question = vars(self).get("question")
        return 0 if question is None else question.columns.shape[1]

    @property
    def without_text(self) -> tuple[int, ...]:
        """Rows in which no text followed an image that was looked at by its text."""
        question = vars(self).get("question")
        return () if question is None else question.without

    @cached_property
    def question(self) -> Question:
        """The text behind the images, as far as it is not supervised."""
        prompt, real = self.prompt, self._real
        assert prompt.visual is not None  # there are images, or nobody would ask
        if prompt.supervised is not None:
            real = ~prompt.supervised if real is None else real & ~prompt.supervised
        rows = [row for group in prompt.groups for row in group.rows]
        ends = [end for group in prompt.groups for end in group.ends]
        last = None
        if prompt.supervised is None:
            last = prompt_ends(prompt.visual, real, prompt.trailing, prompt.sample)
        return Question.of(prompt.visual, real, prompt.trailing, rows, ends, prompt.sample, last)

    def unasked(self, needs: tuple[Need, ...], group: ImageGroup) -> set[int]:
        """Members of a group about which nothing is asked that a step needs to know.

        So it is with images behind which nothing is supervised; such a step leaves them alone.
        """
        names = {need.name for need in needs if SIGNALS[need.name].asks} - {"transition"}
        if self.prompt.supervised is None or not names:
            return set()
        asks = torch.ones(len(group.images), dtype=torch.bool, device=self.prompt.device)
        if names & {*_ASKED}:
            asks &= self.asked.of(*self._where(group)).any(1)
        if names - {*_ASKED}:
            asks &= self._mask(group).any(1)
        return {i for i, asked in enumerate(asks.tolist()) if not asked}

    @property
    def _real(self) -> Tensor | None:
        """(B, T) positions of this forward that are no padding, or `None` for all."""
        real = self.prompt.real
        return None if real is None else real[:, self.prompt.past :]

    @property
    def _last(self) -> Tensor:
        """(B, Q) physical columns of the tokens that ask."""
        return self._physical(self.asked.columns)

    @property
    def _asking(self) -> Tensor:
        """(B, Q) physical columns of the question."""
        return self._physical(self.question.columns)

    def _physical(self, columns: Tensor) -> Tensor:
        """Columns that stand for logical ones: the nearest alive at or before each."""
        index = self.turn.layout.index.contiguous()
        found = torch.searchsorted(index, columns.contiguous(), right=True) - 1
        return found.clamp(min=0)

    @property
    def _alive(self) -> Tensor | None:
        """(B, P) columns that are no padding, or `None` for all."""
        real, layout = self._real, self.turn.layout
        if real is None:
            return layout.index >= 0 if layout.ragged else None
        return real.gather(1, layout.index.clamp(min=0)) & (layout.index >= 0)

    def _seen_by(self, columns: Tensor) -> Tensor:
        """(B, Q, P) physical columns that tokens in (B, Q) logical ones see."""
        seen = self._known_to(columns)
        if self._window is None:
            return seen
        return seen & (self.turn.layout.index[:, None] > columns[..., None] - self._window)

    def _known_to(self, columns: Tensor) -> Tensor:
        """The same, whether or not they lie within a window."""
        index, sample = self.turn.layout.index, self.prompt.sample
        if self.prompt.sees is None:
            seen = index[:, None] <= columns[..., None]
        else:
            sees = self.prompt.sees.expand(len(index), -1, -1)
            sees = sees[torch.arange(len(index), device=sees.device)[:, None], columns]
            seen = sees.gather(2, index.clamp(min=0)[:, None].expand(-1, columns.shape[1], -1))
        if self._alive is not None:
            seen = seen & self._alive[:, None]
        if sample is not None:
            own = sample.gather(1, index.clamp(min=0))
            seen = seen & (own[:, None] == sample.gather(1, columns)[..., None])
        return seen

    @property
    def _visible(self) -> Tensor | None:
        """(B, Q, P) columns that the tokens that ask see, or `None` for all."""
        if self._plain and self._window is None:
            return None
        return self._seen_by(self.asked.columns)

    @property
    def _plain(self) -> bool:
        """Whether the tokens that ask are the last of their rows, and these are all there is."""
        prompt = self.prompt
        usual = prompt.supervised is None and prompt.sample is None
        plain = usual and not prompt.trailing and prompt.sees is None
        return plain and self._alive is None

    @property
    def _prompted(self) -> Tensor | None:
        """(B, P) columns of the prompt: neither drafted nor supervised; `None` for all."""
        prompt, index = self.prompt, self.turn.layout.index
        if prompt.supervised is None:
            return None if self._plain else self._known_to(self.asked.columns)[:, 0]
        told = ~prompt.supervised.gather(1, index.clamp(min=0))
        return told if self._alive is None else told & self._alive

    def _text_of(self, states: Tensor) -> Tensor:
        """(B, Q, ...) of (B, P, ...) at the question."""
        columns = self._asking.to(states.device)
        return states[torch.arange(len(columns), device=states.device)[:, None], columns]

    # -- handing out

    def _where(self, part: ImageGroup) -> tuple[Tensor, Tensor]:
        """(G) rows of a group's images, and (G) columns at which they end."""
        rows = self.turn.row_index(part)[:, 0]
        return rows, torch.tensor(part.ends, device=rows.device)

    def _mask(self, part: ImageGroup) -> Tensor:
        return self.question.mask(*self._where(part))

    def _mean(self, values: Tensor, part: ImageGroup) -> Tensor:
        """(G, H, V) of (G, H, Q, V): mean over the tokens that ask about each image."""
        if self.asked.real is None:
            return values[:, :, 0]
        asks = self.asked.of(*self._where(part)).to(values.device)[:, None, :, None]
        return values.masked_fill(~asks, 0.0).sum(2) / asks.sum(2).clamp(min=1)

    def _places(self, name: str, part: ImageGroup) -> Tensor:
        """Places in the prompt of a group's tokens, or of the text behind them."""
        rows = self.turn.row_index(part)
        columns = part.columns if name == "prompt_positions" else self.question.columns[rows[:, 0]]
        assert columns is not None
        if self.prompt.sample is not None:
            return columns - starts(self.prompt.sample)[rows, columns]
        columns = columns + self.prompt.past
        real = self.prompt.real
        return columns if real is None else (real.long().cumsum(1) - 1)[rows, columns]

    def _at(self, name: str, number: int, part: ImageGroup) -> Tensor:
        """A signal of one layer, (G, ...) at the tokens alive of a group."""
        taken, layout = self._taken[name, number]
        rows = self.turn.row_index(part).to(taken.device)
        if name not in _COLUMNS:
            mask = self._mask(part).to(taken.device)
            mask = mask[:, None] if name == "question_keys" else mask
            return taken[rows[:, 0]].masked_fill(~mask[..., None], 0.0)
        columns = self.turn.columns_of(part, layout).to(taken.device)
        values = taken.movedim(_COLUMNS[name], 1)[rows, columns]
        if (seen := self.turn.seen(part)) is not None:  # nothing is told of what callers hide
            hidden = ~seen.to(taken.device)[(...,) + (None,) * (values.dim() - 2)]
            values = values.masked_fill(hidden, -torch.inf if name in _ALONE else 0.0)
        values = values.movedim(1, _COLUMNS[name])
        if name in _ASKED:
            values = values.softmax(-1).nan_to_num() if name in _ALONE else values
            return self._mean(values, part)
        if name == "question_attention":
            mask = self._mask(part).to(taken.device)[:, None, :, None]
            return values.masked_fill(~mask, 0.0)
        return values
