"""Encoders without a language model, and the same encoders as towers of vision-language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from foveate.families.block import Block
from foveate.families.encoder import Encoder
from foveate.families.family import FAMILIES, Family

CLIP_BLOCK = Block("layer_norm1", "self_attn", "layer_norm2")
DINOV2_BLOCK = Block(
    "norm1",
    "attention",
    "norm2",
    scale1=("layer_scale1", "drop_path"),
    scale2=("layer_scale2", "drop_path"),
)
OLD_BLOCK = Block(  # of models that keep ViT's layer as it was
    "layernorm_before",
    "attention",
    "layernorm_after",
    "intermediate",
    closing="output",
    kernel="attention",
    matrices=("query", "key", "value"),
)
VIT_BLOCK = Block(
    "layernorm_before",
    "attention",
    "layernorm_after",
    scale1=("dropout",),
    scale2=("dropout",),
)


class PlainEncoder(Family):
    """An encoder, alone or under a head; it has no text model and no decoder layers.

    Subclasses say where the layers are in the tower, how a layer is made, and which rows come
    before the patches.

    Args:
        model: the encoder, or a model with a head around it.

    Raises:
        UnsupportedModelError: a layout this version does not know.
    """

    layers_path: ClassVar[str] = "encoder.layers"
    block: ClassVar[Block] = CLIP_BLOCK
    class_token: ClassVar[bool] = True
    head_path: ClassVar[str | None] = None
    readers: ClassVar[tuple[str, ...]] = ()
    """Modules that are handed rows after the layers, and need all of them."""
    pixels_name: ClassVar[str] = "pixel_values"
    """What the model is handed as pixels."""
    frames_name: ClassVar[str] = "num_frames"
    """Where the config of an encoder of videos says how many frames one has."""
    masks_kernels: ClassVar[bool] = False
    relative: ClassVar[bool] = False
    states_path: ClassVar[str | None] = None
    """The module within a backbone that returns the states of all layers."""
    states_apart: ClassVar[bool] = False
    """Whether that module is there in the encoder alone too, and not in backbones only."""

    by_place: ClassVar[tuple[str, ...]] = ("attention_mask",)
    """What layers may be handed by place, after states."""
    places: ClassVar[str] = ""
    """What layers are handed as the number of each row; see `Encoder`."""
    in_tuple: ClassVar[bool] = False
    """Whether layers return a tuple, which begins with their states."""
    whole_after_layers: ClassVar[bool] = False
    """Whether the model takes all rows apart once its layers have run."""
    shared_rotary: ClassVar[bool] = False
    """Whether layers take the rotary positions of one image for all of a batch."""
    as_tower: ClassVar[bool] = True
    """Whether methods act inside it as the tower of a vision-language model too."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        self.base: Any = self._under_heads(model)
        self.text, self.layers, self.attention_layers = None, (), ()
        blocks = self._child(self.base, self.layers_path)
        for name in self.block.modules:
            self._child(blocks[0], name)

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """None: there is no text."""
        return {}

    @property
    def encoder(self) -> Encoder:
        """The encoder's layers, and what surrounds them."""
        head = None if self.head_path is None else getattr(self.base, self.head_path, None)
        tower: Any = self.base
        apart = self.states_apart or isinstance(tower, BackboneMixin)
        if apart and self.states_path is not None:
            tower = self._child(self.base, self.states_path)
        return Encoder(
            layers=self._child(self.base, self.layers_path),
            attention=self.block.attends,
            heads=self.heads,
            class_token=self.class_token,
            projections=self.block.projections,
            values=self.block.matrices[-1],
            tower=tower,
            fed=None if tower is self.base else self.base,
            block=self.block,
            extra=self.extra_tokens,
            trailing=self.trailing_tokens,
            masks_layers=not self.masks_kernels,
            masks_kernels=self.masks_kernels,
            relative=self.relative,
            head=head,
            readers=tuple(filter(None, (getattr(self.base, name, None) for name in self.readers))),
            patches=self.patches,
            films=self.tubelet is not None,
            by_place=self.by_place,
            places=self.places,
            in_tuple=self.in_tuple,
            whole_after_layers=self.whole_after_layers,
            shared_rotary=self.shared_rotary,
        )

    @property
    def heads(self) -> int:
        """Attention heads of each layer."""
        heads: int = self.base.config.num_attention_heads
        return heads

    @property
    def tubelet(self) -> tuple[int, int, int] | None:
        """(frames, height, width) of a token, where frames of a video are encoded together."""
        return None

    @property
    def vision_frames(self) -> int:
        """Tubelets along time, of as many frames as the config says."""
        if self.tubelet is None:
            return 0
        return max(getattr(self.base.config, self.frames_name) // self.tubelet[0], 1)

    @property
    def patches(self) -> Callable[[Mapping[str, Any]], tuple[int, int, int]] | None:
        """Says how patches lie; see `Encoder`."""
        return None if self.tubelet is None else self._tubelets

    def _tubelets(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        """Tubelets of a video along time, height and width."""
        assert self.tubelet is not None  # asked for only then
        frames, _, *sides = arguments[self.pixels_name].shape[1:]
        depth, height, width = self.tubelet
        return frames // depth, sides[0] // height, sides[1] // width

    @property
    def extra_tokens(self) -> int:
        """Register and distillation tokens between the class token and the patches."""
        return 0

    @property
    def trailing_tokens(self) -> int:
        """Special tokens after the patches."""
        return 0

    @property
    def feature_layer(self) -> int:
        """The last layer: whatever reads an encoder alone reads that."""
        return self.vision_layers - 1

    @classmethod
    def _under_heads(cls, model: PreTrainedModel) -> PreTrainedModel:
        """The model whose output is the encoder's: under heads, or the model itself."""
        for name in (model.base_model_prefix, "vision_model"):
            if isinstance(within := getattr(model, name, None), PreTrainedModel):
                return cls._under_heads(within)
        return model


def tower_encoder(tower: PreTrainedModel) -> Encoder | None:
    """The encoder of a vision tower, or `None` for a kind that methods cannot look into."""
    kind: Callable[[PreTrainedModel], Any] | None = FAMILIES.get(tower.config.model_type)
    if not (isinstance(kind, type) and issubclass(kind, PlainEncoder) and kind.as_tower):
        return None
    return kind(tower).encoder
