"""Small methods that reach corners of the engine which the built-in ones do not.

They are not registered, so that nothing lists them.
"""

from dataclasses import dataclass

import torch

from foveate.core import (
    Adaptive,
    Keep,
    Learning,
    Method,
    Need,
    Reduction,
    Scorer,
    Step,
    by_count,
    get_method,
    list_methods,
)
from foveate.core.decode_selector import DecodeChoice, DecodeSelector
from foveate.ops.saliency import SIGNALS as SALIENCY


def readers_methods():
    """Names of the methods for models that have a language model, sorted."""
    return [name for name in list_methods() if not get_method(name).encoders_alone]


def learning_methods():
    """Names of the methods that do something else in training, sorted."""
    return [name for name in readers_methods() if issubclass(get_method(name), Learning)]


def needed(cls, family):
    """Names of the signals that a method needs on a family; some need one of two."""
    needs = set(cls.needs)
    if needs >= {*SALIENCY}:
        needs.remove(SALIENCY[family.class_token])
    return needs


# Methods inside the encoder that images in one sequence, or padded ones, are refused to.
ONE_BY_ONE = {"gtp-vit", "token-transforming", "zero-tprune"}


@dataclass(frozen=True)
class EveryThird(Scorer):
    """Positions 0, 3, 6, ... first, then 1, 4, ...: known indices, no signal."""

    keep: Keep = 12
    positions: str = "original"
    slug, stage, needs, paper = "every-third", "pre_llm", (), ""

    def steps(self, model):
        return (Step("pre_llm"),)

    def scores(self, tokens):
        position = tokens.index.float()
        return -(position % 3) * 1000 - position


@dataclass(frozen=True)
class Latest(Scorer):
    """The last tokens of each image: known indices, no signal."""

    keep: Keep = 12
    positions: str = "original"
    slug, stage, needs, paper = "latest", "pre_llm", (), ""

    def steps(self, model):
        return (Step("pre_llm"),)

    def scores(self, tokens):
        return tokens.index.float()


@dataclass(frozen=True)
class Average(Method):
    """Merge every run of neighbours into its first token, inside the language model."""

    layer: int = 2
    keep: Keep = 0.5
    positions: str = "original"
    slug, stage, needs, paper = "average", "llm", (), ""

    def steps(self, model):
        return (Step("llm", self.layer),)

    def reduce(self, tokens, count):
        images, length = tokens.index.shape
        part = torch.arange(length) * count // length
        weights = torch.nn.functional.one_hot(part, count).T.float()
        weights = weights / weights.sum(1, keepdim=True)
        first = torch.searchsorted(part, torch.arange(count))
        return Reduction(first.expand(images, -1), weights.expand(images, -1, -1))


@dataclass(frozen=True)
class Listed(Scorer):
    """Before an encoder layer, keep the patches at positions 0, 3, 6, ... first; no signal."""

    layer: int = 1
    keep: Keep = 12
    positions: str | None = None
    inside: bool = False
    slug, stage, needs, paper = "listed", "vision", (), ""

    def steps(self, model):
        return (Step("vision", self.layer, inside=self.inside),)

    def scores(self, tokens):
        position = tokens.index.float()
        return -(position % 3) * 1000 - position


@dataclass(frozen=True)
class Mix(Method):
    """Mix patches into fewer with a random dense matrix."""

    layer: int = 1
    keep: Keep = 9
    positions: str | None = None
    slug, stage, needs, paper = "mix", "vision", (), ""

    def steps(self, model):
        return (Step("vision", self.layer, inside=True),)

    def reduce(self, tokens, count):
        images, length = tokens.index.shape
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(images, count, length, generator=generator).softmax(-1)
        return Reduction(torch.arange(count).expand(images, -1), weights)


@dataclass(frozen=True)
class Forgetful(Scorer):
    """Drop before a layer what the last token attends to least, from the caches before it too."""

    layer: int = 3
    keep: Keep = 0.25
    positions: str = "original"
    slug, stage, needs, paper = "forgetful", "llm", ("text_attention",), ""

    def steps(self, model):
        return (
            Step(
                "llm",
                self.layer,
                (Need("text_attention", (self.layer,)),),
                effects=("evict_cache",),
            ),
        )

    def scores(self, tokens):
        return tokens.signal("text_attention")[:, 0].mean(1)


@dataclass(frozen=True)
class Labelling(Adaptive):
    """Turn the tokens around and label them with their positions; later keep even labels."""

    ordered: bool = True
    keep: None = None
    positions: str = "renumbered"
    slug, stage, needs, paper = "labelling", "pre_llm", (), ""

    def steps(self, model):
        return (Step("pre_llm"), Step("llm", 2, effects=("keep_positions",)))

    @property
    def step_count(self):
        return 2

    def reduce_each(self, tokens):
        if tokens.site == "pre_llm":
            index = torch.arange(tokens.count - 1, 2, -1).expand(len(tokens.index), -1)
            index = index if self.ordered else index.flip(1)
            whole = Reduction(index, ordered=self.ordered, label=tokens.index.gather(1, index))
            return [(range(len(index)), whole)]
        assert torch.equal(tokens.label, tokens.index)
        even = tokens.label % 2 == 0
        return [
            (members, Reduction(even[members].nonzero()[:, 1].view(-1, count)))
            for count, members in by_count(even.sum(1)).items()
        ]


@dataclass(frozen=True)
class Glance(Method, DecodeSelector):
    """A new token sees the half that it attends to most of what the one before did not see."""

    layer: int = 3
    keep: Keep = 1.0
    positions: str = "original"
    slug, stage, needs, paper = "glance", "llm", (), ""

    def steps(self, model):
        return (Step("llm", self.layer, effects=("decode",)),)

    def reduce(self, tokens, count):
        raise AssertionError("a step on decoding removes nothing")

    def choose(self, attention, real, before):
        now = attention.mean(1)
        rank = now.double() if before is None else now.double() - before.seen.double()
        order = rank.masked_fill(~real, -9.0).argsort(dim=-1, descending=True, stable=True)
        half = torch.arange(real.shape[1]) < real.sum(1, keepdim=True) // 2
        return DecodeChoice(now, torch.zeros_like(real).scatter(1, order, half))
