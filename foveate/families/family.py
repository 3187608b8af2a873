"""Family: where things are in a model. Subclasses say only what differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.tokens import Shape
from foveate.errors import UnsupportedModelError
from foveate.families.encoder import Encoder
from foveate.families.rows import cell_means, raster_rows
from foveate.families.text_facts import TextFacts
from foveate.record.boxes import cells_of
from foveate.record.tiles import Tiling

AUDIO = "audio"  # the modality, where methods act on it
FAMILIES: dict[str, type[Family]] = {}
F = TypeVar("F", bound="type[Family]")


def register_family(*model_types: str) -> Callable[[F], F]:
    """Class decorator: the family serves these values of `config.model_type`."""

    def add(cls: F) -> F:
        for model_type in model_types:
            FAMILIES[model_type] = cls
        return cls

    return add


class Family(TextFacts):
    """Base of all families: a multimodal `base` model around a `text` model with `layers`.

    The base model makes features and puts them in the prompt. Where the model with `generate` does
    that itself, and its text model brings the language-model head, both are one.

    Args:
        model: a model of this family, with or without its language-model head.

    Raises:
        UnsupportedModelError: the model is not laid out as expected; the message names what is
            missing.
    """

    text_path: ClassVar[str] = "language_model"
    """Where the text model is in the base model; empty where that is the text model itself."""
    places_later_images: ClassVar[bool] = True
    """Whether `generate` gives new images after a cached prompt positions of images."""
    planar: ClassVar[bool] = True
    """Whether the visual tokens of an image or a frame lie on one grid."""
    placed_by: ClassVar[tuple[str, ...]] = ()
    """Arguments that `boxes` reads, on the host; a record holds them as long as it lives."""
    embeds_images: ClassVar[bool] = False
    """Whether the model puts features in the prompt itself, and hands the base model no ids."""
    whole_head: ClassVar[str] = ""
    """Why the model makes no logits of some tokens alone, though it takes `logits_to_keep`."""
    thumbnail: ClassVar[int] = -1
    """Which tile of an image shows all of it, where each tile counts as an image."""
    hears: bool = False
    """Whether audio is visual to methods: `hear` was called."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.base: Any = self._child(model, "model") if hasattr(model, "lm_head") else model
        self.text: Any = self._child(self.base, self.text_path)
        self.layers: Sequence[nn.Module] = self._child(self.text, "layers")

    @property
    def model_type(self) -> str:
        """The config's model type."""
        return self.config.model_type

    @property
    def generates(self) -> bool:
        """Whether the model has a language-model head, and so `generate`."""
        return hasattr(self.model, "generate")

    # -- audio

    @property
    def unheard(self) -> str:
        """Why methods cannot act on audio; empty where they can: where `get_audio_features` returns
        (N, D) rows as `pooler_output`, one for each placeholder of the prompt.
        """
        if hasattr(self.base, f"get_{AUDIO}_features"):
            return "how it makes audio tokens has not been tested with methods"
        return "it takes no audio"

    def hear(self) -> None:
        """From now on audio is visual to methods.

        Raises:
            UnsupportedModelError: methods cannot act on the audio of this model.
        """
        if why := self.unheard:
            raise UnsupportedModelError(
                f"audio tokens of this {self.model_type} cannot be removed: {why}; leave `audio` "
                "out, and audio stays as it is"
            )
        self.hears = True

    # -- images

    def with_embeddings(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the base model is called with, once it has made embeddings of ids and images; asked
        only where it is the text model too.

        Args:
            arguments: what it is called with, by name, ids and images among them.
        """
        return dict(arguments)

    def encode(self, modality: str, arguments: Mapping[str, Any]) -> Any:
        """The features of images or videos, as the base model makes them.

        Args:
            modality: `image` or `video`.
            arguments: what they are made from, as `fed` gives it.
        """
        return getattr(self.base, f"get_{modality}_features")(**arguments, return_dict=True)

    def placer(self, modality: str) -> Any:
        """The module that makes features and returns the embeddings (B, T, D) of a prompt with
        these in their places; `None` where `get_image_features` and the like return features.

        Args:
            modality: `image` or `video`.
        """
        return None

    def lengths(self, modality: str, arguments: Mapping[str, Any]) -> list[int]:
        """Visual tokens of each image; asked only of what a `placer` is called with.

        Args:
            modality: `image` or `video`.
            arguments: what the features are made from.
        """
        raise NotImplementedError

    def marked(self, embeds: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """(B, T) which tokens were removed from the features, where rows hold NaN.

        Args:
            embeds: (B, T, D) input of the text model.
            arguments: all that it is called with.
        """
        return embeds[..., 0].isnan()

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Modality -> token id that stands for its visual tokens in `input_ids`."""
        ids = {"image": "image_token_id", "video": "video_token_id"}
        ids |= {AUDIO: "audio_token_id"} if self.hears else {}
        found = {modality: getattr(self.config, name, None) for modality, name in ids.items()}
        return {
            modality: token
            for modality, token in found.items()
            if token is not None and hasattr(self.base, f"get_{modality}_features")
        }

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """How the visual tokens of each image or video are laid out.

        Args:
            modality: `image` or `video`.
            pooled: the features of all images: a list of (V, D), or (images, V, D).
            arguments: what the features were made from, such as `pixel_values`; empty if unknown.
        """
        counts = [feature.shape[:-1].numel() for feature in pooled]
        return [Shape(count, self.grid(count)) for count in counts]

    def grid(self, count: int) -> tuple[int, int]:
        """(height, width) of `count` tokens: a square if they lie on one grid, or else one row."""
        side = math.isqrt(count)
        return (side, side) if self.planar and side * side == count else (1, count)

    def fed(self, arguments: Mapping[str, Any], images: int | None = None) -> dict[str, Any]:
        """What features are made from, without what the model leaves out, such as padding tiles.

        Args:
            arguments: what features are to be made from.
            images: how many have features, if that is known: then only shapes matter.
        """
        return dict(arguments)

    def pixels(self, images: int, arguments: Mapping[str, Any]) -> Tensor | None:
        """(N, C, H, W) what the encoder is fed of so many images, or (N, tiles, C, H, W); `None`
        where these are patches and no images.

        Args:
            images: how many.
            arguments: what their features are made from.
        """
        pixels = arguments.get("pixel_values")
        if pixels is not None and len(pixels) != images and pixels.dim() == 5:
            pixels = pixels.flatten(0, 1)  # tiles of all samples
        return None if pixels is None or len(pixels) != images else pixels

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """(V, 4) left, top, right and bottom edge of an image's tokens, as shares of the image.

        NaN stands for tokens that show no pixels, such as newlines. The image is what one entry of
        the features was made from: the whole image, or a tile where each tile counts as an image;
        for a video, the token's frame.

        Args:
            modality: `image` or `video`.
            number: which of the images of this modality; negative, counted from the last, where
                the arguments may be those of a whole conversation.
            shape: its tokens, grid and frames, from `shapes`.
            arguments: those named in `placed_by`, as far as they were given.
        """
        return cells_of(shape)

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Which images of a row are tiles of one image, in order; each is one by default.

        Args:
            ids: the row's token ids, if they are known.
            spans: first column of each image, and the first after it.
        """
        return [Tiling(1)] * len(spans)

    # -- the vision encoder

    @property
    def encoder(self) -> Encoder | None:
        """The vision encoder, or `None` if methods cannot look inside it."""
        return None

    @property
    def beyond(self) -> str:
        """Why methods cannot act in encoder layers after `feature_layer`."""
        return f"what reads the encoder of this {self.model_type} sees"

    def side(self, modality: str) -> int:
        """Side of a visual token in patches: the model merges cells of them after the encoder."""
        return 1

    def tower_side(self, modality: str, arguments: Mapping[str, Any]) -> int:
        """The same in a call of the tower.

        Args:
            modality: `image` or `video`.
            arguments: what the tower is called with.
        """
        return self.side(modality)

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Why patches do not belong to one visual token each, if so; methods cannot act inside the
        encoder then.

        Args:
            modality: `image` or `video`.
            arguments: what features are to be made from; empty if unknown.
        """
        return ""

    @property
    def unread(self) -> str:
        """Why nothing can be read of an encoder that methods cannot look into, if that is known."""
        return self.mixing("image", {})

    @property
    def vision_layers(self) -> int:
        """Number of encoder layers; 0 if methods cannot look inside."""
        return 0 if self.encoder is None else len(self.encoder.layers)

    @property
    def vision_width(self) -> int:
        """Width of the encoder's states; 0 if methods cannot act inside."""
        if self.encoder is None or self.encoder.block is None:
            return 0
        return getattr(self.encoder.layers[0], self.encoder.block.norm1).weight.shape[-1]

    @property
    def vision_frames(self) -> int:
        """Frames that the encoder tells apart in a video; 0 if it encodes images."""
        return 0

    @property
    def class_token(self) -> bool:
        """Whether the encoder has a class token that methods can read."""
        return self.encoder is not None and self.encoder.class_token

    @property
    def feature_layer(self) -> int:
        """0-based encoder layer whose output the language model sees; of several, the deepest.

        It is the one after `hidden_states[vision_feature_layer]`, whose entry 0 is the embedding.
        """
        names = ("vision_feature_layer", "vision_feature_layers")  # VipLLaVA before 5.23
        given = next((v for n in names if (v := getattr(self.config, n, None)) is not None), -1)
        layers = [given] if isinstance(given, int) else given
        return max(i - 1 if i >= 0 else self.vision_layers + i for i in layers)

    def per_token(
        self, modality: str, rows: Any, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """(C, V) of what the encoder says of its patches, for the visual tokens of each image.

        A token made of a cell of patches gets their mean.

        Args:
            modality: `image` or `video`.
            rows: (N, C, P) of the P patches of all N images, tiles or frames that went through
                the encoder; where these lie in one sequence, (C, V) of each.
            arguments: what the features were made from.
            newline: what tokens get that are no patches.
        """
        side = self.side(modality)
        if side == 1 or not isinstance(rows, Tensor):
            return list(rows)
        return cell_means(rows, raster_rows(*self.grid(rows.shape[-1]), side))

    def projector(self, modality: str) -> Any:
        """The module that makes one visual token of each row it is given; `None` if there is none,
        because tokens are made of several rows or mixed afterwards.

        Args:
            modality: `image` or `video`.
        """
        return None

    def late_projector(self, modality: str) -> Any:
        """The module that the base model puts what `get_image_features` returns through, its
        `last_hidden_state`, before it places that in the prompt; `None` where features are returned
        as they are placed, as `pooler_output`.

        Args:
            modality: `image` or `video`.
        """
        return None

    def unprojected(
        self, modality: str, rows: Tensor, lengths: Sequence[int], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """(V, C) what the projector is given for the visual tokens of each image.

        Tokens that it does not make, such as newlines, get zeros; all of an image whose tokens are
        mixed after it get NaN.

        Args:
            modality: `image` or `video`.
            rows: (..., C) what it is given.
            lengths: visual tokens of each image.
            arguments: what the features were made from.
        """
        return rows.reshape(-1, rows.shape[-1]).split(list(lengths))

    def follow(
        self, modality: str, surviving: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """(V) whether each visual token survives; of each image, or of all after one another.

        Args:
            modality: `image` or `video`.
            surviving: (C) whether the tokens of each image, tile or frame that went through the
                encoder are.
            arguments: what the features were made from.
        """
        return surviving

    def sources(self, modality: str, count: int, arguments: Mapping[str, Any]) -> Tensor:
        """(V) which token of the encoder, of all images after one another, each visual token of
        all images stands for; a token that is made of none, such as a newline, for the last before.

        Args:
            modality: `image` or `video`.
            count: visual tokens of all images.
            arguments: what the features were made from.
        """
        return torch.arange(count)

    def _child(self, parent: nn.Module, path: str) -> Any:
        child: Any = parent
        for name in path.split(".") if path else ():
            child = getattr(child, name, None)
            if child is None:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} has no {path!r} in {type(parent).__name__}: the "
                    f"installed transformers lays out {self.config.model_type!r} in a way this "
                    "version of foveate does not know"
                )
        return child
