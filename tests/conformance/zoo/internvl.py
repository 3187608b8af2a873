"""InternVL, without and with norms of queries and keys in its tower."""

import torch
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from tests.conformance.zoo.llava import TEXT
from tests.conformance.zoo.member import Member, fresh
from tests.conformance.zoo.towers import SIDE, pictures


class InternVL(Member):
    name = "internvl"
    stacked = True
    norms = False
    class_attention = "model.vision_tower.encoder.layer.{}.attention"
    class_layer = 2

    def config(self):
        vision = InternVLVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            image_size=(SIDE, SIDE), patch_size=(4, 4), use_qk_norm=self.norms,
        )  # fmt: skip
        return InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=self.image_id,
            vision_feature_layer=-1, vision_feature_select_strategy="default",
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}

    def class_scores(self, model, pixels, rows):
        """The patches in each token are found by their value among what the tower returns."""
        seen = []
        base = model.model
        hooks = [
            base.vision_tower.register_forward_hook(
                lambda module, args, output: seen.append(output.last_hidden_state[:, 1:])
            ),
            base.multi_modal_projector.register_forward_pre_hook(
                lambda module, args: seen.append(args[0])
            ),
        ]
        with torch.no_grad():
            base.get_image_features(**fresh(pixels))
        for hook in hooks:
            hook.remove()
        patches, tokens = seen
        parts = tokens.unflatten(-1, (4, -1))
        same = (parts[:, :, :, None] == patches[:, None, None]).all(-1)
        assert bool((same.sum(-1) == 1).all())
        same = same.sum(2)
        return list((same * rows[:, None]).sum(-1) / same.sum(-1))


class InternVLNorms(InternVL):
    name = "internvl-norms"
    norms = True
