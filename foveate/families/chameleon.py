"""Chameleon: codes of a VQ-VAE, embedded like words. The text model is the base model too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.families.codes import Codes
from foveate.families.family import register_family


@register_family("chameleon")
class Chameleon(Codes):
    """`ChameleonForConditionalGeneration` and `ChameleonModel`."""

    text_path = ""
    whole_head = "a Chameleon takes codes of images out of the logits of whole rows"

    def with_embeddings(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with embeddings, and the features in their places, in place of ids and
        images.
        """
        given = {"input_ids", "pixel_values", "mm_encoder_outputs"}
        rest = {name: value for name, value in arguments.items() if name not in given}
        encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None and arguments.get("pixel_values") is not None:
            encoded = self.base.get_image_features(arguments["pixel_values"], return_dict=True)
        ids = arguments["input_ids"]
        embeds = self.text.embed_tokens(ids)
        if encoded is not None:
            rows = encoded.pooler_output.to(embeds.device, embeds.dtype)
            places = self.text.get_placeholder_mask(ids, embeds, rows)
            embeds = embeds.masked_scatter(places, rows)
        return {**rest, "inputs_embeds": embeds}
