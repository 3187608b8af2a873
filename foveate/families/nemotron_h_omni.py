"""Nemotron-H Omni (Nemotron 3 Nano Omni): a RADIO tower on patches of any grid, cells merged into
tokens, and a text model whose layers are Mamba-2, attention or an MLP, none with positions.

The model with `generate` makes features and places them itself. Frames of a video stand at the
placeholders of images. Before transformers 5.24 each pair of frames has features of its own, which
are placed only if they are handed in, as a list: those that it makes itself are one tensor, and it
raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from foveate.core.tokens import Shape
from foveate.errors import InputError
from foveate.families.encoder import Encoder
from foveate.families.family import AUDIO, register_family
from foveate.families.gridded import Gridded


@register_family("nemotron_h_omni")
class NemotronHOmni(Gridded):
    """`NemotronH_Omni_Reasoning_V3`."""

    text_path = "language_model.model"
    grid_names: ClassVar[Mapping[str, str]] = {"image": "image_grid_hw", "video": "video_grid_hw"}

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """The same token for both; a prompt has images or a video. Audio has its own."""
        token = self.config.image_token_id
        audio = {AUDIO: self.config.audio_token_id} if self.hears else {}
        return {"image": token, "video": token, **audio}

    @property
    def unheard(self) -> str:
        """Whether it was made without an encoder of audio."""
        return "" if self.base.audio_tower is not None else "it has no encoder of audio"

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> Any:
        """None: positions are what recurrent layers make of them."""
        return None

    def rotates(self, layer: int) -> bool:
        """No layer does."""
        return False

    @property
    def rotary_by_length(self) -> bool:
        """There are no rotary embeddings."""
        return False

    @property
    def encoder(self) -> Encoder | None:
        """None: methods cannot look inside RADIO."""
        return None

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Why methods cannot act inside; each token has patches of its own all the same."""
        return (
            "its RADIO encoder puts rows of summaries before the patches of each image, all in one "
            "sequence, which methods cannot act on yet"
        )

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token."""
        return round(1 / self.config.downsample_ratio)

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, and grids in merged patches; a frame is a pair of the video's, which is an
        image of its own before transformers 5.24.

        Raises:
            InputError: the model removes tokens of videos itself.
        """
        if modality == "video" and self.base.video_pruning_rate:
            raise InputError(
                f"this {self.model_type} removes tokens of videos itself (video_pruning_rate is "
                f"{self.base.video_pruning_rate}) and shortens the prompt, after which it is not "
                "known where tokens stand; set model.video_pruning_rate = 0 within a session"
            )
        frames = arguments.get("pixel_values_videos")
        if modality == "video" and frames is not None:
            patch = self.config.vision_config.patch_size * self.side(modality)
            grid = (frames.shape[-2] // patch, frames.shape[-1] // patch)
            counts = [len(feature) for feature in pooled]
            return [Shape(count, grid, count // (grid[0] * grid[1])) for count in counts]
        return super().shapes(modality, pooled, arguments)
