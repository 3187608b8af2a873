"""ColPali, ColQwen2 and ColModernVBERT: every token of a page becomes an embedding of its index.

Papers: Faysse et al., "ColPali: Efficient Document Retrieval with Vision Language Models",
arXiv:2407.01449; Teiletche et al., "ModernVBERT: Towards Smaller Visual Document Retrievers",
arXiv:2510.01149. Each holds a whole vision-language model, `vlm`, whose last states it projects and
norms; it generates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.family import Family, register_family
from foveate.families.idefics3 import Idefics3
from foveate.families.paligemma import PaliGemma
from foveate.families.qwen2_vl import Qwen2VL


class Retriever(Family):
    """Base of families around a vision-language model whose states become embeddings.

    Raises:
        UnsupportedModelError: the model within is of another kind than the family's.
    """

    within: ClassVar[tuple[str, ...]] = ()
    """Model types of the vision-language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        vlm: Any = getattr(model, "vlm", None)
        kind = getattr(getattr(vlm, "config", None), "model_type", None)
        if kind not in self.within:
            raise UnsupportedModelError(
                f"{model.config.model_type!r} is served around {' or '.join(self.within)}, but "
                f"this {type(model).__name__} holds {kind or 'no vision-language model'}"
            )
        super().__init__(vlm)
        self.model = model

    @property
    def model_type(self) -> str:
        """That of the whole model; `config` is that of the vision-language model within."""
        return self.model.config.model_type

    @property
    def embedding(self) -> tuple[int, int]:
        """Numbers of an embedding, and bytes of a number."""
        weight = self._child(self.model, "embedding_proj_layer").weight
        return self.model.config.embedding_dim, weight.element_size()


@register_family("colpali")
class ColPali(Retriever, PaliGemma):
    """`ColPaliForRetrieval`."""

    within = ("paligemma",)


@register_family("colqwen2")
class ColQwen2(Retriever, Qwen2VL):
    """`ColQwen2ForRetrieval`, which embeds images itself and hands its model embeddings alone.

    It numbers the tokens of an image one after another, unless it is given position ids.
    """

    within = ("qwen2_vl", "qwen2_5_vl")
    embeds_images = True

    def fed(self, arguments: Mapping[str, Any], images: int | None = None) -> dict[str, Any]:
        """With the patches of all images after one another; pages come padded, (pages, P, C)."""
        pixels, grids = arguments.get("pixel_values"), arguments.get("image_grid_thw")
        if pixels is None or grids is None or pixels.dim() != 3:
            return dict(arguments)
        counts = (grids[:, 1] * grids[:, 2]).tolist()
        pixels = torch.cat([page[:count] for page, count in zip(pixels, counts, strict=True)])
        return {**arguments, "pixel_values": pixels}


@register_family("colmodernvbert")
class ColModernVBert(Retriever, Idefics3):
    """`ColModernVBertForRetrieval`: tiles as in Idefics3, and a text model that looks both ways."""

    within = ("modernvbert",)

    @property
    def reads_embeddings(self) -> bool:
        """Whether the text model makes more of its input embeddings: it norms them."""
        return True

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token."""
        return self.config.pixel_shuffle_factor
