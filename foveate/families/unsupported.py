"""Families that foveate knows and refuses, each with its reason.

Those that are only not supported yet say what they need; the others have nothing to remove, or keep
it where foveate does not act, or in a map without holes.
"""

from __future__ import annotations

_YET = "so it is not supported yet: it needs"
_INKLING = (
    f"its attention numbers keys and queries by the length of its cache layers, which also hold "
    f"states of convolutions, {_YET} such layers told where each slot stood"
)
_QUERIES = (
    "its Q-Former makes 32 tokens of an image by default, of which there is next to nothing to "
    "remove"
)
_CROSS = "its visual tokens are not in the sequence: the text model reads them by cross-attention"
_MEMORY = (
    "its visual tokens are what an encoder makes and a decoder reads by cross-attention: they are "
    "not in a sequence with text"
)
_WITHIN = (
    f"its text model puts visual tokens in the sequence itself, {_YET} removal within the text "
    "model after that"
)
_ENCODED = (
    f"its visual tokens stand in the sequence of an encoder, which a decoder reads, {_YET} removal "
    "in encoders of text"
)
_HOLES = "and a map has no room for a token that is gone"
_MAP = (
    "layers keep patches in a map of rows and columns, which they may cut into windows of one "
    f"size, {_HOLES}"
)
_SWIN = (
    "its layers cut a map of patches into windows of one size, with a bias for each two places of "
    f"a window, and its stages merge neighbours, {_HOLES}"
)

UNSUPPORTED: dict[str, str] = {
    "blip": _CROSS,
    "blip-2": _QUERIES,
    "diffusion_gemma": f"its decoder fills blocks of text at once and reads the cache of its "
    f"encoder with a mask of the full prompt, {_YET} masks that know what is gone from there",
    "evolla": "its text model reads proteins, and no images",
    "florence2": _ENCODED,
    "fuyu": f"its features come as last_hidden_state, and one matrix makes queries, keys and "
    f"values of head after head, {_YET} features and projections found there",
    "git": f"its images have no placeholders in the prompt, as the model itself puts them before "
    f"the text, {_YET} positions of tokens without ids",
    "glm5_next": f"its indexed layers read pools of neighbouring cache slots and count queries by "
    f"the length of the cache, {_YET} pools of the slots that are left",
    "hy_v4_vl": f"its layers may attend to slots that the indexer of an earlier layer has chosen, "
    f"{_YET} removal only before layers with an indexer of their own",
    "idefics": _CROSS,
    "inkling2": _INKLING,
    "inkling2_loop": _INKLING,
    "inkling_mm_model": _INKLING,
    "instructblip": _QUERIES,
    "instructblipvideo": f"its Q-Former makes 32 tokens of each of four frames by default, and its "
    f"text model comes with a head, {_YET} a base model around a text model without one",
    "kimi_vl": "its code comes with the checkpoint and is no part of transformers, so that foveate "
    "cannot be tested on it",
    "kosmos-2": _WITHIN,
    "kosmos-2.5": _WITHIN,
    "mistral4": "its config has no vision encoder: it is a text model",
    "mistral_large4": f"its layers may read the keys of an earlier layer, and slots that another "
    f"has chosen, {_YET} removal only before layers with both of their own",
    "mllama": _CROSS,
    "pix2struct": _MEMORY,
    "pp_formulanet": _MEMORY,
    "qwen4_exp": f"its indexed layers are handed rotary positions of the whole cache, which the "
    f"text model keeps beside the keys, {_YET} those of the slots that are left",
    "sam": f"its encoder's {_MAP}",
    "sam_vision_model": f"its {_MAP}",
    "segformer": f"its layers shrink keys and mix neighbours by convolutions over a map of "
    f"patches, {_HOLES}",
    "swin": _SWIN,
    "swinv2": _SWIN,
    "t5gemma2": _ENCODED,
    "timesformer": "its layers attend among the patches of one place in all frames, and then "
    "within each frame, and expect a patch at every place of every frame",
    "udop": f"its encoder, which a decoder reads, adds patches to the words that lie on them and "
    f"puts the others after the text, {_YET} removal in encoders of text",
    "vision-encoder-decoder": _MEMORY,
    "vitdet": f"its {_MAP}",
    "vitmatte": f"its backbone is ViTDet by default, whose {_MAP}",
}


def unsupported_families() -> dict[str, str]:
    """Model types (`config.model_type`) that are refused, sorted, with the reason."""
    return dict(sorted(UNSUPPORTED.items()))
