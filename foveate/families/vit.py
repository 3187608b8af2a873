"""ViT and encoders whose layers are ViT's, with or without a classification head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from foveate.families.family import register_family
from foveate.families.plain import VIT_BLOCK, PlainEncoder


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
    def patches(self) -> Callable[[Mapping[str, Any]], tuple[int, int, int]]:
        """Tubelets along time, height and width."""
        return self._tubelets

    def _tubelets(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, _, height, width = arguments["pixel_values"].shape[1:]
        depth, *sides = self.base.config.tubelet_size
        return frames // depth, height // sides[0], width // sides[1]
