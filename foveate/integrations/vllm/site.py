"""Site: where things are in a model of vLLM, and what its items are to foveate's family.

An item is what vLLM encodes and caches as one: an image or a video of a request. The family may
take it for several images, such as tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, ClassVar

import torch

from foveate.core.tokens import Shape
from foveate.families import Encoder, Family


class Site:
    """Base of all sites; subclasses say only what differs from LLaVA-1.5."""

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    whole_tower: ClassVar[bool] = False
    """Whether vLLM loads layers of the vision tower that the language model does not see."""
    layers: ClassVar[str] = "vision_tower.vision_model.encoder.layers"
    attention: ClassVar[str] = "self_attn"
    projections: ClassVar[tuple[str, ...]] = ("qkv_proj",)
    projector: ClassVar[str] = "multi_modal_projector"

    def check(self, config: Any) -> None:
        """Refuse a model that shares the architecture, but not the layout.

        Args:
            config: the model's config.

        Raises:
            UnsupportedModelError: it is such a model.
        """

    def modality(self, modality: str) -> str:
        """What the family takes a modality of vLLM for."""
        return modality

    def shapes(self, family: Family, modality: str, total: int) -> list[Shape]:
        """What the family takes an item for.

        Args:
            family: the model.
            modality: `image` or `video`.
            total: visual tokens of the item.
        """
        return family.shapes(modality, [torch.empty(total, 1, device="meta")], {})

    def arguments(self, modality: str, kwargs: Mapping[str, Any], item: int) -> dict[str, Any]:
        """What the family is told that an item's features were made from.

        Args:
            modality: `image` or `video`.
            kwargs: what vLLM calls the model with, for all items of a batch.
            item: which of them.
        """
        return {}

    def calls(self, modality: str, kwargs: Mapping[str, Any]) -> list[int]:
        """Images, tiles or frames of each item that go through the tower; all of an item's follow
        one another.

        Args:
            modality: `image` or `video`.
            kwargs: what vLLM calls the model with, for all items of a batch.
        """
        return [1] * len(kwargs["pixel_values"])

    def fed(self, family: Family, arguments: Mapping[str, Any], calls: int) -> int:
        """How many of an item's tiles are real; padding comes after them."""
        return calls

    def encoder(self, model: Any, family: Family) -> Encoder:
        """VLLM's vision tower, as hooks read it."""
        assert family.encoder is not None  # as the plan has checked
        return Encoder(
            layers=attrgetter(self.layers)(model),
            attention=attrgetter(self.attention),
            heads=family.encoder.heads,
            class_token=family.encoder.class_token,
            extra=family.encoder.extra,
            projections=self.projections,
        )
