"""Granite Vision 4: features that are added before three of its decoder layers."""

from transformers import CLIPVisionConfig, DynamicCache, Granite4VisionConfig
from transformers.models.granite4_vision.modeling_granite4_vision import (
    Granite4VisionImageFeaturesOutput,
)

from tests.conformance.zoo.llava import CLIP, TEXT
from tests.conformance.zoo.llava_next import PINPOINTS, LlavaNext

LAYERS = (1, 0, 0, 2)  # of two layers of the tower, then of corners of cells; later ones count


class Granite4Vision(LlavaNext):
    """A tile has 4 x 4 tokens, of windows of 4 x 4 patches."""

    name = "granite4_vision"
    class_attention = None
    closed = True
    mixes = True
    beams_of_many = False  # transformers 5.23 repeats A, B as A, A, B, B here

    def config(self):
        text = {
            **TEXT, "embedding_multiplier": 2.0, "logits_scaling": 2.0,
            "residual_multiplier": 0.5, "attention_multiplier": 0.25,
        }  # fmt: skip
        vision = CLIPVisionConfig(**{**CLIP, "hidden_size": 64, "patch_size": 4})
        former = {
            "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48,
            "cross_attention_frequency": 1, "use_qformer_text_input": False,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        }  # fmt: skip
        return Granite4VisionConfig(
            vision_config=vision, text_config=text, qformer_config=former, downsample_rate="2/4",
            deepstack_layer_map=[[-2, LAYERS[0]], [1, LAYERS[1]]], projector_dropout=0.0,
            spatial_target_layers=list(LAYERS[2:]), image_token_index=self.image_id,
            image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip

    def output(self, features):
        planes = [features.roll(1, -1), features.flip(-1), features, features.roll(2, -1) / 2]
        named = [(layer, list(plane)) for layer, plane in zip(LAYERS, planes, strict=True)]
        return Granite4VisionImageFeaturesOutput(deepstack_features=named)

    def pooled(self, output):
        return dict(output.deepstack_features)[0]

    def cached(self, model):
        """Its text model makes no cache by itself."""
        return {"past_key_values": DynamicCache(config=model.config.get_text_config())}
