"""Signals of the prompt: what steps before the language model can ask for besides the encoder.

Shapes as in `signal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.signals.signal import PromptContext, PromptSignal, define


@define(PromptSignal, "of_prompt", clip=True)
def clip_questions(prompt: PromptContext, images: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """(G, M, E), and (G, M) `clip_questions_mask`: segments of the question in CLIP's space."""
    segments, mask = prompt.clip_segments(images)
    return segments, {"clip_questions_mask": mask}


@define(PromptSignal, "of_prompt", text=True, depends_on_prompt=True)
def question_embeddings(prompt: PromptContext, images: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """(G, Q, D), and (G, Q) `question_mask`: input embeddings of the text after the image;
    `paired_mask` is that of the text before the next image.
    """
    text, mask, paired = prompt.text_embeddings(images)
    return text, {"question_mask": mask, "paired_mask": paired}
