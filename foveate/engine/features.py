"""Image features: reduce them after the projector, and mark what was removed.

A removed token is a row of NaN in features of full length, so that placeholder counts, packing and
beam expansion see what they expect. The text model's first layer drops marked rows; a path that
forgets to fails loudly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from foveate.clip import ClipQuestions
from foveate.engine.images import Group, Left, group_features, reduce_group
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.question import Question
from foveate.errors import InputError, LayerError
from foveate.method import Need
from foveate.reduction import Reduction, take_rows
from foveate.signals import SIGNALS
from foveate.tokens import Shape


@dataclass(frozen=True, eq=False)
class Encoded:
    """What is known of the images of an encoder output besides their features.

    Args:
        shapes: tokens, grid and frames of each image.
        signals: (signal, encoder layer) -> (C, V) of each image.
        pixels: what the encoder was fed.
        kept: place inside the encoder -> (K) positions of each image alive behind it, ascending.
        arguments: those that say where tokens lie (`Family.placed_by`).
        projector: what makes tokens one by one, if methods merge before it.
        unprojected: (V, C) what it is given for each image.
        mixes: whether tokens of some image are made, or mixed afterwards, several at a time.
        fed: what the features were made from, with shapes of floating-point tensors only.
        projected: rows that the projector was given once more, because they were merged.
        left: what the pre_llm steps have left of each image; empty before they ran.
    """

    shapes: Sequence[Shape]
    signals: Mapping[tuple[str, int], Sequence[Tensor]]
    pixels: Any = None
    kept: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    projector: Any = None
    unprojected: Sequence[Tensor] = ()
    mixes: bool = True
    projected: int = 0
    fed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Visual tokens of each image."""
        return [shape.total for shape in self.shapes]

    def kept_of(self, image: int) -> dict[str, Tensor]:
        """Place inside the encoder -> (K) raster positions of an image alive behind it."""
        return {place: kept[image] for place, kept in self.kept.items()}

    def alive(self, images: Sequence[int]) -> list[Tensor] | None:
        """(K) raster positions that the encoder has left of some images; `None` for all."""
        last = list(self.kept.values())[-1:]
        return [last[0][image] for image in images] if last else None


@functools.cache
def _tagged(kind: Any) -> Any:
    return type(
        f"Foveated{kind.__name__}", (kind,), {"foveated": True, "encoded": None, "marked": False}
    )


def tag(output: Any, encoded: Encoded) -> None:
    """Make an encoder output carry what is known of its images.

    The class survives whatever `generate` does to the output; the attributes are lost when chunked
    prefill slices it, which is how a slice is recognised.
    """
    output.__class__ = _tagged(type(output))  # type: ignore[arg-type]
    output.encoded, output.marked = encoded, False


def is_tagged(output: Any) -> bool:
    """Whether an encoder output went through a session, whole or in part."""
    return getattr(output, "foveated", False)


def is_slice(output: Any) -> bool:
    """Whether the output is a part of a tagged one, as chunked prefill makes them."""
    return is_tagged(output) and output.encoded is None


def members(output: Any, visual: Tensor, expanded: int) -> list[int]:
    """Which image of the encoder each image of a forward is.

    Args:
        output: tagged output; `generate` repeats all images of a row for each of its beams.
        visual: (B, T) placeholders.
        expanded: how often each row was repeated.

    Raises:
        InputError: transformers gives the beams of a row different images.
    """
    lengths = output.encoded.lengths
    if sum(feature.shape[:-1].numel() for feature in output.pooler_output) == sum(lengths):
        return list(range(len(lengths)))
    numbers: list[int] = []
    image = 0
    for count in visual[::expanded].sum(1).tolist():
        of_row = []
        while count > 0:
            of_row.append(image)
            count -= lengths[image]
            image += 1
        numbers += of_row * expanded
    _check_beams(_rows(output.pooler_output), visual[::expanded].sum(1).tolist(), expanded)
    return numbers


def _check_beams(rows: Tensor, counts: Sequence[int], expanded: int) -> None:
    """Refuse features that were repeated one by one, so that beams see each other's images."""
    blocks = rows.split([count * expanded for count in counts])
    beams = torch.cat([block.view(expanded, -1, block.shape[-1]) for block in blocks], dim=1)
    if not torch.equal(beams.nan_to_num(), beams[:1].nan_to_num().expand_as(beams)):
        raise InputError(
            "transformers gives the beams of a row different images on this model if the row has "
            "several; use one beam and one returned sequence, or one image in each row"
        )


