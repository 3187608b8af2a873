"""Attention kernels of the text model: which can be served, and what masks they take."""

from __future__ import annotations

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

from foveate.errors import UnsupportedModelError
from foveate.families.text_facts import TextFacts


def check_kernel(family: TextFacts) -> None:
    """Refuse attention kernels that cannot be served.

    Args:
        family: a text model, or an expert that reads its cache.

    Raises:
        UnsupportedModelError: continuous batching, or flex attention.
    """
    kernel = family.text.config._attn_implementation
    if "paged" in kernel:
        raise UnsupportedModelError(
            "continuous batching pages its cache by full sequence length and cannot hold pruned "
            "layers; "
            "use model.generate"
        )
    if kernel == "flex_attention":
        raise UnsupportedModelError(
            "flex_attention is not supported; call model.set_attn_implementation('sdpa') first"
        )


def takes_2d_masks(kernel: str) -> bool:
    """Whether an attention kernel takes (B, T) masks, as flash attention does."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(kernel) is flash_attention_mask
