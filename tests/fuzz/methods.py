"""Methods of a cell: random legal fields, where they act, and how many tokens they may leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import foveate

Fields = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What methods are drawn by.

    Args:
        depth: decoder layers.
        seers: layers that see the whole sequence.
        first: the first layer before which tokens may be removed.
        one_dimensional: whether positions are single numbers.
        rows: rows of the batch.
        pixels: whether the encoder runs.
        class_token: whether it has a class token.
        flat: whether images are no videos.
        windowed: whether every layer sees a window, which FEATHER's ranking without positions does
            not know.
        free: layers before which no other method acts.
    """

    depth: int
    seers: tuple[int, ...]
    first: int
    one_dimensional: bool
    rows: int
    pixels: bool
    class_token: bool
    flat: bool
    windowed: bool
    free: frozenset[int]


@dataclass(frozen=True)
class Kind:
    """A method that cells use.

    Args:
        draw: makes its fields.
        rounding: from share to count.
        where: `encoder` (its features are taken from each row alone), `pre_llm` or `llm`.
        rank: how the oracle chooses by itself; `None` if it is told what was kept.
        original: whether survivors stay at their positions where nothing is said.
        exact: whether `keep` says how many are left.
        asks: whether it depends on the prompt.
        drop: field that names its decoder layers.
    """

    draw: Callable[[Random, Facts], Fields]
    rounding: Callable[[float], int] = math.floor
    where: str = "pre_llm"
    rank: str | None = None
    original: bool = False
    exact: bool = True
    asks: bool = False
    drop: str = ""


# -- fields


def share(r: Random) -> float | int:
    """A share or a count."""
    return r.choice([round(r.uniform(0.05, 1), 2), r.randint(1, 20), 0.25, 0.5, 1.0])


def schedule(r: Random, entries: int) -> Any:
    """One entry for each drop, none of which grows."""
    if r.random() < 0.3:
        made = sorted((r.randint(1, 16) for _ in range(entries)), reverse=True)
    else:
        made = sorted((round(r.uniform(0.05, 1), 2) for _ in range(entries)), reverse=True)
    return made


def keep(r: Random, facts: Facts, entries: int = 0) -> Any:
    """Any form of `keep`; with 0 entries, one for a method that acts once."""
    one: Callable[[], Any] = (lambda: schedule(r, entries)) if entries else (lambda: share(r))
    if r.random() < 0.15:
        return {"per_request": [one() for _ in range(facts.rows)]}
    return one()


def layers(r: Random, facts: Facts, ranked: bool, after: int = 0, least: int = 0) -> list[int]:
    """Layers before which tokens are removed, from `least` on; `after` of 1 if the layer before
    each one ranks.

    Now and then one at which this is not possible.
    """
    legal = [
        layer
        for layer in range(max(facts.first, after, least), facts.depth)
        if layer in facts.free and (not ranked or layer - after in facts.seers)
    ]
    if r.random() < 0.03:
        legal = list(range(facts.depth))
    return sorted(r.sample(legal, min(len(legal), r.choice([1, 1, 2, 3]))))


def simple(r: Random, facts: Facts) -> Fields:
    return {"keep": keep(r, facts)}


def seeded(r: Random, facts: Facts) -> Fields:
    return {"keep": keep(r, facts), "seed": r.randint(0, 99)}


def unscheduled(r: Random, facts: Facts) -> Fields:
    return {"keep": share(r)}


def one_layer(ranked: bool, after: int) -> Callable[[Random, Facts], Fields]:
    def draw(r: Random, facts: Facts) -> Fields:
        found = layers(r, facts, ranked, after)
        return {"layer": found[0], "keep": keep(r, facts)} if found else {}

    return draw


def many_layers(ranked: bool, after: int, least: int = 0) -> Callable[[Random, Facts], Fields]:
    def draw(r: Random, facts: Facts) -> Fields:
        found = layers(r, facts, ranked, after, least)
        return {"layers": found, "keep": keep(r, facts, len(found))} if found else {}

    return draw


def feather(r: Random, facts: Facts) -> Fields:
    found = layers(r, facts, True, 1)
    if not found:
        return {}
    budget = keep(r, facts, len(found) if r.random() < 0.5 else 0)
    return {"layers": found, "keep": budget, "stride": r.choice([None, 2, 3])}


def catp(r: Random, facts: Facts) -> Fields:
    found = layers(r, facts, True, 1)
    return {"layers": found, "keep": schedule(r, len(found) + 1)} if found else {}


def todre(r: Random, facts: Facts) -> Fields:
    found = layers(r, facts, False, 1)
    return {"keep": share(r), "drop_layer": found[0]} if found else {}


def prumerge(r: Random, facts: Facts) -> Fields:
    return {"plus": r.random() < 0.5, "neighbours": r.randint(2, 6)}


def tome(r: Random, facts: Facts) -> Fields:
    return r.choice([{"keep": round(r.uniform(0.3, 0.9), 2)}, {"r": r.randint(1, 3)}])


