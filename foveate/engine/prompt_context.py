"""What is known of the prompt when image features are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from foveate.core import Need
from foveate.engine.images import Image, ImageGroup
from foveate.engine.question import QuestionText
from foveate.errors import InputError
from foveate.signals import SIGNALS
from foveate.signals.clip import ClipQuestions


@dataclass(frozen=True, eq=False)
class PromptContext:
    """What is known of the prompt when features are reduced.

    Args:
        images: the images of one modality; of the batch's first row where the prompt is not known.
        source: which image of the encoder each image is.
        question: the text after the images, and its (B, Q, D) embeddings.
        clip: what is asked, as CLIP embeds it.
        labelled: whether labels say what is asked; images about which nothing is asked then stay as
            they are.
    """

    images: Sequence[Image]
    source: Sequence[int]
    question: tuple[QuestionText, Tensor] | None = None
    clip: ClipQuestions | None = None
    labelled: bool = False

    @property
    def without_text(self) -> tuple[int, ...]:
        """Rows in which no text follows an image, and none of it is supervised."""
        return () if self.question is None else self.question[0].without

    def unasked(self, needs: Sequence[Need], group: ImageGroup) -> set[int]:
        """Members of a group about which nothing is asked that a step needs to know."""
        if not self.labelled or not any(SIGNALS[need.name].text for need in needs):
            return set()
        assert self.question is not None  # reduction waits until the prompt is known
        question = self.question[0]
        where = (torch.tensor(x, device=question.real.device) for x in (group.rows, group.ends))
        asked = question.mask(*where).any(1).tolist()
        return {i for i, asks in enumerate(asked) if not asks}

    def clip_segments(self, part: ImageGroup) -> tuple[Tensor, Tensor]:
        """(G, M, E) segments of the question of each image of a group in CLIP's space, and (G, M)
        which of them are no padding.
        """
        assert self.clip is not None  # the session has checked it
        return self.clip.of([image.request for image in part.images])

    def text_embeddings(self, part: ImageGroup) -> tuple[Tensor, Tensor, Tensor]:
        """(G, Q, D) input embeddings of the text after each image of a group, and (G, Q) masks of
        all the text there is and of what comes before another image.
        """
        assert self.question is not None  # reduction waits until the prompt is known
        question, embeds = self.question
        following = self._following()
        nexts = [following[place] for place in zip(part.rows, part.ends, strict=True)]
        rows, ends, after = (
            torch.tensor(values, device=embeds.device) for values in (part.rows, part.ends, nexts)
        )
        mask = question.mask(rows, ends)
        text = embeds[rows].masked_fill(~mask[..., None], 0.0)
        if question.last is not None and bool(text.isnan().any()):
            raise InputError(
                "a method compares visual tokens with the text after them, but none follows an "
                "image, and the prompt ends in a visual token that is encoded apart from it; put "
                "text after the image, or use a method that does not look at the prompt"
            )
        return text, mask, question.paired(rows, ends, after)

    def _following(self) -> dict[tuple[int, int], int]:
        """(row, end) of an image -> end of the next one in its row."""
        places = sorted((image.row, image.end) for image in self.images)
        return {
            (row, end): after if row == same else torch.iinfo(torch.int64).max
            for (row, end), (same, after) in pairwise([*places, (-1, 0)])
        }
