"""Steps: where a method acts on a model, what it needs there, and what layers need not compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Stage = Literal["vision", "pre_llm", "llm"]
Positions = Literal["original", "renumbered"]
Effect = Literal[
    "proportional",
    "ragged",
    "attend",
    "look",
    "around",
    "exit",
    "keep_positions",
    "evict_cache",
    "reinsert",
    "decode",
    "training",
]
STAGES: tuple[Stage, ...] = ("vision", "pre_llm", "llm")


class ModelFacts(Protocol):
    """The numbers of a model that a method may plan with."""

    @property
    def text_layers(self) -> int:
        """Number of decoder layers of the text model."""

    @property
    def vision_layers(self) -> int:
        """Number of layers of the vision encoder."""

    @property
    def vision_width(self) -> int:
        """Width of the states of the vision encoder; 0 if methods cannot act inside."""

    @property
    def vision_frames(self) -> int:
        """Frames that the vision encoder tells apart in a video of the length that it is made for;
        0 if it does not encode videos as such, or methods cannot act inside.
        """

    @property
    def text_width(self) -> int:
        """Width of the embeddings that the language model is given; 0 without one."""

    @property
    def model_type(self) -> str:
        """The config's model type."""

    @property
    def one_dimensional(self) -> bool:
        """Whether positions are single numbers, so that survivors can be renumbered."""

    @property
    def first_llm_layer(self) -> int:
        """First decoder layer before which tokens may be removed."""

    @property
    def last_llm_layer(self) -> int:
        """Last decoder layer before which tokens may be removed."""

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Decoder layers that see the whole sequence, so that their attention can rank tokens."""

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """How each decoder layer mixes tokens, in transformers' words."""

    @property
    def keyed_layers(self) -> tuple[int, ...]:
        """Decoder layers that make keys and values of single tokens."""

    @property
    def recurrent_layers(self) -> frozenset[int]:
        """Decoder layers that mix tokens into a running state."""

    @property
    def keyless_layers(self) -> frozenset[int]:
        """Decoder layers in which no token attends to another, recurrent ones among them."""

    @property
    def feature_layer(self) -> int:
        """0-based encoder layer whose output the language model sees."""

    @property
    def class_token(self) -> bool:
        """Whether the encoder has a class token that methods can read."""


@dataclass(frozen=True)
class Need:
    """A signal that a step asks the engine for.

    Args:
        name: a key of `foveate.signals.SIGNALS`.
        layers: 0-based layers at which it is taken (of the encoder or of the text model, as the
            signal says).
        global_threshold: for `global_attention`, how many times the mean attention a patch must
            receive to be global.
    """

    name: str
    layers: tuple[int, ...] = ()
    global_threshold: float = 0.0


