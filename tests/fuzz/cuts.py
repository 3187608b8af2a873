"""From what the engine says it kept to what the oracle removes, with places and counts checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tests.fuzz.cell import Cell
from tests.fuzz.methods import Chosen
from tests.fuzz.models import MROPE
from tests.fuzz.oracle import Cut, Disagreement
from tests.fuzz.scene import Claim, Told


def cuts_of(cell: Cell, claim: Claim) -> list[Cut]:
    """What the oracle removes from a row.

    Raises:
        Disagreement: images, places or counts are not what they must be.
    """
    spans = claim.prompt.spans[claim.row]
    if len(claim.told) != len(spans):
        raise Disagreement(f"row {claim.row} has {len(spans)} images, told {len(claim.told)}")
    found: list[Cut] = []
    turns = claim.turn or [0] * len(spans)
    for number, (told, span) in enumerate(zip(claim.told, spans, strict=True)):
        if told is None:
            continue
        if told.total != len(span):
            raise Disagreement(f"an image of {len(span)} tokens is said to have {told.total}")
        image = Image(cell, claim, told, span, claim.asks[number], turns[number])
        found += image.cuts()
    return sorted(found, key=lambda cut: (cut.layer, cut.turn))


class Image:
    """One image of a row.

    Args:
        cell: the cell.
        claim: about the row.
        told: what the engine says of the image.
        span: (V) its columns.
        asks: columns of the tokens that rank.
        turn: its turn of the conversation.
    """

    def __init__(
        self,
        cell: Cell,
        claim: Claim,
        told: Told,
        span: Tensor,
        asks: tuple[int, ...],
        turn: int,
    ) -> None:
        self.cell, self.claim, self.told = cell, claim, told
        self.span, self.asks, self.turn = span, asks, turn
        self.alive = torch.arange(len(span))

    def cuts(self) -> list[Cut]:
        """All that is removed of it, in order."""
        found = [] if all(c.kind.where == "llm" for c in self.cell.methods) else [self._entrance()]
        now: dict[int, int] = {}  # tokens with which each method began
        later: dict[int, int] = {}  # the same, as the oracle finds out where it ranks by itself
        for layer, number, entry, place in self._drops():
            chosen, kept = self.cell.methods[number], self.told.kept.get(place)
            if kept is not None:
                self._check(kept, place)
                if chosen.kind.exact:
                    self._counted(self._budget(number, entry, now)(len(self.alive)), kept, place)
                self.alive = kept
            found.append(self._cut(chosen, layer, entry, kept, self._budget(number, entry, later)))
        return found

    def _entrance(self) -> Cut:
        """What is removed before the language model."""
        before = [c for c in self.cell.methods if c.kind.where != "llm"]
        places = [place for place in self.told.kept if not place.startswith("llm")]
        if not places:
            raise Disagreement("nothing is said of what was removed before the language model")
        kept = self.told.kept[places[-1]]
        self._check(kept, places[-1])
        if len(before) == 1 and before[0].kind.exact:
            size = len(self.span)
            self._counted(before[0].count(size, size, 0, self.claim.row), kept, places[-1])
        self.alive = kept
        renumber = all(self._renumbers(chosen) for chosen in before)
        return Cut(-1, self.span, kept, renumber, turn=self.turn)

    def _drops(self) -> Iterator[tuple[int, int, int, str]]:
        """(layer, number of the method, which of its drops, name) of drops in the language model.

        Raises:
            Disagreement: the engine says that there are others.
        """
        drops = sorted(
            (layer, number, entry)
            for number, chosen in enumerate(self.cell.methods)
            for entry, layer in enumerate(chosen.drops)
        )
        seen: Counter[int] = Counter()
        most = Counter(layer for layer, _, _ in drops)
        named = []
        for layer, number, entry in drops:
            seen[layer] += 1
            later = f"#{seen[layer]}" if seen[layer] < most[layer] else ""
            named.append((layer, number, entry, f"llm:{layer}{later}"))
        said = [place for place in self.told.kept if place.startswith("llm")]
        if said and said != [name for *_, name in named]:
            raise Disagreement(f"places in the language model are {said}")
        return iter(named)

    def _cut(
        self,
        chosen: Chosen,
        layer: int,
        entry: int,
        kept: Tensor | None,
        count: Callable[[int], int],
    ) -> Cut:
        return Cut(
            layer,
            self.span,
            kept,
            self._renumbers(chosen),
            chosen.kind.rank,
            count,
            chosen.fields.get("stride") if entry == 0 else None,
            self.told.grid,
            self.told.frames,
            self.asks,
            self.turn,
            pinned=not self.claim.training,
        )

    def _renumbers(self, chosen: Chosen) -> bool:
        return chosen.renumbers(self.cell.shape.family not in MROPE)

    def _budget(self, number: int, entry: int, begun: dict[int, int]) -> Callable[[int], int]:
        """How many tokens a step leaves of so many."""
        chosen, row = self.cell.methods[number], self.claim.row
        return lambda alive: chosen.count(begun.setdefault(number, alive), alive, entry, row)

    def _check(self, kept: Tensor, place: str) -> None:
        """Kept tokens ascend and were there."""
        if not bool((kept.diff() > 0).all()) or not bool(torch.isin(kept, self.alive).all()):
            raise Disagreement(f"{kept.tolist()} were left at {place} of {self.alive.tolist()}")

    def _counted(self, count: int, kept: Tensor, place: str) -> None:
        """So many were left; in training, nothing may be asked of an image, which then stays."""
        alone = self.claim.training and len(kept) == len(self.alive)
        if len(kept) != count and not alone:
            raise Disagreement(f"{len(kept)} tokens were left at {place}, not {count}")
