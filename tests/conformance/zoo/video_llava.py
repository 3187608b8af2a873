"""Video-LLaVA, with images and with videos."""

from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig

from tests.conformance.zoo.llava import CLIP, TEXT
from tests.conformance.zoo.member import Member
from tests.conformance.zoo.towers import SIDE, pictures


class VideoLlava(Member):
    name = "video_llava"
    stacked = True
    class_attention = "model.image_tower.encoder.layers.{}.self_attn"

    def config(self):
        other = {"image": "video", "video": "image"}[self.modality]
        tokens = {
            f"{self.modality}_token_index": self.image_id,
            f"{other}_token_index": self.image_id + 1,
        }
        return VideoLlavaConfig(
            vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT), **tokens,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}


class VideoLlavaFrames(VideoLlava):
    name = "video_llava-video"
    modality = "video"
    class_attention = None
    frames = 2

    def pixels(self, images, seed=0):
        return {"pixel_values_videos": pictures(images, self.frames, 3, SIDE, SIDE, seed=seed)}

    def counts(self, model, pixels):
        return [self.frames * 17] * pixels["pixel_values_videos"].shape[0]