@dataclass(frozen=True, eq=False)
class Asker:
    """What is known of the prompt when features are reduced.

    Args:
        rows: row of the batch of each image; any number where nothing depends on it.
        source: which image of the encoder each image is.
        request: batch row to entry of a per-request budget.
        ends: logical column of each image's last token; empty where the prompt is not known.
        question: the text behind the images, and its (B, Q, D) embeddings.
        clip: what is asked, as CLIP embeds it.
        labelled: whether labels say what is asked; images of which nothing is are then left alone.
    """

    rows: Sequence[int]
    source: Sequence[int]
    request: Callable[[int], int]
    ends: Sequence[int] = ()
    question: tuple[Question, Tensor] | None = None
    clip: ClipQuestions | None = None
    labelled: bool = False

    def unasked(self, needs: Sequence[Need], group: Group) -> set[int]:
        """Members of a group about which nothing is asked that a step needs to know."""
        if not self.labelled or all(need.name != "question_embeddings" for need in needs):
            return set()
        assert self.question is not None  # reduction waits until the prompt is known
        question = self.question[0]
        where = (torch.tensor(x, device=question.real.device) for x in (group.rows, group.ends))
        asked = question.mask(*where).any(1).tolist()
        return {i for i, asks in enumerate(asked) if not asks}

    def signals(self, name: str, part: Group) -> dict[str, Tensor]:
        """A signal of the prompt for each image of a group, with masks of all the text there is and
        of what comes before another image.
        """
        if name == "clip_questions":
            assert self.clip is not None  # the session has checked it
            text, mask = self.clip.of([self.request(row) for row in part.rows])
            return {name: text, f"{name}_mask": mask}
        assert self.question is not None  # reduction waits until the prompt is known
        question, embeds = self.question
        following = self._following()
        nexts = [following[place] for place in zip(part.rows, part.ends, strict=True)]
        rows, ends, behind = (
            torch.tensor(values, device=embeds.device) for values in (part.rows, part.ends, nexts)
        )
        mask = question.mask(rows, ends)
        text = embeds[rows].masked_fill(~mask[..., None], 0.0)
        paired = question.paired(rows, ends, behind)
        return {"question_embeddings": text, "question_mask": mask, "paired_mask": paired}

    def _following(self) -> dict[tuple[int, int], int]:
        """(row, end) of an image -> end of the next one in its row."""
        places = sorted(zip(self.rows, self.ends, strict=True))
        return {
            (row, end): after if row == same else torch.iinfo(torch.int64).max
            for (row, end), (same, after) in pairwise([*places, (-1, 0)])
        }


def mark(output: Any, plan: Plan, asker: Asker, deliver: Callable[[str, Tensor], Tensor]) -> None:
    """Run all pre_llm steps on what the encoder has left, in place and once.

    Args:
        output: tagged output; its features, and DeepStack planes if it has them, get their removed
            rows marked.
        plan: the session's plan.
        asker: what is known of the prompt.
        deliver: brings a signal (G, L, C, V) of the encoder into its shape.
    """
    source = asker.source
    if output.marked:
        return
    output.marked = True
    if not plan.marks:
        return
    encoded: Encoded = output.encoded
    shapes = [encoded.shapes[i] for i in source]
    lengths = [shape.total for shape in shapes]
    sheets = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    rows_of_sheets = [_rows(sheet) for sheet in sheets]
    images: list[Sequence[Tensor]] = [sheet.split(lengths) for sheet in rows_of_sheets]
    if encoded.projector is not None:
        images.append([encoded.unprojected[i] for i in source])
    device = rows_of_sheets[0].device
    alive = encoded.alive(source)
    groups = group_features(shapes, asker.rows, asker.ends, device, alive)
    began: list[dict[int, int]] = [{} for _ in source]
    rows: list[int] = []
    again = (
        encoded if encoded.projector is None else replace(encoded, projector=_noting(encoded, rows))
    )
    survivors, ordered = _reduce(plan, images, groups, again, asker, deliver, began)
    left = [
        Left(len(index), begun, labels, index if ordered else None)
        for (index, _, labels), begun in zip(survivors, began, strict=True)
    ]
    output.encoded = replace(encoded, left=left, unprojected=(), projected=sum(rows))
    if sum(image.count for image in left) == sum(lengths) and not ordered:
        return
    starts = [0, *accumulate(lengths[:-1])]
    slots = [index.sort().values for index, _, _ in survivors]
    where = torch.cat([slot + start for slot, start in zip(slots, starts, strict=True)])
    marked = []
    for number, sheet in enumerate(sheets):
        values = torch.cat([values[number] for _, values, _ in survivors])
        blank = torch.full_like(rows_of_sheets[number], torch.nan)
        marked.append(_like(sheet, blank.index_copy(0, where, values)))
    output.pooler_output = marked[0]
    if len(marked) > 1:
        output.deepstack_features = marked[1:]


def _noting(encoded: Encoded, rows: list[int]) -> Callable[[Tensor], Tensor]:
    """The projector, which notes how many rows it is given."""

    def project(x: Tensor) -> Tensor:
        rows.append(x.shape[:-1].numel())
        projected: Tensor = encoded.projector(x)
        return projected

    return project


