"""Relevance: how much visual tokens have to do with the text of the question.

Shapes: `G` images, `V` visual tokens of each, `Q` text tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.core import Need, VisualTokens
from foveate.ops.diversity import normalize, with_lengths

Relevance = Literal["embeddings", "clip"]
"""In which space: `embeddings` compares visual tokens with the text after their image, both as the
language model is given them; `clip` compares patches with the question in CLIP's, see
`foveate.ClipText`."""


def relevance_needs(relevance: Relevance, patches: Need) -> tuple[Need, ...]:
    """Signals that relevance is worked out from.

    Args:
        relevance: the space.
        patches: the patches in CLIP's space.
    """
    if relevance == "clip":
        return patches, Need("clip_questions")
    return (Need("question_embeddings"),)


def token_relevance(tokens: VisualTokens, relevance: Relevance, patches: str) -> tuple[Tensor, int]:
    """(G, V) mean cosine of each token to the text of its image, zero where it has none; and the
    width of the space.

    Args:
        tokens: with the signals of `relevance_needs`.
        relevance: the space.
        patches: name of the patches in CLIP's space.
    """
    if relevance == "clip":
        x = tokens.signal(patches)[:, 0]
        text, mask = tokens.signal("clip_questions"), tokens.signal("clip_questions_mask")
    else:
        x = tokens.x
        text, mask = tokens.signal("question_embeddings"), tokens.signal("question_mask")
    return similarity_to_text(x, text, mask), x.shape[-1]


def similarity_to_text(x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine of each token to the text tokens of its image.

    Args:
        x: (G, V, D) token values.
        text: (G, Q, D) text tokens; rows outside the mask may hold anything.
        mask: (G, Q) which of them are no padding.

    Returns:
        (G, V), in float32 or better; zero where an image has no text.
    """
    question = normalize(text).masked_fill(~mask[..., None], 0.0).sum(1)
    question = question / mask.sum(1, keepdim=True).clamp(min=1)
    x, length = with_lengths(x)
    return (torch.matmul(x, question[..., None].to(x)) / length)[..., 0]
