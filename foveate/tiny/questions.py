"""Questions with one right answer about a scene, and the pixel boxes that hold the evidence.

Whatever is asked is decided by a margin: an object near the border between two places, or two
objects almost equally far to the left, give no question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from foveate.tiny.objects import Box, SceneObject
from foveate.tiny.words import COLOURS, KINDS, PLACES, RELATIONS, SHAPES, WORDS

PER_KIND = 4
"""Most questions of one kind in one scene, unless told otherwise."""

_EDGE = 3.0  # pixels an object's centre keeps from the border of its place
_BAND = 9.0  # "left of": the answer's centre is at most this far above or below
_NEAR = 18.0  # ... and nothing else within this band
_LEAD = 8.0  # ... comes this close to being the nearest one
_MOST = 6  # largest count that is asked for


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Args:
        text: what is asked, in lower case, ending in " ?".
        answer: one word of the vocabulary.
        kind: the group it belongs to, a key of `KINDS_OF_QUESTION`.
        boxes: pixel boxes that together hold the evidence; empty where the answer is about
            absence ("no", "0").
    """

    text: str
    answer: str
    kind: str
    boxes: tuple[Box, ...]


class _Facts:
    """What a scene shows, indexed the ways the questions need it."""

    def __init__(
        self,
        objects: tuple[SceneObject, ...],
        size: int,
        rng: Random,
        per_kind: int,
        scale: int = 1,
    ) -> None:
        self.objects, self.size, self.rng, self.per_kind = objects, size, rng, per_kind
        self.scale = scale
        self.kinds = Counter(o.kind for o in objects)
        self.colours = Counter(o.colour for o in objects)
        self.pairs = Counter((o.colour, o.kind) for o in objects)

    def named(self) -> list[SceneObject]:
        """Objects that "the COLOUR KIND" names without doubt, shuffled."""
        found = [o for o in self.objects if self.pairs[o.colour, o.kind] == 1]
        self.rng.shuffle(found)
        return found


def ask(
    objects: tuple[SceneObject, ...],
    size: int,
    rng: Random,
    per_kind: int = PER_KIND,
    scale: int = 1,
) -> tuple[Question, ...]:
    """Ask a few questions of every kind.

    Args:
        objects: what the scene shows.
        size: edge of the canvas in pixels.
        rng: source of every choice.
        per_kind: most questions of one kind.
        scale: how many times larger the scene is drawn than usual.

    Returns:
        The questions, grouped by kind. A kind is missing where nothing can be asked clearly.
    """
    facts = _Facts(objects, size, rng, per_kind, scale)
    asked: list[Question] = []
    for maker in KINDS_OF_QUESTION.values():
        found = list(dict.fromkeys(maker(facts)))
        rng.shuffle(found)
        asked += found[:per_kind]
    return tuple(asked)


def _color(facts: _Facts) -> Iterator[Question]:
    for o in facts.objects:
        if facts.kinds[o.kind] == 1:
            yield Question(f"what color is the {o.kind} ?", o.colour, "color", (o.box,))


def _shape(facts: _Facts) -> Iterator[Question]:
    for o in facts.objects:
        if facts.colours[o.colour] == 1 and o.kind in SHAPES:
            yield Question(f"what shape is the {o.colour} object ?", o.kind, "shape", (o.box,))


def _number(facts: _Facts) -> Iterator[Question]:
    written = Counter(o.colour for o in facts.objects if o.kind.isdecimal())
    for o in facts.objects:
        if written[o.colour] == 1 and o.kind.isdecimal():
            yield Question(f"what number is {o.colour} ?", o.kind, "number", (o.box,))


def _word(facts: _Facts) -> Iterator[Question]:
    written = Counter(o.colour for o in facts.objects if o.kind in WORDS)
    for o in facts.objects:
        if written[o.colour] == 1 and o.kind in WORDS:
            yield Question(f"what word is {o.colour} ?", o.kind, "word", (o.box,))