@dataclass(frozen=True)
class Step:
    """One reduction at one site.

    Args:
        stage: `vision` (inside the encoder), `pre_llm` (after the projector) or `llm` (between
            decoder layers).
        layer: for `vision` and `llm`, the 0-based layer before which the step acts.
        needs: signals handed to the method there.
        inside: for `vision`, act within the layer instead, between its attention and its MLP.
        before_projector: for `pre_llm`, merge what the projector is given and project that, on
            models whose projector makes one token of each row; on others, merge after it.
        whole: for `pre_llm`, and in the encoder for `attend` and `around`, read whole grids of
            tokens, which must not lack any.
        merges: for `pre_llm`, make a token of several after the projector.
        effects: what else the step does, for the few methods that want it.

    Effects:
        proportional: in the encoder, a merged token counts as often as it has sources in all
            attention after the step.
        ragged: in the encoder, images that are encoded together may be left different numbers of
            tokens (`Reduction.valid`). Padding stays until the method's last step makes the counts
            equal, if it does; until then no other method acts in the encoder. Before layer 0,
            images in one sequence, or padded by the model, get no padding of this kind.
        attend: in the encoder, `Method.attend` computes the attention of the layer; tokens that the
            step removes are removed after that.
        look: in the encoder, with `attend`: the step removes nothing, and no record has an entry
            of it.
        around: in the encoder, fewer rows go through the layer: what `Method.enter` makes of all
            tokens. `Method.leave` says what becomes of all of them. Nothing is removed.
        exit: in an encoder alone, tokens that the step removes come back after the last layer;
            `Method.reinsert` says in which state. The method is asked even where it keeps all. What
            it has noted in its memory is in `Record.results`.
        keep_positions: between decoder layers, survivors stay at their positions, whatever the
            method does elsewhere.
        evict_cache: between decoder layers, the caches of the layers before evict what is dropped.
        reinsert: between decoder layers, the tokens that the method's step before this one took out
            come back; `Method.reinsert` says in which state.
        training: the step acts in training alone; see `foveate.core.learning`.
        decode: between decoder layers, the step acts on the tokens that are generated: the layers
            from `layer` on attend to what the method, a `DecodeSelector`, chooses by the layer
            before.
    """

    stage: Stage
    layer: int = 0
    needs: tuple[Need, ...] = ()
    inside: bool = False
    before_projector: bool = field(default=False, kw_only=True)
    whole: bool = field(default=False, kw_only=True)
    merges: bool = field(default=False, kw_only=True)
    effects: tuple[Effect, ...] = field(default=(), kw_only=True)

    @property
    def site(self) -> str:
        """Its name in reports: `vision:LAYER`, `pre_llm`, `llm:LAYER` or `decode:LAYER`."""
        if "decode" in self.effects:
            return f"decode:{self.layer}"
        return self.stage if self.stage == "pre_llm" else f"{self.stage}:{self.layer}"

    @property
    def in_stream(self) -> tuple[int, int, bool]:
        """Sorts steps as tokens pass them."""
        return STAGES.index(self.stage), self.layer, self.inside


def entries(steps: Sequence[Step]) -> list[str]:
    """The name of each step in records: its site, which says what survives from there on; of
    several steps at one site, that of the last. Those before it are `llm:8#1`, `llm:8#2`. A step
    that only looks has no name, nor has one of training.

    Args:
        steps: in stream order.
    """
    nameless = {"look", "training"}
    sites = ["" if nameless & {*step.effects} else step.site for step in steps]
    total, seen = Counter(sites), Counter[str]()
    names = []
    for site in sites:
        if not site:
            names.append("")
            continue
        seen[site] += 1
        names.append(site if seen[site] == total[site] else f"{site}#{seen[site]}")
    return names


def site_of(entry: str) -> tuple[str, int, int]:
    """Stage and layer of a name that `entries` made, and its number; 0 for the last at a site.

    Examples:
        >>> site_of("llm:8#1"), site_of("pre_llm")
        (('llm', 8, 1), ('pre_llm', 0, 0))
    """
    site, _, number = entry.partition("#")
    stage, _, layer = site.partition(":")
    return stage, int(layer or 0), int(number or 0)


@dataclass(frozen=True)
class PartialCompute:
    """What a decoder layer computes of visual tokens; none is removed.

    Args:
        layer: 0-based decoder layer.
        window: odd side of the neighbourhood on the grid that a visual token attends to, later
            tokens included; besides that it sees the text before it.
        heads: which attention heads work on visual tokens; `None` for all. Others neither compute
            them nor let text read them.
        mlp_divisor: visual tokens pass the first 1 / `mlp_divisor` of the MLP's neurons.
        reads_visual: whether any head reads values of visual tokens.
        renormalize: whether what a head does not read leaves its softmax; else its probability is
            lost.
    """

    layer: int
    window: int
    heads: tuple[bool, ...] | None = None
    mlp_divisor: float = 1.0
    reads_visual: bool = True
    renormalize: bool = True

    @property
    def visual_blind(self) -> bool:
        """Whether some head does not read visual tokens."""
        return not self.reads_visual or (self.heads is not None and not all(self.heads))

    @property
    def text_only_cache(self) -> bool:
        """Whether no head has anything to do with visual tokens of earlier forwards."""
        nobody = not self.reads_visual or (self.heads is not None and not any(self.heads))
        return nobody and self.renormalize


def budgeted(steps: Iterable[Step]) -> int:
    """How many steps act outside of training, which are those that a budget is for."""
    return sum("training" not in step.effects for step in steps)
