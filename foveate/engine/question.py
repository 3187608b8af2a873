"""The text behind each image of a forward, which stands for what is asked of it.

Shapes: `B` rows, `T` logical length, `Q` text tokens behind the first image of a row, at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Question:
    """Columns of the text behind images.

    Args:
        columns: (B, Q) logical columns, ascending; padding repeats some column.
        real: (B, Q) which of them are no padding.
        sample: (B, T) which sample of its row each position is of; `None` where rows are samples.
    """

    columns: Tensor
    real: Tensor
    sample: Tensor | None = None

    @classmethod
    def of(
        cls,
        visual: Tensor,
        real: Tensor | None,
        trailing: int,
        rows: Sequence[int],
        ends: Sequence[int],
        sample: Tensor | None = None,
    ) -> Question:
        """The question of a forward.

        Args:
            visual: (B, T) placeholders of all images.
            real: (B, T) positions that can ask: no padding, not supervised; `None` for all.
            trailing: drafted tokens behind the prompt.
            rows: row of each image.
            ends: logical column of each image's last token.
            sample: as in the class.
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
            last = length - 1 if real is None else (order * real).amax(1, keepdim=True)
            behind &= order <= last - trailing
        width = int(behind.sum(1).max())
        columns = (~behind).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        return cls(columns, behind.gather(1, columns), sample)

    def mask(self, rows: Tensor, ends: Tensor) -> Tensor:
        """(G, Q) which tokens are the question of each of some images.

        Args:
            rows: (G) their rows.
            ends: (G) logical column of each one's last token.
        """
        columns = self.columns[rows]
        mask = self.real[rows] & (columns > ends[:, None])
        if self.sample is not None:
            sample = self.sample[rows]
            mask &= sample.gather(1, columns) == sample.gather(1, ends[:, None])
        return mask

    def paired(self, rows: Tensor, ends: Tensor, nexts: Tensor) -> Tensor:
        """(G, Q) which tokens come before another image does.

        Args:
            rows: (G) rows of some images.
            ends: (G) logical column of each one's last token.
            nexts: (G) that of the next image's last token in the row, or any column behind it.
        """
        return self.mask(rows, ends) & (self.columns[rows] < nexts[:, None])

    @torch.no_grad()
    def embeddings(self, table: nn.Module, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """(B, Q, D) input embeddings.

        Args:
            table: the model's embedding.
            ids: (B, T) token ids, or `None` where the model is given embeddings.
            embeds: (B, T, D) those.
        """
        if ids is not None:
            return table(ids.gather(1, self.columns).masked_fill(~self.real, 0))
        assert embeds is not None  # the model needs one of them
        rows = torch.arange(len(embeds), device=embeds.device)[:, None]
        return embeds[rows, self.columns].detach()
