"""GLM-4.1V, GLM-4.5V (a mixture of experts), GLM-4.6V, GLM-GA and GLM-OCR."""

from transformers import Glm4vConfig, Glm4vMoeConfig, Glm46VConfig, GlmgaConfig, GlmOcrConfig

from tests.conformance.zoo.mrope import TEXT, VISION, MRopeMember, rope

PARTS = {
    "vision_config": {
        **VISION, "out_hidden_size": 64, "intermediate_size": 48, "image_size": 32,
        "model_type": "glm4v_vision",
    },
    "text_config": {
        **TEXT, "model_type": "glm4v_text",
        "rope_parameters": rope(2, 1, 1, partial_rotary_factor=0.5),
    },
    "image_token_id": 90, "video_token_id": 91, "image_start_token_id": 92,
    "image_end_token_id": 93, "video_start_token_id": 94, "video_end_token_id": 95,
}  # fmt: skip
SHORT = {"num_hidden_layers": 4}


class Glm4V(MRopeMember):
    name = "glm4v"
    timestamps = True
    video_id = MRopeMember.image_id
    beams_of_many = False  # transformers 5.23 repeats A, B as A, A, B, B here

    def config(self):
        return Glm4vConfig(**PARTS)


class Glm46V(Glm4V):
    name = "glm46v"

    def config(self):
        return Glm46VConfig(**PARTS)


class Glmga(Glm46V):
    name = "glmga"

    def config(self):
        return GlmgaConfig(**{**PARTS, "text_config": {**PARTS["text_config"], **SHORT}})


class GlmOCR(Glm4V):
    name = "glm_ocr"

    def config(self):
        text = {**PARTS["text_config"], **SHORT, "model_type": "glm_ocr_text"}
        vision = {**PARTS["vision_config"], "model_type": "glm_ocr_vision"}
        return GlmOcrConfig(**{**PARTS, "text_config": text, "vision_config": vision})


class Glm4VMoe(Glm4V):
    name = "glm4v_moe"

    def config(self):
        text = {
            **PARTS["text_config"], "model_type": "glm4v_moe_text", "moe_intermediate_size": 32,
            "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
            "first_k_dense_replace": 2,
        }  # fmt: skip
        vision = {**PARTS["vision_config"], "model_type": "glm4v_moe_vision"}
        return Glm4vMoeConfig(**{**PARTS, "text_config": text, "vision_config": vision})
