"""A signal: a tensor that methods can ask for, and all that is known of it.

Each is defined once, in `decoder`, `encoder` or `prompt`: as the function that computes it, under
`define`. The function's name is what methods ask for, its docstring what the docs say. The engine,
the plan and the account of FLOPs ask the object.

Shapes: `G` images, `L` layers, `H` heads, `V` visual tokens, `Q` text tokens after the image up to
the end of the prompt, `D` hidden of the language model, `C` of the encoder, `d` of a head,
`M` segments of a question, `E` of the space that CLIP compares images and texts in; `B` rows, `P`
columns of a row, or pixels of a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from foveate.core.step import Need
from foveate.errors import UnsupportedModelError

if TYPE_CHECKING:
    from foveate.signals.clip import ClipQuestions
    from foveate.signals.layer_view import LayerView
    from foveate.signals.projections import Projections

S = TypeVar("S", bound="Signal")


@dataclass(frozen=True, eq=False, kw_only=True)
class Signal:
    """A signal; the subclasses say how it is computed.

    Args:
        name: what methods ask for.
        doc: shape and meaning.
        layered: whether a need must name layers.
        depends_on_prompt: whether it depends on the text of the prompt.
        text: whether it tells of the text after the image; `question_mask` comes with it.
        clip: whether it lies in CLIP's space.
        class_token: whether the encoder must have a class token.
        varlen: whether encoders have it whose images lie in one sequence.
        global_threshold: whether it goes by `Need.global_threshold`.
        after_layer: whether it is known of a layer once that has run, and not before.
    """

    source: ClassVar[Literal["input", "encoder", "prompt", "decoder"]]
    name: str
    doc: str
    layered: bool = True
    depends_on_prompt: bool = False
    text: bool = False
    clip: bool = False
    class_token: bool = False
    varlen: bool = True
    global_threshold: bool = False
    after_layer: bool = False


def define(kind: type[S], how: str, **facts: Any) -> Callable[[Callable[..., Any]], S]:
    """Function decorator: the signal that a function computes.

    Args:
        kind: the kind of signal.
        how: field of `kind` for the function.
        **facts: other fields of `kind`.
    """

    def make(function: Callable[..., Any]) -> S:
        doc = " ".join((inspect.getdoc(function) or "").split()).removesuffix(".")
        fields: dict[str, Any] = {how: function, **facts}
        return kind(name=function.__name__, doc=doc, **fields)

    return make


def unchanged(values: Tensor, _: Any = None) -> Tensor:
    """Values as they are."""
    return values


# -- costs


def free(_: Any) -> int:
    """FLOPs of what the model computes anyway, or without products of matrices."""
    return 0


def flops_of(signals: Collection[EncoderSignal] | Collection[DecoderSignal], sizes: Any) -> int:
    """FLOPs of signals of one layer, in products of matrices; what they share counts once.

    Args:
        signals: the signals, each once.
        sizes: `EncoderSizes` or `DecoderSizes` of the layer.
    """
    parts = {part for signal in signals for part in signal.shares}
    return sum(part(sizes) for part in (*parts, *(signal.flops for signal in signals)))


def over_layers(need: Need, values: Sequence[Tensor], axis: int = 1) -> Tensor:
    """A signal of several layers, these along an axis.

    Args:
        need: the signal, and its layers.
        values: of each layer.
        axis: where the layers go.

    Raises:
        UnsupportedModelError: layers have different numbers of heads.
    """
    if len({value.shape for value in values}) > 1:
        raise UnsupportedModelError(
            f"{need.name!r} of layers {', '.join(map(str, need.layers))} cannot be put side by "
            "side, since heads of some were pruned; prune as many of each, or read one layer alone"
        )
    return torch.stack(list(values), axis)


@dataclass(frozen=True)
class EncoderSizes:
    """What a signal of an encoder layer costs by.

    Args:
        rows: rows of an image, N.
        pairs: pairs of rows that may see each other.
        width: width of all heads, C.
    """

    rows: int
    pairs: int
    width: int


@dataclass(frozen=True)
class DecoderSizes:
    """What a signal of a decoder layer costs by.

    Args:
        hidden: hidden width, D.
        query: multiply-adds that make the queries of a token, and their gate where there is one.
        keys: multiply-adds that make its keys.
        values: multiply-adds that make its values.
        both: multiply-adds that make both together, as latent attention does.
        queries: width of all query heads, H d.
        held: width of all value heads, Hkv d.
        head: width of a head that is rotated.
        tokens: tokens of a row; visual tokens alone for what is computed `of_input`.
        text: text tokens after the image, Q.
    """

    hidden: int
    query: int
    keys: int
    values: int
    both: int
    queries: int
    held: int
    head: int
    tokens: int
    text: int


# -- of the encoder's input


class EncoderInput(Protocol):
    """A pass through an encoder; `images` are some of its images."""

    def pixels_of(self, images: Any) -> Tensor:
        """(G, V, P) pixels of tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class InputSignal(Signal):
    """A signal that is known before the encoder runs, for steps inside it.

    Args:
        of_images: gives it for some images of a pass.
    """

    source = "input"
    layered: bool = False
    of_images: Callable[[EncoderInput, Any], Tensor]


# -- of the encoder


