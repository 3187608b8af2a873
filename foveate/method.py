"""Method and Step: what a paper becomes, and the registry of methods.

A method is a frozen dataclass of the paper's hyper-parameters. It names the steps at which it acts
and decides which visual tokens survive there; slicing is the engine's work.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

from torch import Tensor, nn

from foveate.budget import Keep, check_keep
from foveate.budget import count as budget_count
from foveate.errors import FoveateError, UnknownMethodError, UnsupportedModelError
from foveate.reduction import Reduction
from foveate.tokens import VisualTokens

Stage = Literal["vision", "pre_llm", "llm"]
Positions = Literal["original", "renumbered"]
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
    def model_type(self) -> str:
        """The config's model type."""

    @property
    def one_dimensional(self) -> bool:
        """Whether positions are single numbers, so that survivors can be renumbered."""

    @property
    def first_llm_layer(self) -> int:
        """First decoder layer before which tokens may be removed."""

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Decoder layers that see the whole sequence, so that their attention can rank tokens."""

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
        above: for `global_attention`, how many times the mean attention a patch must receive to be
            global.
    """

    name: str
    layers: tuple[int, ...] = ()
    above: float = 0.0


@dataclass(frozen=True)
class Step:
    """One reduction at one place.

    Args:
        stage: `vision` (inside the encoder), `pre_llm` (after the projector) or `llm` (between
            decoder layers).
        layer: for `vision` and `llm`, the 0-based layer before which the step acts.
        needs: signals handed to the method there.
        inside: for `vision`, act within the layer instead, between its attention and its MLP.
        proportional: for `vision`, let a merged token count as often as it has sources in all
            attention behind this step.
        restore: for `llm`, the tokens that the method's step before this one took out come back
            here; `Method.restore` says in which state.
        stay: for `llm`, leave survivors at their positions, whatever the method does elsewhere.
        decode: for `llm`, act on the tokens that are generated instead: the layers from `layer` on
            attend to what the method chooses (it is a `Focuser`) by the layer before.
        forget: for `llm`, let the caches of the layers before forget what is removed.
        before_projector: for `pre_llm`, merge what the projector is given and project that, on
            models whose projector makes one token of each row; on others, merge behind it.
        ragged: for `vision`, images that are encoded together may be left different numbers of
            tokens (`Reduction.real`), which the method's last step makes equal.
    """

    stage: Stage
    layer: int = 0
    needs: tuple[Need, ...] = ()
    inside: bool = False
    proportional: bool = False
    restore: bool = field(default=False, kw_only=True)
    stay: bool = field(default=False, kw_only=True)
    forget: bool = field(default=False, kw_only=True)
    decode: bool = field(default=False, kw_only=True)
    before_projector: bool = field(default=False, kw_only=True)
    ragged: bool = field(default=False, kw_only=True)

    @property
    def place(self) -> str:
        """Its name in reports: `vision:LAYER`, `pre_llm`, `llm:LAYER` or `decode:LAYER`."""
        if self.decode:
            return f"decode:{self.layer}"
        return self.stage if self.stage == "pre_llm" else f"{self.stage}:{self.layer}"


@dataclass(frozen=True)
class Work:
    """What a decoder layer computes of visual tokens; none is removed.

    Args:
        layer: 0-based decoder layer.
        window: odd side of the neighbourhood on the grid that a visual token attends to, later
            tokens included; besides that it sees the text before it.
        heads: which attention heads work on visual tokens; `None` for all. Others neither compute
            them nor let text read them.
        mlp_divisor: visual tokens pass the first 1 / `mlp_divisor` of the MLP's neurons.
        seen: whether any head reads values of visual tokens.
        renormalize: whether what a head does not read leaves its softmax; else its probability is
            lost.
    """

    layer: int
    window: int
    heads: tuple[bool, ...] | None = None
    mlp_divisor: float = 1.0
    seen: bool = True
    renormalize: bool = True

    @property
    def blind(self) -> bool:
        """Whether some head does not read visual tokens."""
        return not self.seen or (self.heads is not None and not all(self.heads))

    @property
    def unread(self) -> bool:
        """Whether no head has anything to do with visual tokens of earlier forwards."""
        nobody = not self.seen or (self.heads is not None and not any(self.heads))
        return nobody and self.renormalize


