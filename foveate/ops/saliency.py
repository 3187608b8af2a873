"""Saliency: how much the vision encoder attends to each patch in the layer that is read.

Shapes: `G` images of equal size, `V` tokens of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.method import Method
from foveate.core.step import ModelFacts, Need, Step
from foveate.core.tokens import VisualTokens

SIGNALS = (Need("cls_attention").name, Need("received_attention").name)
"""What saliency is made of: the first where the encoder has a class token, else the second."""


def saliency_need(model: ModelFacts) -> Need:
    """What a step needs for `saliency`."""
    return Need(SIGNALS[0] if model.class_token else SIGNALS[1], (model.feature_layer,))


class Salient(Method):
    """A method that chooses by `saliency`, once, before the language model. Shares of a budget are
    rounded half to even.
    """

    rounding = round

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector, scored in the layer that the language model sees."""
        return (Step("pre_llm", needs=(saliency_need(model),)),)


def saliency(tokens: VisualTokens, among_patches: bool = False) -> Tensor:
    """(G, V) attention that each patch gets, in float32 at least.

    With a class token it is that token's, the mean over heads; else what all tokens give, the mean
    over heads and queries. Tokens that are no patches, such as newlines, have minus infinity.

    Args:
        tokens: shown to a step that has the need.
        among_patches: whether each head's attention is taken as shares of what it gives to patches.
    """
    if SIGNALS[0] not in tokens.signals:
        return _exact(tokens.signal(SIGNALS[1])[:, 0])
    seen = _exact(tokens.signal(SIGNALS[0])[:, 0])
    if among_patches:
        total = seen.clamp(min=0).sum(-1, keepdim=True)
        seen = seen / total.masked_fill(total == 0, 1)
    return seen.mean(1)


def _exact(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()