def _place(facts: _Facts, o: SceneObject, margin: float) -> set[str]:
    """Every place the object's centre is in, or within `margin` pixels of."""
    cells = []
    for value in o.centre:
        reach = (value - margin * facts.scale, value + margin * facts.scale)
        cells.append({min(2, max(0, int(3 * v // facts.size))) for v in reach})
    return {PLACES[3 * row + column] for column in cells[0] for row in cells[1]}


def _where(facts: _Facts) -> Iterator[Question]:
    for o in facts.named():
        places = _place(facts, o, _EDGE)
        if len(places) == 1:
            text = f"where is the {o.colour} {o.kind} ?"
            yield Question(text, places.pop(), "where", (o.box,))


def _alone(facts: _Facts) -> Iterator[tuple[str, SceneObject]]:
    """Places that clearly hold exactly one object."""
    reach = [(_place(facts, o, _EDGE), o) for o in facts.objects]
    for place in PLACES:
        held = [(places, o) for places, o in reach if place in places]
        if len(held) == 1 and len(held[0][0]) == 1:
            yield place, held[0][1]


def _place_color(facts: _Facts) -> Iterator[Question]:
    for place, o in _alone(facts):
        text = f"what color is at the {place} ?"
        yield Question(text, o.colour, "place-color", (o.box,))


def _place_object(facts: _Facts) -> Iterator[Question]:
    for place, o in _alone(facts):
        yield Question(f"what is at the {place} ?", o.kind, "place-object", (o.box,))


def _exists(facts: _Facts) -> Iterator[Question]:
    """As many "yes" as "no"; a "no" names a colour and a kind that are both there, but apart."""
    there = list(facts.pairs)
    apart = [(c, k) for c in facts.colours for k in facts.kinds if (c, k) not in facts.pairs]
    rng = facts.rng
    half = min(max(1, facts.per_kind // 2), len(there), len(apart))
    picked = rng.sample(there, half) + rng.sample(apart, half)
    for colour, kind in picked:
        boxes = tuple(o.box for o in facts.objects if (o.colour, o.kind) == (colour, kind))
        article = "an" if colour == "orange" else "a"
        answer = "yes" if boxes else "no"
        yield Question(f"is there {article} {colour} {kind} ?", answer, "exists", boxes)


def _count(facts: _Facts) -> Iterator[Question]:
    """One colour for every count that occurs, so that large counts are asked as often."""
    by_count: dict[int, list[str]] = {}
    for colour in COLOURS:
        by_count.setdefault(facts.colours[colour], []).append(colour)
    for count, colours in by_count.items():
        if count <= _MOST:
            colour = facts.rng.choice(colours)
            boxes = tuple(o.box for o in facts.objects if o.colour == colour)
            text = f"how many {colour} objects are there ?"
            yield Question(text, str(count), "count", boxes)


def _neighbour(facts: _Facts, anchor: SceneObject, way: tuple[int, int]) -> SceneObject | None:
    """The nearest object straight in a direction, if no other comes close to being it."""
    dx, dy = way
    near, lead, band = (width * facts.scale for width in (_NEAR, _LEAD, _BAND))
    ahead = []
    for o in facts.objects:
        x, y = o.centre[0] - anchor.centre[0], o.centre[1] - anchor.centre[1]
        along, across = x * dx + y * dy, abs(x * dy + y * dx)
        if o is not anchor and across <= near and along > -lead:
            ahead.append((along, across, o))
    ahead.sort(key=lambda item: item[0])
    if not ahead or ahead[0][0] < lead or ahead[0][1] > band:
        return None
    clear = len(ahead) == 1 or ahead[1][0] - ahead[0][0] >= lead
    return ahead[0][2] if clear else None


def _beside(facts: _Facts) -> Iterator[tuple[str, SceneObject, SceneObject]]:
    for anchor in facts.named():
        for phrase, way in RELATIONS.items():
            other = _neighbour(facts, anchor, way)
            if other is not None:
                yield phrase, anchor, other


def _relation_color(facts: _Facts) -> Iterator[Question]:
    for phrase, a, b in _beside(facts):
        text = f"what color is {phrase} the {a.colour} {a.kind} ?"
        yield Question(text, b.colour, "relation-color", (a.box, b.box))


def _relation_object(facts: _Facts) -> Iterator[Question]:
    for phrase, a, b in _beside(facts):
        text = f"what is {phrase} the {a.colour} {a.kind} ?"
        yield Question(text, b.kind, "relation-object", (a.box, b.box))


def _compare(facts: _Facts) -> Iterator[Question]:
    """Is one named object left of (right of, above, below) another? Half are, half are not."""
    named = facts.named()
    for a, b in pairwise(named):
        phrase = facts.rng.choice(list(RELATIONS))
        dx, dy = RELATIONS[phrase]
        ahead = (a.centre[0] - b.centre[0]) * dx + (a.centre[1] - b.centre[1]) * dy
        if abs(ahead) < 2 * _LEAD * facts.scale:
            continue
        text = f"is the {a.colour} {a.kind} {phrase} the {b.colour} {b.kind} ?"
        yield Question(text, "yes" if ahead > 0 else "no", "compare", (a.box, b.box))


KINDS_OF_QUESTION: dict[str, Callable[[_Facts], Iterator[Question]]] = {
    "color": _color,
    "shape": _shape,
    "number": _number,
    "where": _where,
    "place-color": _place_color,
    "place-object": _place_object,
    "exists": _exists,
    "count": _count,
    "relation-color": _relation_color,
    "relation-object": _relation_object,
    "compare": _compare,
    "word": _word,
}
"""Makers of questions by kind. New ones come last: they leave the choices of the others alone."""

ANSWERS = frozenset({"yes", "no", *COLOURS, *KINDS, *PLACES})
"""Every word that can be an answer; counts are among the digits."""
