"""pi0: PaliGemma reads cameras and an instruction, and an action expert reads PaliGemma's cache.

Paper: Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control",
arXiv:2410.24164. The expert is a smaller Gemma with as many layers. In each of them the robot's
state and its noisy actions attend to what the same layer of PaliGemma has cached of the prompt,
anew in every step of denoising. Their positions go on after those of the prompt.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.family import register_family
from foveate.families.paligemma import PaliGemma
from foveate.families.text_facts import Expert

PARTS = ("paligemma", "gemma", "gemma")


@register_family("pi0")
class Pi0(PaliGemma):
    """`PI0ForConditionalGeneration` and `PI0Model`.

    The base model, and `config`, are those of the PaliGemma within.

    Raises:
        UnsupportedModelError: the models within are of other kinds.
    """

    first_position = 0  # with a mask; without one there is no padding to count

    def __init__(self, model: PreTrainedModel) -> None:
        policy: Any = getattr(model, "model", model)
        vlm: Any = getattr(policy, "vlm", None)
        expert = getattr(policy, "dit", None)
        configs = [getattr(part, "config", None) for part in (vlm, expert)]
        texts = [configs[0], getattr(configs[0], "text_config", None), configs[1]]
        kinds = tuple(getattr(config, "model_type", None) for config in texts)
        if kinds != PARTS:
            raise UnsupportedModelError(
                f"{model.config.model_type!r} is served with a PaliGemma of Gemma and an expert of "
                f"Gemma, but this {type(model).__name__} holds {', '.join(map(str, kinds))}"
            )
        super().__init__(vlm)
        self.model, self._policy = model, policy
        self._expert = Expert(expert, 1 + model.config.chunk_size, _products(model))

    @property
    def model_type(self) -> str:
        """That of the whole model."""
        return self.model.config.model_type

    @property
    def policy(self) -> Any:
        """The model without the matrices that actions pass before and after it."""
        return self._policy

    @property
    def expert(self) -> Expert:
        """The action expert, which is given a state and noisy actions."""
        return self._expert


def _products(model: Any) -> int:
    """Multiply-adds of the matrices that a state and noisy actions pass before and after the
    expert; 0 of a model without them.
    """
    if not hasattr(model, "action_out_proj"):
        return 0
    before = model.embed_action_time
    each = (before.action_in_proj, before.action_time_mlp_in, before.action_time_mlp_out)
    actions = sum(matrix.weight.numel() for matrix in (*each, model.action_out_proj))
    return before.state_proj.weight.numel() + model.config.chunk_size * actions
