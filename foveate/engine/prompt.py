"""The prompt: what each token of a forward is, and what is asked about each image.

What tokens are is found out on the host, from one reading of the prompt; layers are given copies.

Query tokens are the tokens whose attention ranks the visual tokens: the last token of the prompt,
or of each sample where several are packed in a row. Where labels are given, they are the token
before each supervised span, because each turn of a conversation ends its prompt there.
The question text is the text after each image. Where no text follows an image, the last token of
its prompt stands for it.
Shapes: `B` rows, `T` logical length, `Q` query or text tokens of a row, `G` images, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import Need, TrainingPass
from foveate.core.transfer import upload
from foveate.engine.images import Image, ImageGroup
from foveate.engine.masks import left_align, present_positions
from foveate.engine.total import Room
from foveate.errors import InputError
from foveate.signals import SIGNALS
from foveate.signals.clip import ClipQuestions


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """What each token of a forward is, on the host.

    Args:
        visual: (B, T) placeholders of all images.
        real: (B, T) positions that are neither padding nor hidden by the caller; `None` for all.
        trailing: drafted tokens after the prompt, in assisted decoding.
        supervised: (B, T) positions with a label; `None` without labels.
        sample: (B, T) which sample of its row each position is of; `None` where rows are samples.
    """

    visual: Tensor
    real: Tensor | None = None
    trailing: int = 0
    supervised: Tensor | None = None
    sample: Tensor | None = None

    @property
    def present(self) -> Tensor | None:
        """(B, T) positions that count as tokens; `None` for all."""
        return present_positions(self.real, self.visual)

    @cached_property
    def query(self) -> QueryTokens:
        """The query tokens; none before a span that begins its sample."""
        if self.supervised is not None:
            before = self._before_spans
            if self.real is not None:
                before = before & self.real
            if self.sample is not None:
                before = before & F.pad(self.sample.diff(dim=1) == 0, (0, 1))
            return QueryTokens(*left_align(before, least=1), self.sample)
        if self.sample is not None:
            return QueryTokens(*left_align(self._last_tokens(self.real)), self.sample)
        return QueryTokens(self._last_column(self.real))

    @cached_property
    def readout(self) -> Tensor | None:
        """(B, T) visual tokens that a next token is read from; `None` if there are none.

        Where labels are given, supervised text is read from the token before each span.
        """
        supervised = self.supervised is not None
        last = self._before_spans if supervised else self._last_tokens(self.present)
        last = last & self.visual
        return last if bool(last.any()) else None

    def question_text(self, rows: Sequence[int], ends: Sequence[int]) -> QuestionText:
        """The text of the prompt after images, as far as it is not supervised.

        Args:
            rows: row of each image.
            ends: logical column of each image's last token.
        """
        row, end = (torch.tensor(x, device=self.visual.device) for x in (rows, ends))
        batch, length = self.visual.shape
        first = torch.full((batch,), length, device=row.device).scatter_reduce(0, row, end, "amin")
        text = self._text & (self._order > first[:, None])
        last = self._standing(text, row, end)
        if last is None:
            return QuestionText(*left_align(text), self.sample)
        columns, found = left_align(text | last)
        real, last = (found & mask.gather(1, columns) for mask in (text, last))
        without = tuple(last.any(1).nonzero()[:, 0].tolist())
        return QuestionText(columns, real, self.sample, last, without)

    @property
    def _order(self) -> Tensor:
        """(T) columns."""
        return torch.arange(self.visual.shape[1], device=self.visual.device)

    @property
    def _text(self) -> Tensor:
        """(B, T) text of the prompt: neither visual, padding, supervised nor drafted."""
        text = ~self.visual & (self._order <= self._last_column(self.real))
        text = text if self.supervised is None else text & ~self.supervised
        return text if self.real is None else text & self.real

    @property
    def _before_spans(self) -> Tensor:
        """(B, T) the token before each supervised span."""
        assert self.supervised is not None
        return F.pad(~self.supervised[:, :-1] & self.supervised[:, 1:], (0, 1))

    def _last_column(self, real: Tensor | None) -> Tensor:
        """(B, 1) column of the last token of each row's prompt among (B, T) real ones."""
        order = self._order.expand_as(self.visual)
        last = order[:, -1:] if real is None else (real * order).amax(1, keepdim=True)
        return (last - self.trailing).clamp(min=0)

    def _last_tokens(self, real: Tensor | None) -> Tensor:
        """(B, T) the last token of each prompt among (B, T) real ones."""
        last = torch.zeros_like(self.visual).scatter(1, self._last_column(real), True)
        return last if self.sample is None else last | F.pad(self.sample.diff(dim=1) != 0, (0, 1))

    def _standing(self, text: Tensor, rows: Tensor, ends: Tensor) -> Tensor | None:
        """(B, T) last tokens of prompts that stand for (B, T) text after images that have none;
        `None` if all have some, or labels are given. (G) rows and ends are those of the images.
        """
        if self.supervised is not None:
            return None
        own = _in_sample(self.sample, rows, ends, self._order.expand(len(rows), -1))
        without = ~(text[rows] & own & (self._order > ends[:, None])).any(1)
        if not bool(without.any()):
            return None
        last = self._last_tokens(self.real)[rows] & own
        found = torch.zeros_like(self.visual, dtype=torch.long)
        return found.index_add(0, rows[without], last[without].long()) > 0


