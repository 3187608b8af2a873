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
from foveate.integrations.vllm.signals import Hooks
from foveate.signals.encoder_hooks import EncoderSignals


class Site:
    """Base of all sites; subclasses say only what differs from LLaVA-1.5."""

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    whole_tower: ClassVar[bool] = False
    """Whether vLLM loads layers of the vision tower that the language model does not see."""
    shares_items: ClassVar[bool] = False
    """Whether each worker encodes some of the items where `mm_encoder_tp_mode` is `data`."""
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

    def layout(self, modality: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """What the family is told that says where an item's tokens lie.

        Args:
            modality: `image` or `video`.
            data: what vLLM's processor has made of the item.
        """
        return {}

    def interleaved(self, modality: str) -> bool:
        """Whether text stands between the tokens of an item, at places that depend on which of
        them survive; the model places that text together with them.
        """
        return False

    def width(self, model: Any, columns: int) -> int:
        """How many columns of what vLLM makes of a token are placed in the prompt; the others are
        planes that are added to it later (DeepStack).
        """
        return columns

    def shapes(
        self, family: Family, modality: str, total: int, layout: Mapping[str, Any]
    ) -> list[Shape]:
        """What the family takes an item for.

        Args:
            family: the model.
            modality: `image` or `video`.
            total: visual tokens of the item.
            layout: as `layout` has it.
        """
        return family.shapes(modality, [torch.empty(total, 1, device="meta")], layout)

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

    def signals(
        self, model: Any, family: Family, wanted: Mapping[str, tuple[int, ...]], threshold: float
    ) -> EncoderSignals:
        """What collects signals of vLLM's vision tower while it runs."""
        return EncoderSignals(self.encoder(model, family), wanted, threshold=threshold)

    def hooks(self, model: Any) -> Hooks:
        """What these signals are attached with."""
        return Hooks()

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
