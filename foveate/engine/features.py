"""Image features: reduce them after the projector, and mark what was removed.

A removed token is a row of NaN in features of full length, so that placeholder counts, packing and
beam expansion see what they expect. The text model's first layer drops marked rows; a path that
forgets to fails loudly.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from foveate.core import Need, Reduction
from foveate.core.reduction import take_rows
from foveate.core.tokens import Shape
from foveate.engine.images import Group, Left, group_features, note, reduce_group
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.question import Question
from foveate.errors import InputError, LayerError
from foveate.signals import SIGNALS, PromptSignal
from foveate.signals.clip import ClipQuestions


@dataclass(frozen=True, eq=False)
class Encoded:
    """What is known of the images of an encoder output besides their features.

    Args:
        shapes: tokens, grid and frames of each image.
        signals: (signal, encoder layer) -> (C, V) of each image.
        pixels: what the encoder was fed.
        kept: site inside the encoder -> (K) positions of each image alive behind it, ascending.
        arguments: those that say where tokens lie (`Family.placed_by`).
        projector: what makes tokens one by one, if methods merge before it.
        unprojected: (V, C) what it is given for each image.
        mixes: whether tokens of some image are made, or mixed afterwards, several at a time.
        fed: what the features were made from, with shapes of floating-point tensors only.
        without_text: rows in which an image had no text after it that a method asked for.
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
    without_text: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Visual tokens of each image."""
        return [shape.total for shape in self.shapes]

    def kept_of(self, image: int) -> dict[str, Tensor]:
        """Site inside the encoder -> (K) raster positions of an image alive behind it."""
        return {site: kept[image] for site, kept in self.kept.items()}

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


def tokens_of(output: Any, source: Sequence[int]) -> Sequence[Tensor]:
    """(V, D) features of each image of a forward; `source` as `members` gives it."""
    lengths = output.encoded.lengths
    return _rows(output.pooler_output).split([lengths[image] for image in source])


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
        readout: for each image, whether a next token is read from it; empty where none is.
    """

    rows: Sequence[int]
    source: Sequence[int]
    request: Callable[[int], int]
    ends: Sequence[int] = ()
    question: tuple[Question, Tensor] | None = None
    clip: ClipQuestions | None = None
    labelled: bool = False
    readout: Sequence[bool] = ()

    @property
    def without_text(self) -> tuple[int, ...]:
        """Rows in which no text follows an image, and none of it is supervised."""
        return () if self.question is None else self.question[0].without

    def unasked(self, needs: Sequence[Need], group: Group) -> set[int]:
        """Members of a group about which nothing is asked that a step needs to know."""
        if not self.labelled or not any(SIGNALS[need.name].text for need in needs):
            return set()
        assert self.question is not None  # reduction waits until the prompt is known
        question = self.question[0]
        where = (torch.tensor(x, device=question.real.device) for x in (group.rows, group.ends))
        asked = question.mask(*where).any(1).tolist()
        return {i for i, asks in enumerate(asked) if not asks}

    def clip_segments(self, part: Group) -> tuple[Tensor, Tensor]:
        """(G, M, E) segments of the question of each image of a group in CLIP's space, and (G, M)
        which of them are no padding.
        """
        assert self.clip is not None  # the session has checked it
        return self.clip.of([self.request(row) for row in part.rows])

    def text_embeddings(self, part: Group) -> tuple[Tensor, Tensor, Tensor]:
        """(G, Q, D) input embeddings of the text behind each image of a group, and (G, Q) masks of
        all the text there is and of what comes before another image.
        """
        assert self.question is not None  # reduction waits until the prompt is known
        question, embeds = self.question
        following = self._following()
        nexts = [following[place] for place in zip(part.rows, part.ends, strict=True)]
        rows, ends, behind = (
            torch.tensor(values, device=embeds.device) for values in (part.rows, part.ends, nexts)
        )
        mask = question.mask(rows, ends)
        text = embeds[rows].masked_fill(~mask[..., None], 0.0)
        if question.last is not None and bool(text.isnan().any()):
            raise InputError(
                "a method compares visual tokens with the text after them, but none follows an "
                "image, and the prompt ends in a visual token that is encoded apart from it; put "
                "text after the image, or use a method that does not look at the prompt"
            )
        return text, mask, question.paired(rows, ends, behind)

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
    device, alive = rows_of_sheets[0].device, encoded.alive(source)
    groups = group_features(shapes, asker.rows, asker.ends, device, alive, asker.readout)
    living = [_Living(group, [_of_group(sheet, group) for sheet in images]) for group in groups]
    begin: dict[tuple[int, int], int] = {}
    kept: dict[int, dict[str, Tensor]] = defaultdict(dict)
    projected: list[int] = []
    again = replace(encoded, projector=_noting(encoded, projected))
    for planned in plan.pre_llm:
        living = [
            after
            for before in living
            for after in _step(planned, before, begin, again, asker, deliver)
        ]
        for after in living:
            note(after.group, planned.entry, kept)
    left = _left([after.group for after in living], begin, kept)
    without = asker.without_text if plan.asks_embeddings else ()
    output.encoded = replace(
        encoded, left=left, unprojected=(), projected=sum(projected), without_text=without
    )
    fewer = sum(image.count for image in left) < sum(lengths)
    if fewer or any(after.changed for after in living):  # a merge may leave as many as it found
        marked = _marked(rows_of_sheets, living, lengths)
        output.pooler_output, *planes = map(_like, sheets, marked)
        if planes:
            output.deepstack_features = planes


