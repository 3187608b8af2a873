"""Qwen2.5-VL and Qwen3-VL in vLLM, dense: images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
)

from foveate.families import Encoder, Family
from foveate.integrations.vllm.mrope import MRopeModel, grid_positions, numbered, with_positions
from foveate.integrations.vllm.packed import BlockHooks, TowerSignals
from foveate.integrations.vllm.processor import register_processor
from foveate.integrations.vllm.signals import Hooks
from foveate.integrations.vllm.site import Site
from foveate.signals.encoder_hooks import EncoderSignals


class QwenSite(Site):
    """All images are in one sequence of patches; a video is one of them."""

    modalities = ("image", "video")
    whole_tower = True
    shares_items = True
    layers = "visual.blocks"
    attention = "attn"
    projections = ("qkv",)
    projector = "visual.merger"
    last_norm = "merger.ln_q"

    def layout(self, modality: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """The item's grid of patches."""
        name = f"{modality}_grid_thw"
        return {name: data[name].reshape(1, 3)}

    def arguments(self, modality: str, kwargs: Mapping[str, Any], item: int) -> dict[str, Any]:
        """The item's grid of patches."""
        name = f"{modality}_grid_thw"
        return {name: kwargs[name][item].reshape(1, 3)}

    def calls(self, modality: str, kwargs: Mapping[str, Any]) -> list[int]:
        """One for each item: signals of images in one sequence come by image."""
        return [1] * len(kwargs[f"{modality}_grid_thw"])

    def signals(
        self, model: Any, family: Family, wanted: Mapping[str, tuple[int, ...]], threshold: float
    ) -> EncoderSignals:
        """Signals of images in one sequence."""
        encoder, side = self.encoder(model, family), family.side("image")
        return TowerSignals(encoder, wanted, threshold=threshold, side=side)

    def hooks(self, model: Any) -> Hooks:
        """Hooks that find the layers' outputs in front of what reads these."""
        return BlockHooks(model.visual.blocks, attrgetter(self.last_norm)(model.visual))

    def encoder(self, model: Any, family: Family) -> Encoder:
        """VLLM's vision tower, whose rows lie where those of transformers' do."""
        known: Any = family.encoder
        return replace(
            known,
            layers=model.visual.blocks,
            attention=attrgetter(self.attention),
            tower=model.visual,
            readers=(),
            packed=lambda given, side: known.packed(
                {"grid_thw": torch.as_tensor(given["grid_thw"])}, side
            ),
            windows=None,  # layers are told them
        )


class Qwen3Site(QwenSite):
    """DeepStack planes stand beside tokens; timestamps stand between the frames of a video."""

    last_norm = "merger.norm"

    def interleaved(self, modality: str) -> bool:
        """Whether text stands between the tokens of an item."""
        return modality == "video"

    def width(self, model: Any, columns: int) -> int:
        """Columns of a token without its planes."""
        return model.visual_dim


class Qwen25VL(MRopeModel, Qwen2_5_VLForConditionalGeneration):
    """`Qwen2_5_VLForConditionalGeneration`."""

    site = QwenSite()

    @property
    def _width(self) -> int:
        return self.config.vision_config.out_hidden_size

    def positions(self, modality: str, data: Mapping[str, Any], item: int) -> Tensor:
        """(3, N) positions of an item's visual tokens; frames of a video are as far apart as the
        time between them.
        """
        vision, pace = self.config.vision_config, 1.0
        seconds = data.get("second_per_grid_ts")
        if modality == "video" and seconds is not None:
            pace = float(seconds[item]) * vision.tokens_per_second
        return grid_positions(*_grid(modality, data, item, vision.spatial_merge_size), pace)


class Qwen3VL(MRopeModel, Qwen3VLForConditionalGeneration):
    """`Qwen3VLForConditionalGeneration`."""

    site = Qwen3Site()

    @property
    def _width(self) -> int:
        return self.visual_dim + self.multiscale_dim

    def positions(self, modality: str, data: Mapping[str, Any], item: int) -> Tensor:
        """(3, N) positions of an image's tokens, or of a video's and the text between them."""
        frames, height, width = _grid(
            modality, data, item, self.config.vision_config.spatial_merge_size
        )
        if modality == "image":
            return grid_positions(1, height, width)
        ids, visual = self._video(data, item)
        starts = visual[:: height * width].tolist()
        spans = [(start, height * width, max(height, width)) for start in starts]
        positions, _ = numbered(len(ids), spans)
        positions[:, visual] += grid_positions(1, height, width).repeat(1, frames)
        return positions

    def placed(self, modality: str, kwargs: Mapping[str, Any], item: int, images: Any) -> Tensor:
        """(N, D + CHANNELS) survivors, among them the text between the frames of a video."""
        if modality == "image":
            return super().placed(modality, kwargs, item, images)
        (image,) = images
        ids, visual = self._video(kwargs, item)
        is_text = torch.ones(len(ids), dtype=torch.bool).index_fill(0, visual, False)
        surviving = visual[image.places.cpu()]
        device = image.rows.device
        rows = image.rows.new_zeros(len(ids), self._width)
        rows[surviving.to(device)] = image.rows
        text = self.language_model.embed_input_ids(ids[is_text].to(device))
        rows[is_text.to(device), : self.visual_dim] = text.to(rows)
        stays = is_text.index_fill(0, surviving, True)
        positions = self.positions(modality, kwargs, item)
        return with_positions(rows[stays.to(device)], positions[:, stays])

    def _video(self, data: Mapping[str, Any], item: int) -> tuple[Tensor, Tensor]:
        """Token ids of a video, with the text between its frames; and places of its tokens."""
        config = self.config
        frames, height, width = _grid("video", data, item, config.vision_config.spatial_merge_size)
        ids = Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[height * width] * frames,
            timestamps=data["timestamps"][item],
            tokenizer=self._tokenizer,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
        ).full
        ids = torch.tensor(ids)
        return ids, (ids == config.video_token_id).nonzero()[:, 0]


def _grid(modality: str, data: Mapping[str, Any], item: int, side: int) -> tuple[int, int, int]:
    """Frames, height and width of an item in tokens."""
    frames, height, width = data[f"{modality}_grid_thw"][item].flatten().tolist()
    return frames, height // side, width // side


register_processor(Qwen25VL, Qwen25VL.site)
register_processor(Qwen3VL, Qwen3VL.site)
