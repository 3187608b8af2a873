"""Architectures: the models of vLLM that foveate serves, and the class for each."""

from __future__ import annotations

from typing import Any

from foveate.errors import UnsupportedModelError

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
    """Register the classes with vLLM, and see to it that no other model ignores a request."""
    from vllm import ModelRegistry
    from vllm.multimodal import MULTIMODAL_REGISTRY

    for architecture, place in SERVED.items():
        ModelRegistry.register_model(architecture, place)
    refuse_elsewhere(MULTIMODAL_REGISTRY)


def refuse_elsewhere(registry: Any) -> None:
    """Let processors of models that are not served refuse foveate's fields; vLLM would hand them to
    transformers, which drops what it does not know.

    Args:
        registry: vLLM's registry of processors, whose `create_processor` is replaced.
    """
    create = registry.create_processor
    if getattr(create, "foveate", False):
        return

    def create_processor(*args: Any, **kwargs: Any) -> Any:
        from foveate.integrations.vllm.processor import (
            FoveateProcessor,
            RefusingProcessor,
            refusing,
        )

        made = create(*args, **kwargs)
        if not isinstance(made, FoveateProcessor | RefusingProcessor):
            kind: Any = type(made)
            made.__class__ = refusing(kind, not_served)
        return made

    create_processor.foveate = True  # type: ignore[attr-defined]
    registry.create_processor = create_processor


def not_served() -> None:
    """Refuse a model of another architecture.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        "foveate does not serve this model in vLLM; it serves the architectures "
        f"{', '.join(sorted(SERVED))}"
    )
