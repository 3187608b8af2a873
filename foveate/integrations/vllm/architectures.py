"""Architectures: the models of vLLM that foveate serves, and the class for each."""

from __future__ import annotations

SERVED = {
    "LlavaForConditionalGeneration": "foveate.integrations.vllm.llava:Llava",
    "Qwen2_5_VLForConditionalGeneration": "foveate.integrations.vllm.qwen:Qwen25VL",
    "Qwen3VLForConditionalGeneration": "foveate.integrations.vllm.qwen:Qwen3VL",
    "LlavaNextForConditionalGeneration": "foveate.integrations.vllm.llava_next:LlavaNext",
    "LlavaOnevisionForConditionalGeneration": "foveate.integrations.vllm.llava_next:LlavaOnevision",
    "InternVLForConditionalGeneration": "foveate.integrations.vllm.internvl:InternVL",
}
"""Name in a checkpoint's config -> the class, which vLLM imports when it loads such a model."""


def register_all() -> None:
    """Register the classes with vLLM."""
    from vllm import ModelRegistry

    for architecture, place in SERVED.items():
        ModelRegistry.register_model(architecture, place)
