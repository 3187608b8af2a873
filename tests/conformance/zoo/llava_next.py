"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision, with images and with videos."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
)

from tests.conformance.zoo.llava import CLIP, TEXT
from tests.conformance.zoo.member import Member, fresh
from tests.conformance.zoo.towers import SIDE, SIGLIP, pictures

PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96]]
SIZES = [(50, 60), (20, 90), (40, 24)]  # 5, 4 and 3 tiles; all are unpadded


class LlavaNext(Member):
    name = "llava_next"
    class_attention = "model.vision_tower.encoder.layers.{}.self_attn"

    def config(self):
        return LlavaNextConfig(
            vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT),
            image_token_index=self.image_id, vision_feature_layer=-2,
            vision_feature_select_strategy="default", image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return {
            "pixel_values": pictures(images, 5, 3, SIDE, SIDE, seed=seed),
            "image_sizes": torch.tensor(SIZES[:images]),
        }

    def class_scores(self, model, pixels, rows):
        """Each packed token is found by its value among the features of all tiles."""
        tiles = []
        hook = model.model.multi_modal_projector.register_forward_hook(
            lambda module, args, output: tiles.append(output)
        )
        with torch.no_grad():
            packed = model.model.get_image_features(**fresh(pixels)).pooler_output
        hook.remove()
        values, scores = tiles[0].flatten(0, 1), []
        for image in packed:
            same = (image[:, None] == values).all(-1)
            newline = (image == model.model.image_newline).all(-1)
            assert torch.equal(same.sum(1), (~newline).long()), "tokens must differ"
            score = (same.float() * rows.flatten()).sum(1)
            scores.append(score.masked_fill(newline, -torch.inf))
        return scores


class LlavaNextVideo(LlavaNext):
    name = "llava_next_video"

    def config(self):
        other = {"image": "video", "video": "image"}[self.modality]
        tokens = {
            f"{self.modality}_token_index": self.image_id,
            f"{other}_token_index": self.image_id + 1,
        }
        return LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT), **tokens,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
            image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip


class LlavaNextVideoFrames(LlavaNextVideo):
    name = "llava_next_video-video"
    modality = "video"
    stacked = True

    def pixels(self, images, seed=0):
        return {"pixel_values_videos": pictures(images, 3, 3, SIDE, SIDE, seed=seed)}

    def class_scores(self, model, pixels, rows):
        """The mean of four patches, frame by frame."""
        cells = [
            row.view(4, 4)[i : i + 2, j : j + 2].mean()
            for row in rows
            for i in (0, 2)
            for j in (0, 2)
        ]
        return list(torch.stack(cells).view(-1, 12))


class LlavaOnevision(Member):
    name = "llava_onevision"
    aspect_ratio = "anyres_max_2"
    what = "images of many tiles"

    def config(self):
        other = {"image": "video", "video": "image"}[self.modality]
        tokens = {
            f"{self.modality}_token_index": self.image_id,
            f"{other}_token_index": self.image_id + 1,
        }
        return LlavaOnevisionConfig(
            vision_config=SIGLIP, text_config=Qwen2Config(**TEXT), **tokens,
            image_grid_pinpoints=PINPOINTS, vision_aspect_ratio=self.aspect_ratio,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return LlavaNext.pixels(self, images, seed)


class LlavaOnevisionTiles(LlavaOnevision):
    """More tokens are allowed than any of the images has, so that none is interpolated."""

    name = "llava_onevision-tiles"
    aspect_ratio = "anyres_max_9"
    what = "images"


class LlavaOnevisionFrames(LlavaOnevision):
    name = "llava_onevision-video"
    modality = "video"
    what = "videos"
    stacked = True

    def pixels(self, images, seed=0):
        return {"pixel_values_videos": pictures(images, 3, 3, SIDE, SIDE, seed=seed)}