class Method(ABC):
    """Base of all methods; subclasses are frozen dataclasses registered with `register`."""

    slug: ClassVar[str]
    stage: ClassVar[Stage]
    needs: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]
    rounding: ClassVar[Callable[[float], int]] = math.floor
    published_positions: ClassVar[Positions] = "renumbered"
    note: ClassVar[str] = ""  # what every report must say of the method
    adaptive: ClassVar[bool] = False  # whether the tokens decide how many of them survive
    keep: Keep | None
    positions: Positions | None

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            BudgetError: `keep` is out of range or of the wrong form.
            FoveateError: `positions` is not a known policy.
        """
        self.check_budget(self.step_count)
        if self.positions not in (None, "original", "renumbered"):
            raise FoveateError(
                "positions must be 'original', 'renumbered' or None, got "
                f"{self.positions!r} in {self.slug}"
            )

    @property
    def step_count(self) -> int | None:
        """Steps the method has whatever the model, or `None` when `keep` decides."""
        return 1

    def check_budget(self, steps: int | None) -> None:
        """Check `keep` against the number of steps; `None` when the model decides that.

        Raises:
            BudgetError: `keep` is out of range or does not fit.
        """
        check_keep(cast(Keep, self.keep), steps)  # which refuses None, with a reason

    def count(self, alive: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """Tokens of one image that survive a step.

        Args:
            alive: tokens it has there.
            total: tokens it had where the method began.
            step: the step, as `steps` made it.
            number: which step of the method it is, 0-based.
            row: row of the batch, for per-request budgets.
        """
        assert self.keep is not None  # methods without a `keep` have their own rule
        rounding = type(self).rounding
        return min(budget_count(self.keep, total, step=number, row=row, rounding=rounding), alive)

    @abstractmethod
    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """The steps of this method on a model, in stream order."""

    @abstractmethod
    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Reduce G images of V tokens to `count` tokens each."""

    def restore(self, tokens: VisualTokens, kept: Tensor, now: Tensor) -> Tensor:
        """States with which all tokens of G images go on where the parked ones come back.

        Args:
            tokens: all V of them, as they were when some were parked.
            kept: (G, K) which of the V were not parked, ascending.
            now: (G, K, D) states of those.

        Returns:
            (G, V, D). By default parked tokens come back as they went.
        """
        return tokens.x.scatter(1, kept[..., None].expand_as(now), now)

    def work(self, model: ModelFacts) -> tuple[Work, ...]:
        """What decoder layers compute of visual tokens, where that is less than everything."""
        return ()

    def learned(self, model: ModelFacts) -> nn.Module | None:
        """New parameters of a method that learns. `prepare` makes them part of the model."""
        return None

    def positions_on(self, model: ModelFacts) -> Positions:
        """What becomes of positions on a model: the field if it is given, else what is published.

        Raises:
            UnsupportedModelError: renumbering is asked for where it has no meaning.
        """
        if model.one_dimensional:
            return self.positions or self.published_positions
        if self.positions == "renumbered":
            raise UnsupportedModelError(
                f"{self.slug} asks for renumbered positions, but {model.model_type} places visual "
                "tokens in time, height and width (M-RoPE), where renumbering has no meaning; use "
                "positions='original' or leave it out"
            )
        return "original"

    def to_dict(self) -> dict[str, Any]:
        """The method and its hyper-parameters as plain JSON values."""
        return {"method": self.slug, **dataclasses.asdict(self)}  # type: ignore[call-overload]


class Scorer(Method):
    """A method that scores tokens and keeps the highest."""

    @abstractmethod
    def scores(self, tokens: VisualTokens) -> Tensor:
        """Return (G, V) scores, higher is kept, for G images of V tokens."""

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the `count` highest scores of each image, in raster order."""
        return Reduction.top(self.scores(tokens), count)


class Adaptive(Method):
    """A method that finds out from the tokens how many of them survive.

    It acts behind the encoder. Its `keep` may be `None`.
    """

    adaptive = True

    def check_budget(self, steps: int | None) -> None:
        """Check `keep` if there is one.

        Raises:
            BudgetError: `keep` is out of range or does not fit.
        """
        if self.keep is not None:
            super().check_budget(steps)

    def count(self, alive: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """As in `Method`, or all without a `keep`; `split` finds it as `tokens.quota`."""
        if self.keep is None:
            return alive
        return super().count(alive, total, step, number, row)

    @abstractmethod
    def split(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """Reduce G images of V tokens, each to a number of its own.

        Returns:
            Members of the G, and their reduction: a part for each number of survivors. Every member
            is in one part.
        """

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Not used: `split` decides the count."""
        raise NotImplementedError(f"{self.slug} decides by itself how many tokens survive")


def by_count(counts: Tensor) -> dict[int, list[int]]:
    """Group images by how many of their tokens survive.

    Args:
        counts: (G) integers.

    Returns:
        Count -> members, both ascending.
    """
    groups: dict[int, list[int]] = {}
    for member, count in enumerate(counts.tolist()):
        groups.setdefault(count, []).append(member)
    return dict(sorted(groups.items()))


_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(
    slug: str, *, stage: Stage, needs: tuple[str, ...] = (), paper: str = ""
) -> Callable[[M], M]:
    """Class decorator that makes a method known under `slug`.

    Args:
        slug: short lower-case name, unique.
        stage: where the method first acts.
        needs: names of the signals it uses, for planning and listing.
        paper: how to cite it, for listings.

    Raises:
        FoveateError: the slug is taken, or the stage is unknown.
    """

    def add(cls: M) -> M:
        known = _REGISTRY.get(slug)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise FoveateError(
                f"method name {slug!r} is taken by {known.__module__}.{known.__qualname__}"
            )
        if stage not in STAGES:
            raise FoveateError(
                f"stage must be one of {', '.join(STAGES)}, got {stage!r} for {slug!r}"
            )
        cls.slug, cls.stage, cls.needs, cls.paper = slug, stage, needs, paper
        _REGISTRY[slug] = cls
        return cls

    return add


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    _load()
    return sorted(_REGISTRY)


def get_method(name: str) -> type[Method]:
    """The method class registered under `name`.

    Raises:
        UnknownMethodError: no such method; the message lists near matches.

    Example:
        >>> get_method("fastv")(layer=2, keep=0.5)
        FastV(layer=2, keep=0.5, positions=None)
    """
    _load()
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name.lower(), _REGISTRY, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(_REGISTRY))}"
    )
    raise UnknownMethodError(f"unknown method {name!r}; {hint}")


@functools.cache
def _load() -> None:
    """Import the built-in methods, and those that other packages offer.

    Raises:
        FoveateError: a package's entry point cannot be loaded.
    """
    import foveate.methods  # noqa: F401  registers every built-in method

    for point in entry_points(group="foveate.methods"):
        try:
            point.load()
        except Exception as error:  # somebody else's code may raise anything
            where = point.dist.name if point.dist else "an installed package"
            raise FoveateError(
                f"{where} offers the method {point.name!r} as {point.value!r}, which cannot be "
                f"loaded ({type(error).__name__}: {error}); repair or uninstall it"
            ) from error
