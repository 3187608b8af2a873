"""Architectures: the models of vLLM that foveate serves, and the class for each."""

from __future__ import annotations

SERVED = {
    "LlavaForConditionalGeneration": "foveate.integrations.vllm.llava:Llava",
}
"""Name in a checkpoint's config -> the class, which vLLM imports when it loads such a model."""


def register_all() -> None:
    """Register the classes with vLLM."""
    from vllm import ModelRegistry

    for architecture, place in SERVED.items():
        ModelRegistry.register_model(architecture, place)
