"""timm's VisionTransformer, as transformers wraps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.block import Block
from foveate.families.encoder import Encoder
from foveate.families.family import register_family
from foveate.families.plain import PlainEncoder


@register_family("timm_wrapper")
class TimmViT(PlainEncoder):
    """`TimmWrapperModel` and `TimmWrapperForImageClassification` around a `VisionTransformer`.

    timm pools the rows and applies its head before it returns, so all rows are back after the last
    layer: merged ones as often as they have sources, and the mean of what is left for dropped ones.

    Args:
        model: the model.

    Raises:
        UnsupportedModelError: it is another model of timm, or one whose layers are made otherwise.
    """

    layers_path = "timm_model.blocks"
    block = Block(
        "norm1",
        "attn",
        "norm2",
        scale1=("ls1", "drop_path1"),
        scale2=("ls2", "drop_path2"),
        matrices=("qkv",),
    )
    whole_after_layers = True
    as_tower = False

    def __init__(self, model: PreTrainedModel) -> None:
        if why := _unlike(model.timm_model):
            raise UnsupportedModelError(
                f"this timm_wrapper holds a model of timm that {why}; methods act inside its "
                "VisionTransformer with plain layers, such as vit_base_patch16_224"
            )
        super().__init__(model)

    @property
    def _vit(self) -> Any:
        return self.base.timm_model

    @property
    def encoder(self) -> Encoder:
        """The layers; what they take as a mask is called as timm calls it."""
        return replace(
            super().encoder,
            class_token=self._vit.has_class_token,
            mask="attn_mask",
            maps_states=True,
            runs_again=lambda: self._vit.training and self._vit.grad_checkpointing,
        )

    @property
    def heads(self) -> int:
        """Attention heads of each layer."""
        heads: int = self._vit.blocks[0].attn.num_heads
        return heads

    @property
    def extra_tokens(self) -> int:
        """Registers, or a distillation token."""
        extra: int = self._vit.num_prefix_tokens - self._vit.has_class_token
        return extra

    @property
    def patches(self) -> Callable[[Mapping[str, Any]], tuple[int, int, int]]:
        """As timm lays them out, which may pad images."""
        return lambda arguments: (
            1,
            *self._vit.patch_embed.dynamic_feat_size(arguments["pixel_values"].shape[-2:]),
        )


def _unlike(vit: Any) -> str:
    """How a model of timm differs from the ViT that is known here; empty if it does not."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block as Layer
    from timm.models.vision_transformer import VisionTransformer

    known = isinstance(vit, VisionTransformer)
    if not known or type(vit).forward_features is not VisionTransformer.forward_features:
        return f"is of class {type(vit).__name__}"
    for layer in vit.blocks:
        if type(layer) is not Layer:
            return f"has a {type(layer).__name__} among its layers"
        if type(layer.attn) is not Attention:
            return f"attends by {type(layer.attn).__name__}"
        if not isinstance(layer.attn.q_norm, nn.Identity):
            return "norms queries and keys after one matrix has made them"
    if not isinstance(vit.patch_drop, nn.Identity):
        return "drops patches at random in training"
    return ""