@dataclass(frozen=True, eq=False)
class _Living:
    """The living tokens of a group of images.

    Args:
        group: the images.
        sheets: (G, V, D) their values on each sheet: the features first, which methods see; then
            DeepStack planes; what the projector was given is last, if methods merge that.
        changed: whether a step has removed, merged or ordered any of them.
    """

    group: Group
    sheets: list[Tensor]
    changed: bool = False

    def pick(self, part: Group) -> list[Tensor]:
        """(G, V, D) values of some of the images, on each sheet."""
        if len(part.images) == len(self.group.images):
            return self.sheets
        place = {image: i for i, image in enumerate(self.group.images)}
        members = [place[image] for image in part.images]
        return [x[members] for x in self.sheets]


def _left(
    groups: Sequence[Group],
    begin: Mapping[tuple[int, int], int],
    kept: Mapping[int, Mapping[str, Tensor]],
) -> list[Left]:
    """What is left of each image, in order of appearance; `begin` as in `reduce_group`, `kept` as
    in `note`.
    """
    ordered = any(group.ordered for group in groups)
    began: dict[int, dict[int, int]] = defaultdict(dict)
    for (method, image), tokens in begin.items():
        began[image][method] = tokens
    left = {
        image: Left(
            count=group.index.shape[1],
            began=began[image],
            labels={method: label[i] for method, label in group.labels.items()},
            index=group.index[i] if ordered else None,
            kept=kept[image],
        )
        for group in groups
        for i, image in enumerate(group.images)
    }
    return [left[image] for image in sorted(left)]


def _marked(
    sheets: Sequence[Tensor], living: Sequence[_Living], lengths: Sequence[int]
) -> list[Tensor]:
    """Sheets (N, D) of all images that hold the living tokens, and else NaN."""
    starts = torch.tensor([0, *accumulate(lengths)], device=sheets[0].device)
    rows = [
        each.group.index.sort().values + starts[list(each.group.images), None] for each in living
    ]
    where = torch.cat([row.flatten() for row in rows])
    marked = []
    for number, sheet in enumerate(sheets):
        values = torch.cat([each.sheets[number].flatten(0, 1) for each in living])
        marked.append(torch.full_like(sheet, torch.nan).index_copy(0, where, values))
    return marked


def _noting(encoded: Encoded, rows: list[int]) -> Callable[[Tensor], Tensor] | None:
    """The projector, if methods merge before it, which notes how many rows it is given."""
    projector = encoded.projector
    if projector is None:
        return None

    def project(x: Tensor) -> Tensor:
        rows.append(x.shape[:-1].numel())
        projected: Tensor = projector(x)
        return projected

    return project


def _step(
    planned: PlannedStep,
    living: _Living,
    begin: dict[tuple[int, int], int],
    encoded: Encoded,
    asker: Asker,
    deliver: Callable[[str, Tensor], Tensor],
) -> list[_Living]:
    """What one step leaves of a group; `begin` is filled in, as in `reduce_group`."""
    needs = planned.step.needs

    def features(part: Group) -> Tensor:
        return living.pick(part)[0]

    def signals(part: Group) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for need in needs:
            signal = SIGNALS[need.name]
            if isinstance(signal, PromptSignal):
                value, masks = signal.of_prompt(asker, part)
                found |= {need.name: value, **masks}
            else:
                found[need.name] = deliver(need.name, _signal(need, encoded, asker.source, part))
        return found

    unasked = asker.unasked(needs, living.group)
    parts = reduce_group(planned, living.group, begin, asker.request, features, signals, unasked)
    return [
        _Living(
            after,
            _apply(planned, reduction, living.pick(part), encoded.projector),
            living.changed or reduction is not None,
        )
        for part, after, reduction in parts
    ]


def _apply(
    planned: PlannedStep, reduction: Reduction | None, sheets: list[Tensor], projector: Any
) -> list[Tensor]:
    """(G, K, D) survivors on every sheet, from (G, V, D).

    Args:
        planned: the step.
        reduction: what it made; `None` if nothing is removed.
        sheets: the features first; with a projector, what that was given last, which is NaN where
            it cannot be told and has no columns once something has been merged behind it.
        projector: as in `Encoded`.

    Raises:
        LayerError: the step merges before the projector what was merged behind it.
    """
    if reduction is None:
        return sheets
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
