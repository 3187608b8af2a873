"""Families that foveate knows and refuses, each with its reason."""

from __future__ import annotations

_SHARED = (
    "its last decoder layers reuse the keys of earlier ones, so tokens cannot be removed in between"
)
_PER_LAYER = "its decoder layers take inputs of their own for every token, and " + _SHARED
UNSUPPORTED: dict[str, str] = {
    "gemma3n": _PER_LAYER,
    "gemma4_unified": _SHARED,
    "kimi_vl": "its code comes with the checkpoint and is no part of transformers, so that foveate "
    "cannot be tested on it",
    "llama4": "its attention works in chunks of the sequence, and its layers take rotary "
    "positions as one complex tensor, which the engine cannot shorten",
    "mllama": "its visual tokens are not in the sequence: the text model reads them by "
    "cross-attention",
    "phi4_multimodal": "its vision encoder is a part of the text model's embedding, so there is "
    "no site between the two at which tokens could be removed",
}


def unsupported_families() -> dict[str, str]:
    """Model types (`config.model_type`) that are refused, sorted, with the reason."""
    return dict(sorted(UNSUPPORTED.items()))