def _reduce(
    plan: Plan,
    sheets: Sequence[Sequence[Tensor]],
    groups: list[Group],
    encoded: Encoded,
    asker: Asker,
    deliver: Callable[[str, Tensor], Tensor],
    began: list[dict[int, int]],
) -> tuple[list[tuple[Tensor, list[Tensor], dict[int, Tensor]]], bool]:
    """(K) positions of each image's survivors, their (K, D) values on every sheet and their labels,
    in order; and whether that may differ from raster order.

    The first sheet holds the features, which methods see; others (DeepStack) follow it, and what
    the projector was given is the last if methods merge that. `began` is filled in, as in
    `Encoded`.
    """
    begin: dict[tuple[int, int], int] = {}
    alive = [(group, [_of_group(sheet, group) for sheet in sheets]) for group in groups]
    for planned in plan.pre_llm:
        after = []
        for group, xs in alive:
            place = {image: i for i, image in enumerate(group.images)}

            def values(part: Group, xs: Any = xs, place: dict[int, int] = place) -> list[Tensor]:
                if len(part.images) == len(place):
                    return xs
                members = [place[image] for image in part.images]
                return [x[members] for x in xs]

            def first(part: Group, values: Any = values) -> Tensor:
                return values(part)[0]

            def signals(part: Group, needs: Any = planned.step.needs) -> dict[str, Tensor]:
                found: dict[str, Tensor] = {}
                for need in needs:
                    if SIGNALS[need.name].source == "prompt":
                        found |= asker.signals(need.name, part)
                    else:
                        rows = _signal(need, encoded, asker.source, part)
                        found[need.name] = deliver(need.name, rows)
                return found

            unasked = asker.unasked(planned.step.needs, group)
            for part, reduced, reduction in reduce_group(
                planned, group, begin, asker.request, first, signals, unasked
            ):
                made = values(part)
                if reduction is not None:
                    made = _apply(planned, reduction, made, encoded.projector)
                after.append((reduced, made))
        alive = after
    for (method, image), tokens in begin.items():
        began[image][method] = tokens
    result = {
        image: (group.index[i], [x[i] for x in xs], {n: x[i] for n, x in group.labels.items()})
        for group, xs in alive
        for i, image in enumerate(group.images)
    }
    ordered = any(group.ordered for group, _ in alive)
    return [result[i] for i in range(len(sheets[0]))], ordered


def _apply(
    planned: PlannedStep, reduction: Reduction, sheets: Sequence[Tensor], projector: Any
) -> list[Tensor]:
    """(G, K, D) survivors on every sheet, from (G, V, D).

    Args:
        planned: the step.
        reduction: what it made.
        sheets: the features first; with a projector, what that was given last, which is NaN where
            it cannot be told and has no columns once something has been merged behind it.
        projector: as in `Encoded`.

    Raises:
        LayerError: the step merges before the projector what was merged behind it.
    """
    made = [reduction.apply(x) for x in sheets]
    if projector is None or not reduction.merges:
        return made
    if not planned.step.before_projector:
        made[-1] = made[-1][..., :0]
        return made
    if not made[-1].shape[-1]:
        raise LayerError(
            f"{planned.method.slug} merges what the projector is given, but a method before it has "
            f"merged tokens behind the projector; put {planned.method.slug} first"
        )
    known = ~made[-1].isnan().any(-1, keepdim=True)
    altered = reduction.altered(sheets[0].shape[1])[..., None] & known
    projected = projector(made[-1].masked_fill(~known, 0.0))
    made[0] = torch.where(altered, projected.to(made[0]), made[0])
    return made


def _signal(need: Need, encoded: Encoded, source: Sequence[int], part: Group) -> Tensor:
    """(G, L, C, V) of a group, at the tokens alive."""
    images = [
        [encoded.signals[need.name, layer][source[i]] for layer in need.layers] for i in part.images
    ]
    rows = torch.stack([torch.stack(image) for image in images])
    index = part.index[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1)
    return rows.gather(3, index.to(rows.device))


def _of_group(sheet: Sequence[Tensor], group: Group) -> Tensor:
    """(G, K, D) of what is alive of a group; a view where it is one whole image."""
    one = len(group.images) == 1
    x = sheet[group.images[0]][None] if one else torch.stack([sheet[i] for i in group.images])
    return x if group.index.shape[1] == group.shape.total else take_rows(x, group.index)


def _rows(pooled: Any) -> Tensor:
    """All features as (N, D), whatever they come in."""
    if isinstance(pooled, Tensor):
        return pooled.reshape(-1, pooled.shape[-1])
    rows = [feature.reshape(-1, feature.shape[-1]) for feature in pooled]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _like(pooled: Any, rows: Tensor) -> Any:
    """(N, D) in the container that `pooled` is."""
    if isinstance(pooled, Tensor):
        return rows.view(pooled.shape)
    parts = rows.split([feature.shape[:-1].numel() for feature in pooled])
    return [part.view(feature.shape) for part, feature in zip(parts, pooled, strict=True)]
