"""Find the heads that look at the image: YOPO's head mask.

Paper: Zhang et al., arXiv:2410.06169; the method itself is `foveate.methods.yopo`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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

    Text tokens after the image attend to visual tokens and to text. A sample votes for a head if
    the attention to visual tokens exceeds `threshold` times that to text. The head stays if more
    than `share` of the samples vote for it. Which queries count is our reading of the paper.

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
    votes: list[Tensor] = []
    with _eager(model.get_decoder()):
        for inputs in samples:
            maps = model(**inputs, output_attentions=True).attentions
            visual = inputs["input_ids"] == model.config.image_token_id
            votes += [_ratios(maps, row, seen) > threshold for row, seen in enumerate(visual)]
    if not votes:
        raise FoveateError("head_mask needs at least one calibration prompt")
    stays = torch.stack(votes).double().mean(0) > share
    stays[:always] = True
    return tuple(tuple(layer) for layer in stays.tolist())


@contextmanager
def _eager(text: Any) -> Iterator[None]:
    """While open, a text model runs the attention kernel that returns maps."""
    kernel = text.config._attn_implementation
    text.set_attn_implementation("eager")
    try:
        yield
    finally:
        text.set_attn_implementation(kernel)


def _ratios(maps: tuple[Tensor, ...], row: int, visual: Tensor) -> Tensor:
    """(L, H) attention to visual tokens over that to text, of the text after the image."""
    first = int(visual.nonzero()[-1]) + 1
    rows = torch.stack([layer[row, :, first:].float() for layer in maps])
    seen = rows[..., visual].sum((2, 3))
    return seen / rows[..., ~visual].sum((2, 3))
