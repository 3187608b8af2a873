"""Families that foveate knows and refuses, each with its reason.

Those that are only not supported yet say what they need; the others have nothing to remove, or keep
it where foveate does not act.
"""

from __future__ import annotations

_YET = "so it is not supported yet: it needs"
_NO_ROTARY = f"its full-attention layers are handed no rotary positions, {_YET} layers without them"
_INDEXED = (
    f"its attention chooses what to read by an index of keys beside the cache, {_YET} a cache that "
    "shortens both"
)
_INKLING = (
    f"its attention takes positions from the length of its own cache layers, {_YET} those layers "
    "told where each slot stood"
)
_QUERIES = (
    "its images are 32 tokens of a Q-Former each, of which there is next to nothing to remove"
)
_CROSS = "its visual tokens are not in the sequence: the text model reads them by cross-attention"
_MEMORY = "its images are what a decoder reads by cross-attention, and not in a sequence with text"
_WITHIN = "its visual tokens are placed within the text model, and not before it"

UNSUPPORTED: dict[str, str] = {
    "blip": _MEMORY,
    "blip-2": _QUERIES,
    "chameleon": f"its text model is the base model too, {_YET} one that places images by itself",
    "diffusion_gemma": f"its decoder fills blocks of text at once and reads the cache of another "
    f"model, {_YET} masks that know what is gone from there",
    "dots3_note": _INDEXED,
    "emu3": f"its images are codes of a vocabulary with ends of rows, {_YET} a grid of those",
    "ernie4_5_vl_moe": f"its decoder layers are told the kind of every token, {_YET} arguments by "
    "token that shorten with the sequence",
    "evolla": "its text model reads proteins, and no images",
    "florence2": f"its images stand in an encoder that a decoder reads, {_YET} removal in encoders "
    "of text",
    "fuyu": f"its patches have no encoder and no features of their own in its output, {_YET} "
    "features found elsewhere",
    "gemma4_unified": f"its last decoder layers may reuse keys of earlier ones, {_YET} layers "
    "without a cache",
    "git": _WITHIN,
    "glm5_next": _INDEXED,
    "idefics": _CROSS,
    "inkling2": _INKLING,
    "inkling_mm_model": _INKLING,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "kimi_vl": "its code comes with the checkpoint and is no part of transformers, so that foveate "
    "cannot be tested on it",
    "kosmos-2": _WITHIN,
    "kosmos-2.5": _WITHIN,
    "llama4": f"its layers take rotary positions as one complex tensor, and there is no base model "
    f"between the text model and its head, {_YET} both",
    "minimax_m3_vl": f"its sparse layers read blocks of cache slots, {_YET} a cache that keeps "
    "blocks where they were",
    "mistral4": "its config has no vision encoder: it is a text model",
    "mistral_large4": _INDEXED,
    "mllama": _CROSS,
    "muse_glimmer": _NO_ROTARY,
    "muse_spark": _NO_ROTARY,
    "nemotron_h_omni": f"its text model has Mamba layers and no base model around it, {_YET} both",
    "phi4_multimodal": f"its vision encoder is a part of the text model's embedding, {_YET} "
    "removal after that",
    "pi0": "its action expert reads the cache of the prompt with a mask of its full length, "
    f"{_YET} masks that know what is gone from there",
    "pix2struct": _MEMORY,
    "pp_formulanet": _MEMORY,
    "qwen4_exp": f"its text model has recurrent layers, reads indexed keys and mixes the ids of "
    f"neighbours into every token, {_YET} all of these shortened together",
    "t5gemma2": f"its images stand in an encoder that a decoder reads, {_YET} removal in encoders "
    "of text",
    "udop": f"its patches and its text share an encoder that a decoder reads, {_YET} removal in "
    "encoders of text",
    "unlimited_ocr": f"its cache layers keep the prompt and a window after it, {_YET} such layers "
    "that hold fewer slots",
    "vision-encoder-decoder": _MEMORY,
}


def unsupported_families() -> dict[str, str]:
    """Model types (`config.model_type`) that are refused, sorted, with the reason."""
    return dict(sorted(UNSUPPORTED.items()))