class InsideLayer(Protocol):
    """An encoder layer that is running, as a step inside it sees it; `images` are some of its
    images.
    """

    def keys(self, images: Any) -> Tensor:
        """(G, 1, H, K, d) keys of tokens: the mean of their rows."""

    def class_attention(self, images: Any) -> Tensor:
        """(G, 1, H, K) attention of the class token to tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderSignal(Signal):
    """A signal of encoder layers.

    Args:
        of_projections: computes (B, C, V), or (N, C) of images in one sequence, from queries and
            keys of a layer; or else
        of_states: makes it of (G, L, V, C) output states of layers, and of the question as CLIP
            embeds it.
        values: whether `of_projections` reads values too.
        shape: brings (G, L, C, V) to the shape of the signal; also given the number of heads.
        newline: what tokens have that are no patches, such as newlines between rows of tiles.
        summed: whether images in one sequence give its sum over queries where others give a mean.
        inside: computes it for a step inside the layer; `None` if such steps cannot have it.
        ahead: whether a step before a layer can have it of that layer; of earlier layers it can
            have all.
        flops: what it costs.
        shares: what computations it shares with others of its layer cost.
    """

    source = "encoder"
    of_projections: Callable[[Projections], Tensor] | None = None
    of_states: Callable[[Tensor, ClipQuestions | None], Tensor] | None = None
    values: bool = False
    shape: Callable[[Tensor, int], Tensor] = unchanged
    newline: float = 0.0
    summed: bool = False
    inside: Callable[[InsideLayer, Any], Tensor] | None = None
    ahead: bool = False
    flops: Callable[[EncoderSizes], int] = free
    shares: tuple[Callable[[EncoderSizes], int], ...] = ()


# -- of the prompt


class PromptContext(Protocol):
    """What is known of the prompt when features are reduced; `images` are some of its images."""

    def clip_segments(self, images: Any) -> tuple[Tensor, Tensor]:
        """(G, M, E) segments of the question in CLIP's space, and (G, M) which are no padding."""

    def text_embeddings(self, images: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(G, Q, D) input embeddings of the text after images, (G, Q) which are no padding, and
        (G, Q) which come before the next image.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptSignal(Signal):
    """A signal that is known before the language model runs.

    Args:
        of_prompt: tells it, and masks that come with it by name.
    """

    source = "prompt"
    layered: bool = False
    of_prompt: Callable[[PromptContext, Any], tuple[Tensor, Mapping[str, Tensor]]]


# -- of the language model


class LayerInput(Protocol):
    """A decoder layer that is about to run."""

    @property
    def view(self) -> LayerView:
        """What it is about to attend with."""

    @property
    def counted_view(self) -> LayerView:
        """The same with positions counted from the first token of each row."""

    @property
    def query_columns(self) -> Tensor:
        """(B, Q) columns of the query tokens."""

    @property
    def text_columns(self) -> Tensor:
        """(B, Q) columns of the text after images."""

    def query_attention(self) -> Tensor:
        """(B, H, Q, P) attention of the query tokens."""

    def text_attention(self) -> Tensor:
        """(B, H, Q, P) attention of the text after images."""

    def at_text(self, states: Tensor) -> Tensor:
        """(B, Q, ...) of (B, P, ...) at the text after images."""

    def final_norm(self, states: Tensor) -> Tensor:
        """States under the language model's last norm."""


class ImageTokens(Protocol):
    """Images of a step, with their surviving tokens."""

    @property
    def columns(self) -> Tensor:
        """(G, V) logical columns of their tokens."""

    @property
    def text_columns(self) -> Tensor:
        """(G, Q) logical columns of the text after them."""

    @property
    def text_mask(self) -> Tensor:
        """(G, Q) which of these are no padding."""

    def positions(self, columns: Tensor) -> Tensor:
        """(G, N) positions in the prompt of (G, N) logical columns."""

    def query_mean(self, values: Tensor) -> Tensor:
        """(G, H, V) of (G, H, Q, V): mean over the query tokens of each image."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderSignal(Signal):
    """A signal of decoder layers, computed in one of four ways.

    Args:
        before_layer: computes it of all columns, from a layer that is about to run.
        of_module: what a module of a running layer adds to it, (B, P), from its (B, P, D) input and
            output and (B, P) which columns belong to the prompt.
        of_input: computes it of each image, (G, Q), from (G, V, D) visual and (G, Q, D) text input
            of the language model and (G, Q) which text is no padding.
        of_positions: tells it of images at a step.
        column_axis: axis of the columns in what is collected; `None` if it has none.
        finish: brings (G, ...) values at an image's tokens to the shape of the signal.
        hidden_value: what tokens get that the caller hides.
        query: whether it tells what query tokens attend to.
        full_attention: whether the layers must see the whole sequence.
        keyed: whether it is made of the layers' keys, values or rotary positions.
        flops: what it costs.
        shares: what computations it shares with others of its layer cost.
    """

    source = "decoder"
    before_layer: Callable[[LayerInput], Tensor] | None = None
    of_module: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    of_input: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    of_positions: Callable[[ImageTokens], Tensor] | None = None
    column_axis: int | None = None
    finish: Callable[[Tensor, ImageTokens], Tensor] = unchanged
    hidden_value: float = 0.0
    query: bool = False
    full_attention: bool = False
    keyed: bool = False
    flops: Callable[[DecoderSizes], int] = free
    shares: tuple[Callable[[DecoderSizes], int], ...] = ()