KINDS = {
    "random": Kind(seeded),
    "uniform": Kind(simple),
    "divprune": Kind(simple, round),
    "cdpruner": Kind(simple, asks=True),
    "downsample": Kind(simple, exact=False),
    "fastervlm": Kind(simple, round),
    "vtc-cls": Kind(simple),
    "hiprune": Kind(simple, round),
    "visionzip": Kind(unscheduled, round, "encoder", exact=False),
    "llava-prumerge": Kind(prumerge, where="encoder", exact=False),
    "tome": Kind(tome, where="encoder", exact=False),
    "fastv": Kind(one_layer(True, 1), round, "llm", "before", True, asks=True, drop="layer"),
    "pyramiddrop": Kind(
        many_layers(True, 0), math.trunc, "llm", "same", asks=True, drop="layers"
    ),
    "feather": Kind(
        feather, math.trunc, "llm", "content", True, asks=True, drop="layers", exact=False
    ),
    "adatoken-3d": Kind(
        many_layers(True, 0), math.trunc, "llm", "same", asks=True, drop="layers"
    ),
    "catp": Kind(catp, round, asks=True, drop="layers", exact=False),
    "todre": Kind(todre, asks=True, drop="drop_layer", exact=False),  # its record is needed
    "dart": Kind(one_layer(False, 1), where="llm", original=True, asks=True, drop="layer"),
    "transprune": Kind(
        many_layers(True, 0, 1), math.trunc, "llm", asks=True, drop="layers"
    ),
    "flowcut-inner": Kind(
        many_layers(True, 1), where="llm", asks=True, drop="layers"
    ),
}  # fmt: skip
CLASS_TOKEN = {"fastervlm", "vtc-cls", "llava-prumerge"}
ENCODED = {*CLASS_TOKEN, "hiprune", "visionzip", "tome"}


@dataclass(frozen=True)
class Chosen:
    """A method and its fields, as JSON has them."""

    slug: str
    fields: Fields

    @property
    def kind(self) -> Kind:
        """What is known of the method."""
        return KINDS[self.slug]

    @property
    def drops(self) -> list[int]:
        """Decoder layers before which it removes tokens."""
        given = self.fields.get(self.kind.drop, [])
        return [given] if isinstance(given, int) else list(given)

    @property
    def begins(self) -> tuple[int, int]:
        """Where it begins, to be compared."""
        stage = ("encoder", "pre_llm", "llm").index(self.kind.where)
        if self.slug == "tome":  # it acts within the encoder, the others after it
            return -1, 0
        return stage, self.drops[0] if self.drops else 0

    def renumbers(self, one_dimensional: bool) -> bool:
        """Whether what follows moves up."""
        policy = self.fields.get("positions")
        if not one_dimensional:
            return False
        return policy == "renumbered" or (policy is None and not self.kind.original)

    def build(self) -> Any:
        """The method."""
        fields = {name: _value(name, value) for name, value in self.fields.items()}
        return foveate.get_method(self.slug)(**fields)

    def count(self, total: int, alive: int, entry: int, row: int) -> int:
        """Tokens of an image that a step leaves, by the definition of `keep`.

        Args:
            total: what the image had where the method began.
            alive: what it has before the step.
            entry: which of the method's steps.
            row: row of the batch.
        """
        budget = self.fields["keep"]
        if isinstance(budget, dict):
            budget = budget["per_request"][row]
        base = total
        if isinstance(budget, list):
            budget = budget[entry]
        elif self.slug == "feather":
            base = alive  # a share of what is left, squared from the second drop on
            if entry and self.fields["stride"] and isinstance(budget, float):
                budget *= budget
        wanted = budget if isinstance(budget, int) else self.kind.rounding(base * budget)
        return min(max(int(wanted), 1), alive)


def _value(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return foveate.per_request([_value(name, one) for one in value["per_request"]])
    return tuple(value) if isinstance(value, list) else value


def draw(r: Random, facts: Facts, asks: str = "any") -> list[Chosen]:
    """One to three methods in stream order.

    Args:
        r: the cell's.
        facts: of the cell.
        asks: which methods may ask the prompt: `any`, those that the oracle `ranked`, or `none`.
    """
    names = [
        slug
        for slug, kind in KINDS.items()
        if (not kind.asks or asks == "any" or (asks == "ranked" and kind.rank))
        and (facts.pixels or slug not in ENCODED)
        and not (facts.windowed and slug == "feather")
        and (facts.class_token or slug not in CLASS_TOKEN or r.random() < 0.05)
    ]
    chosen: list[Chosen] = []
    free = set(facts.free)
    for _ in range(r.choice([1, 1, 1, 2, 2, 3])):
        slug = r.choice(names)
        kind = KINDS[slug]
        # What a method merges before the language model, the oracle takes from a row alone, and
        # cannot follow through another method there.
        mixes = slug == "downsample" or kind.where == "encoder"
        early = [c for c in chosen if c.kind.where != "llm"]
        if kind.where != "llm" and early and (mixes or merges(early)):
            continue
        if slug == "downsample" and (chosen or not facts.flat):
            continue
        now = Facts(**{**vars(facts), "free": frozenset(free)})
        fields = kind.draw(r, now)
        if not fields:
            continue
        policy = r.choice([None, None, "original", "renumbered"])
        if policy == "renumbered" and not facts.one_dimensional and r.random() < 0.9:
            policy = None
        one = Chosen(slug, {**fields, "positions": policy})
        chosen.append(one)
    if not chosen:
        return draw(r, facts, asks)
    if len(chosen) > 1:
        chosen = [_in_raster_order(one) for one in chosen]
    return sorted(chosen, key=lambda c: c.begins)


def merges(chosen: Sequence[Chosen]) -> bool:
    """Whether methods merge tokens before the language model."""
    return any(c.slug == "downsample" or c.kind.where == "encoder" for c in chosen)


def _in_raster_order(chosen: Chosen) -> Chosen:
    """The same where later methods must know which token stands where: merged tokens that move up
    stand in an order of the method's own, which no record tells.
    """
    if chosen.slug not in ("visionzip", "llava-prumerge"):
        return chosen
    return Chosen(chosen.slug, {**chosen.fields, "positions": "original"})
