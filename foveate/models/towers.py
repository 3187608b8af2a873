"""Vision towers that several families share: where their layers and class tokens are."""

from __future__ import annotations

from foveate.models.family import Encoder, Family
from foveate.models.plain import tower_encoder

# vision_config.model_type -> layers, attention of a layer, and its queries and keys if row 0 is a
# class token
TOWERS: dict[str, tuple[str, str, tuple[str, str] | None]] = {
    "clip_vision_model": ("encoder.layers", "self_attn", ("q_proj", "k_proj")),
    "idefics3_vision": ("encoder.layers", "self_attn", None),
    "internvl_vision": ("encoder.layer", "attention", ("q_norm", "k_norm")),
    "ovis2_vision": ("transformer.encoder.layers", "attention", None),
    "pixtral": ("transformer.layers", "attention", None),
    "siglip_vision_model": ("encoder.layers", "self_attn", None),
    "smolvlm_vision": ("encoder.layers", "self_attn", None),
}


def tower(family: Family, path: str) -> Encoder | None:
    """The vision tower of a family, or `None` if its kind is not known.

    Args:
        family: the family.
        path: where the tower is in the base model.
    """
    vision = family.config.vision_config
    if family.patches_are_tokens:
        inside = tower_encoder(family._child(family.base, path))
        if inside is not None:
            return inside
    if vision.model_type not in TOWERS:
        return None
    layers, attention, projections = TOWERS[vision.model_type]
    return Encoder(
        layers=family._child(family.base, f"{path}.{layers}"),
        attention=lambda layer: getattr(layer, attention),
        heads=vision.num_attention_heads,
        class_token=projections is not None,
        projections=projections or ("q_proj", "k_proj"),
        plain=vision.model_type != "pixtral",  # it rotates positions and packs images
    )
