"""ViT and encoders whose layers are ViT's, with or without a classification head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.family import register_family
from foveate.families.plain import VIT_BLOCK, PlainEncoder
from foveate.record.boxes import cells_of


@register_family("vit", "vit_msn")
class ViT(PlainEncoder):
    """`ViTModel`, `ViTMSNModel` and the models around them."""

    layers_path = "layers"
    block = VIT_BLOCK


@register_family("deit")
class DeiT(ViT):
    """`DeiTModel`; its row 1 is the distillation token."""

    @property
    def extra_tokens(self) -> int:
        """The distillation token."""
        return 1


@register_family("ijepa")
class IJEPA(ViT):
    """`IJepaModel` and its classifier, which averages all rows: there is no class token."""

    class_token = False


@register_family("audio-spectrogram-transformer")
class AST(DeiT):
    """`ASTModel` and its classifier; patches lie on a grid of frequency by time, and may overlap.

    Their positions fit spectrograms of one length only, that of the config.
    """

    def grid(self, count: int) -> tuple[int, int]:
        """(frequencies, times) of all patches."""
        of, patch = self.base.config, self.base.embeddings.patch_embeddings.projection.kernel_size
        frequencies = (of.num_mel_bins - patch[0]) // of.frequency_stride + 1
        return frequencies, (of.max_length - patch[1]) // of.time_stride + 1


@register_family("vivit")
class ViViT(ViT):
    """`VivitModel` and its classifier; a token is a tubelet: a patch of some frames in a row."""

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """As the config says."""
        depth, height, width = self.base.config.tubelet_size
        return depth, height, width


@register_family("vit_mae")
class ViTMAE(ViT):
    """`ViTMAEModel` and the decoder that it is trained with, which gets rows at full length.

    Most patches are masked at random, and the others shuffled, even if none is masked: the tokens
    are those that the encoder sees, in its order, on no grid. `noise` says where they lie.
    """

    planar = False
    placed_by = ("noise", "pixel_values")

    @property
    def patches(self) -> Callable[[Mapping[str, Any]], tuple[int, int, int]]:
        """One row of those that are not masked."""
        return lambda arguments: (1, 1, self._unmasked(arguments["pixel_values"]))

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Cells of the patches that are not masked; NaN where the model has drawn the noise."""
        noise = arguments.get("noise")
        if noise is None:
            return torch.full((shape.total, 4), torch.nan)
        height, width = self._grid(arguments["pixel_values"])
        order = torch.argsort(noise, dim=1)[number, : shape.total].cpu()
        return cells_of(Shape(height * width, (height, width)))[order]

    def _grid(self, pixels: Tensor) -> tuple[int, int]:
        sides = self.base.embeddings.patch_embeddings.patch_size
        height, width = (n // side for n, side in zip(pixels.shape[-2:], sides, strict=True))
        return height, width

    def _unmasked(self, pixels: Tensor) -> int:
        height, width = self._grid(pixels)
        return int(height * width * (1 - self.base.config.mask_ratio))
