"""Family: where things are in a model. Subclasses say only what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.models.block import Block

FAMILIES: dict[str, type[Family]] = {}
F = TypeVar("F", bound="type[Family]")


@dataclass(frozen=True)
class Encoder:
    """A vision encoder.

    Args:
        layers: its transformer layers.
        attention: the attention module of a layer, with `q_proj` and `k_proj`.
        heads: attention heads.
        class_token: whether row 0 is a class token.
        tower: the module whose output is the encoder's; needed to act inside the encoder.
        block: how a layer is made; needed to act inside the encoder.
        extra: rows between the class token and the patches (registers, distillation token).
        head: a module that pools all rows by attention, with a `MultiheadAttention` within.
    """

    layers: Sequence[nn.Module]
    attention: Callable[[Any], Any]
    heads: int
    class_token: bool
    tower: Any = None
    block: Block | None = None
    extra: int = 0
    head: Any = None

    @property
    def special(self) -> int:
        """Rows before the patches."""
        return int(self.class_token) + self.extra


def register_family(*model_types: str) -> Callable[[F], F]:
    """Class decorator: the family serves these values of `config.model_type`."""

    def add(cls: F) -> F:
        for model_type in model_types:
            FAMILIES[model_type] = cls
        return cls

    return add


class Family:
    """Base of all families: a multimodal `base` model around a `text` model with `layers`.

    Args:
        model: a model of this family, with or without its language-model head.

    Raises:
        UnsupportedModelError: the model is not laid out as expected; the message names what is
            missing.
    """

    text_path: ClassVar[str] = "language_model"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.base = self._child(model, "model") if hasattr(model, "lm_head") else model
        self.text: Any = self._child(self.base, self.text_path)
        self.layers: Sequence[nn.Module] = self._child(self.text, "layers")

    @property
    def model_type(self) -> str:
        """The config's model type."""
        return self.config.model_type

    @property
    def text_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for visual tokens in `input_ids`."""
        return (self.config.image_token_id,)

    @property
    def encoder(self) -> Encoder:
        """The vision encoder."""
        raise NotImplementedError

    @property
    def vision_layers(self) -> int:
        """Number of encoder layers."""
        return len(self.encoder.layers)

    @property
    def feature_layer(self) -> int:
        """0-based encoder layer whose output the language model sees."""
        raise NotImplementedError

    def grid(self, count: int) -> tuple[int, int]:
        """(height, width) of the token grid of an image that has `count` visual tokens."""
        raise NotImplementedError

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> Any:
        """Rotary (cos, sin) for (B, T) text positions."""
        return self.text.rotary_emb(hidden, position_ids=position_ids)

    def _child(self, parent: nn.Module, path: str) -> Any:
        child: Any = parent
        for name in path.split("."):
            child = getattr(child, name, None)
            if child is None:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} has no {path!r} in {type(parent).__name__}: "
                    "the installed "
                    f"transformers lays out {self.config.model_type!r} in a way this version of "
                    "foveate does not know"
                )
        return child
