"""The text after each image of a forward, which stands for what is asked of it.

Where no text follows an image, the last token of its prompt does.
Shapes: `B` rows, `T` logical length, `Q` text tokens after the first image of a row, at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class QuestionText:
    """Columns of the text after images.

    Args:
        columns: (B, Q) logical columns, ascending; padding repeats some column.
        real: (B, Q) which of them are no padding.
        sample: (B, T) which sample of its row each position is of; `None` where rows are samples.
        last: (B, Q) which of them stand for the text where an image has none; `None` for none.
        without: rows in which some image has none.
    """

    columns: Tensor
    real: Tensor
    sample: Tensor | None = None
    last: Tensor | None = None
    without: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        visual: Tensor,
        real: Tensor | None,
        trailing: int,
        rows: Sequence[int],
        ends: Sequence[int],
        sample: Tensor | None = None,
        last: Tensor | None = None,
    ) -> QuestionText:
        """The question of a forward.

        Args:
            visual: (B, T) placeholders of all images.
            real: (B, T) positions that can ask: no padding, not supervised; `None` for all.
            trailing: drafted tokens after the prompt.
            rows: row of each image.
            ends: logical column of each image's last token.
            sample: as in the class.
            last: (B, T) last token of each prompt; `None` where images without text have no
                question.
        """
        batch, length = visual.shape
        order = torch.arange(length, device=visual.device)
        first = [length] * batch
        for row, end in zip(rows, ends, strict=True):
            first[row] = min(first[row], end)
        behind = ~visual & (order > torch.tensor(first, device=visual.device)[:, None])
        if real is not None:
            behind &= real
        if trailing:
            newest = length - 1 if real is None else (order * real).amax(1, keepdim=True)
            behind &= order <= newest - trailing
        asks, without = behind, ()
        stands = None if last is None else _standing(behind, last, rows, ends, sample)
        if stands is not None:
            asks, without = behind | stands, tuple(stands.any(1).nonzero()[:, 0].tolist())
        width = int(asks.sum(1).max())
        columns = (~asks).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        found = None if stands is None else stands.gather(1, columns)
        return cls(columns, behind.gather(1, columns), sample, found, without)

    def mask(self, rows: Tensor, ends: Tensor) -> Tensor:
        """(G, Q) which tokens are the question of each of some images.

        Args:
            rows: (G) their rows.
            ends: (G) logical column of each one's last token.
        """
        columns = self.columns[rows]
        own = torch.ones_like(self.real[rows])
        if self.sample is not None:
            sample = self.sample[rows]
            own = sample.gather(1, columns) == sample.gather(1, ends[:, None])
        mask = self.real[rows] & own & (columns > ends[:, None])
        if self.last is None:
            return mask
        return mask | (self.last[rows] & own & ~mask.any(1, keepdim=True))

    def paired(self, rows: Tensor, ends: Tensor, nexts: Tensor) -> Tensor:
        """(G, Q) which tokens come before another image does, or stand for the text.

        Args:
            rows: (G) rows of some images.
            ends: (G) logical column of each one's last token.
            nexts: (G) that of the next image's last token in the row, or any column after it.
        """
        mask = self.mask(rows, ends)
        before = mask & (self.columns[rows] < nexts[:, None])
        if self.last is None:
            return before
        none = ~(mask & self.real[rows]).any(1, keepdim=True)
        return before | (mask & none)

    @torch.no_grad()
    def embeddings(self, table: nn.Module, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """(B, Q, D) input embeddings.

        Args:
            table: the model's embedding.
            ids: (B, T) token ids, or `None` where the model is given embeddings.
            embeds: (B, T, D) those.
        """
        if ids is not None:
            asks = self.real if self.last is None else self.real | self.last
            return table(ids.gather(1, self.columns).masked_fill(~asks, 0))
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
            embeds: (B, Q, D) those of tokens.
            visual: (B, T) placeholders of all images.
            rows: row of each image that is known.
            ends: logical column of each one's last token.
            features: (V, D) of each one.
        """
        assert self.last is not None  # or no image stands for text
        unknown = self.last & visual.gather(1, self.columns)
        embeds = embeds.masked_fill(unknown[..., None].to(embeds.device), torch.nan)
        for row, end, of in zip(rows, ends, features, strict=True):
            place = (unknown[row] & (self.columns[row] == end)).nonzero()[:, 0]
            embeds[row, place.to(embeds.device)] = of[-1].detach().to(embeds)
        return embeds


def _standing(
    text: Tensor, last: Tensor, rows: Sequence[int], ends: Sequence[int], sample: Tensor | None
) -> Tensor | None:
    """(B, T) last tokens of prompts that stand for the text after images that have none; `None` if
    all have some.

    Args:
        text: (B, T) text after the first image of each row.
        last: (B, T) last token of each prompt.
        rows: row of each image.
        ends: logical column of each one's last token.
        sample: (B, T) which sample of its row each position is of.
    """
    of = torch.tensor(rows, device=text.device)
    end = torch.tensor(ends, device=text.device)[:, None]
    own = torch.ones_like(text[of])
    if sample is not None:
        own = sample[of] == sample[of].gather(1, end)
    after = torch.arange(text.shape[1], device=text.device) > end
    none = ~(text[of] & own & after).any(1)
    if not bool(none.any()):
        return None
    stands = torch.zeros(text.shape, dtype=torch.long, device=text.device)
    return stands.index_add(0, of[none], (last[of] & own)[none].long()) > 0
