"""Find the heads that look at the image: YOPO's head mask.

Paper: Zhang et al., arXiv:2410.06169; the method itself is `foveate.methods.yopo`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError


@torch.no_grad()
def head_mask(
    model: Any,
    samples: Iterable[Mapping[str, Tensor]],
    threshold: float = 0.035,
    share: float = 0.4,
    always: int = 2,
) -> tuple[tuple[bool, ...], ...]:
    """Find the heads that look at the image, on calibration prompts.

    In each sample a head votes to stay where the attention that text tokens after the image pay to
    visual tokens exceeds `threshold` times what they pay to text (which queries count is our
    reading). It stays if more than `share` of the samples vote for it.

    Args:
        model: a vision-language model whose attention maps can be had with the eager kernel.
        samples: model inputs, each with an image; prompts without padding, of any batch size.
        threshold: least ratio of attention to visual tokens over attention to text; published for
            40 layers: 0.035, 0.077 and 0.2, for more and more pruned heads.
        share: of the votes that a head needs.
        always: first layers in which all heads stay.

    Returns:
        For each decoder layer, whether each head stays: `YOPO(heads=...)`.

    Raises:
        FoveateError: there are no samples.
    """
    text = model.get_decoder()
    kernel = text.config._attn_implementation
    votes: list[Tensor] = []
    text.set_attn_implementation("eager")
    try:
        for inputs in samples:
            maps = model(**inputs, output_attentions=True).attentions
            visual = inputs["input_ids"] == model.config.image_token_id
            votes += [_ratios(maps, row, seen) > threshold for row, seen in enumerate(visual)]
    finally:
        text.set_attn_implementation(kernel)
    if not votes:
        raise FoveateError("head_mask needs at least one calibration prompt")
    stays = torch.stack(votes).double().mean(0) > share
    stays[:always] = True
    return tuple(tuple(layer) for layer in stays.tolist())


def _ratios(maps: tuple[Tensor, ...], row: int, visual: Tensor) -> Tensor:
    """(L, H) attention to visual tokens over that to text, of the text after the image."""
    first = int(visual.nonzero()[-1]) + 1
    rows = torch.stack([layer[row, :, first:].float() for layer in maps])
    seen = rows[..., visual].sum((2, 3))
    return seen / rows[..., ~visual].sum((2, 3))