@dataclass(frozen=True, eq=False)
class QueryTokens:
    """Query tokens: the tokens whose attention ranks the visual tokens.

    Args:
        columns: (B, Q) logical columns, ascending; short rows repeat their last one.
        real: (B, Q) which of them are query tokens; `None` for all.
        sample: (B, T) which sample of its row each position is of; `None` where rows are samples.
    """

    columns: Tensor
    real: Tensor | None = None
    sample: Tensor | None = None

    def on(self, device: torch.device) -> QueryTokens:
        """The same on a device."""
        return QueryTokens(*_uploaded((self.columns, self.real, self.sample), device))

    def of(self, rows: Tensor, ends: Tensor) -> Tensor:
        """(G, Q) which query tokens rank each of some images: those after it in its sample.

        Args:
            rows: (G) their rows.
            ends: (G) logical column of each one's last token, which may be a query token itself.
        """
        columns = self.columns[rows]
        if self.real is None:  # the last token of each row
            return torch.ones_like(columns, dtype=torch.bool)
        after = self.real[rows] & (columns >= ends[:, None])
        return after & _in_sample(self.sample, rows, ends, columns)


@dataclass(frozen=True, eq=False)
class QuestionText:
    """Question text: the text after images.

    Args:
        columns: (B, Q) logical columns, ascending; short rows repeat their last one.
        real: (B, Q) which of them are text.
        sample: (B, T) which sample of its row each position is of; `None` where rows are samples.
        last: (B, Q) which of them stand for the text where an image has none; `None` for none.
        without: rows in which some image has none.
    """

    columns: Tensor
    real: Tensor
    sample: Tensor | None = None
    last: Tensor | None = None
    without: tuple[int, ...] = ()

    def on(self, device: torch.device) -> QuestionText:
        """The same on a device."""
        columns, real = upload(self.columns, device), upload(self.real, device)
        sample, last = _uploaded((self.sample, self.last), device)
        return QuestionText(columns, real, sample, last, self.without)

    def mask(self, rows: Tensor, ends: Tensor) -> Tensor:
        """(G, Q) which tokens are the question text of each of some images.

        Args:
            rows: (G) their rows.
            ends: (G) logical column of each one's last token.
        """
        columns = self.columns[rows]
        own = _in_sample(self.sample, rows, ends, columns)
        mask = self.real[rows] & own & (columns > ends[:, None])
        if self.last is None:
            return mask
        return mask | (self.last[rows] & own & ~mask.any(1, keepdim=True))

    def paired(self, rows: Tensor, ends: Tensor, nexts: Tensor) -> Tensor:
        """(G, Q) which of these tokens come before the next image, or stand for the text.

        Args:
            rows: (G) rows of some images.
            ends: (G) logical column of each one's last token.
            nexts: (G) that of the next image's last token in the row, or any column after it.
        """
        mask = self.mask(rows, ends)
        before = mask & (self.columns[rows] < nexts[:, None])
        if self.last is None:
            return before
        without = ~(mask & self.real[rows]).any(1, keepdim=True)
        return before | (mask & without)

    @torch.no_grad()
    def embeddings(self, table: nn.Module, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """(B, Q, D) input embeddings.

        Args:
            table: the model's embedding.
            ids: (B, T) token ids, or `None` where the model is given embeddings.
            embeds: (B, T, D) those.
        """
        if ids is not None:
            tokens = self.real if self.last is None else self.real | self.last
            return table(ids.gather(1, self.columns).masked_fill(~tokens, 0))
        assert embeds is not None  # the model needs one of them
        rows = torch.arange(len(embeds), device=embeds.device)[:, None]
        return embeds[rows, self.columns].detach()

    def with_images(
        self,
        embeds: Tensor,
        visual: Tensor,
        rows: Sequence[int],
        ends: Sequence[int],
        features: Sequence[Tensor],
    ) -> Tensor:
        """(B, Q, D) input embeddings, with features where the last token of an image stands for
        text; NaN where the image is not known.

        Args:
            embeds: (B, Q, D) those of tokens, on the device; all else is on the host.
            visual: (B, T) placeholders of all images.
            rows: row of each image that is known.
            ends: logical column of each one's last token.
            features: (V, D) of each one, V being its visual tokens.
        """
        assert self.last is not None  # or no image stands for text
        unknown = self.last & visual.gather(1, self.columns)
        embeds = embeds.masked_fill(upload(unknown[..., None], embeds.device), torch.nan)
        for row, end, of in zip(rows, ends, features, strict=True):
            for token in (unknown[row] & (self.columns[row] == end)).nonzero()[:, 0].tolist():
                embeds[row, token] = of[-1].detach().to(embeds)
        return embeds


@dataclass(frozen=True, eq=False)
class PromptContext:
    """What is known of the prompt when image features are reduced.

    Args:
        images: the images of one modality; of the batch's first row where the prompt is not known.
        source: which image of the encoder each image is.
        question: the text after the images, and its (B, Q, D) embeddings.
        clip: the questions, as CLIP embeds them.
        labelled: whether labels are given; images without question text then stay as they are.
        training: the forward as methods that learn see it, in training.
        room: what rows may hold and hold already, where a conversation has a total.
    """

    images: Sequence[Image]
    source: Sequence[int]
    question: tuple[QuestionText, Tensor] | None = None
    clip: ClipQuestions | None = None
    labelled: bool = False
    training: TrainingPass | None = None
    room: Room | None = None

    @property
    def without_text(self) -> tuple[int, ...]:
        """Rows in which no text follows an image, if no labels are given."""
        return () if self.question is None else self.question[0].without

    def without_query(self, needs: Sequence[Need], group: ImageGroup) -> set[int]:
        """Members without question text, where labels are given and a step reads that text."""
        if not self.labelled or not any(SIGNALS[need.name].text for need in needs):
            return set()
        assert self.question is not None  # reduction waits until the prompt is known
        question = self.question[0]
        has_text = question.mask(*ends_of(group, question.real.device)).any(1).tolist()
        return {i for i, has in enumerate(has_text) if not has}

    def clip_segments(self, group: ImageGroup) -> tuple[Tensor, Tensor]:
        """(G, M, E) segments of the question of each image of a group in CLIP's space, and (G, M)
        which of them are no padding.
        """
        assert self.clip is not None  # the session has checked it
        return self.clip.of([image.request for image in group.images])

    def text_embeddings(self, group: ImageGroup) -> tuple[Tensor, Tensor, Tensor]:
        """(G, Q, D) input embeddings of the text after each image of a group, and (G, Q) masks of
        all the text there is and of what comes before another image.

        Raises:
            InputError: a visual token stands for the text, and its features are not known yet.
        """
        assert self.question is not None  # reduction waits until the prompt is known
        question, embeds = self.question
        following = self._following()
        nexts = [following[image] for image in zip(group.rows, group.ends, strict=True)]
        rows, ends = ends_of(group, embeds.device)
        mask = question.mask(rows, ends)
        text = embeds[rows].masked_fill(~mask[..., None], 0.0)
        if question.last is not None and bool(text.isnan().any()):
            raise InputError(
                "a method compares visual tokens with the text after them, but none follows an "
                "image, and the prompt ends in a visual token that is encoded separately; put text "
                "after the image, or use a method that does not read the prompt"
            )
        return text, mask, question.paired(rows, ends, upload(nexts, embeds.device))

    def _following(self) -> dict[tuple[int, int], int]:
        """(row, end) of an image -> end of the next one in its row."""
        images = sorted((image.row, image.end) for image in self.images)
        return {
            (row, end): after if row == same else torch.iinfo(torch.int64).max
            for (row, end), (same, after) in pairwise([*images, (-1, 0)])
        }


def starts(sample: Tensor) -> Tensor:
    """(B, T) the column at which the sample of each position begins."""
    order = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
    first = F.pad(sample.diff(dim=1) != 0, (1, 0), value=True)
    return (order * first).cummax(1).values


def ends_of(group: ImageGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """(G) rows of a group's images, and (G) logical columns of their last tokens."""
    return upload(group.rows, device), upload(group.ends, device)


def _uploaded(parts: Sequence[Tensor | None], device: torch.device) -> list[Any]:
    return [None if part is None else upload(part, device) for part in parts]


def _in_sample(sample: Tensor | None, rows: Tensor, ends: Tensor, columns: Tensor) -> Tensor:
    """(G, Q) which columns are in the sample of each image; arguments as in `QueryTokens.of`."""
    if sample is None:
        return torch.ones_like(columns, dtype=torch.bool)
    sample = sample[rows]
    return sample.gather(1, columns) == sample.gather(1, ends[:, None])
