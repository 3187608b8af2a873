"""ERNIE 4.5 VL, whose experts of images are narrower than those of text."""

import torch
from transformers import Ernie4_5_VLMoeConfig

from tests.conformance.zoo.mrope import TEXT, VISION, MRopeMember, rope

START, END = 92, 93


class Ernie45VL(MRopeMember):
    """A dense layer, and mixtures that are told what each token is: those that open and close an
    image count as seen. Two frames of a video make one.
    """

    name = "ernie4_5_vl_moe"
    patch = (48,)

    def config(self):
        text = {
            **TEXT, "rope_parameters": rope(3, 3, 2), "moe_intermediate_size": [40, 32],
            "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
        }  # fmt: skip
        vision = {k: v for k, v in VISION.items() if k != "temporal_patch_size"}
        return Ernie4_5_VLMoeConfig(
            vision_config={**vision, "intermediate_size": 48}, text_config=text, image_token_id=90,
            video_token_id=91, image_start_token_id=START, image_end_token_id=END,
            video_start_token_id=94, video_end_token_id=95,
        )  # fmt: skip

    def image_ids(self):
        return [START, *super().image_ids(), END]

    def extras(self, ids, images):
        kinds = torch.isin(ids, torch.tensor([self.image_id, START, END])).int()
        kinds += 2 * (ids == self.video_id).int()
        return super().extras(ids, images) | {"moe_mm_token_type_ids": kinds}

    def clip(self, seed=0):
        grid = torch.tensor([[6, 4, 8]])
        return {"pixel_values_videos": self.patches(grid, seed), "video_grid_thw": grid}
