"""Reduce image features after the projector, and mark what was removed.

A removed token is a row of NaN in features of full length, so that placeholder counts, packing and
beam expansion see what they expect. The text model's first layer drops marked rows; a path that
forgets to fails loudly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core import Need, Reduction
from foveate.core.reduction import take_rows
from foveate.core.transfer import upload
from foveate.engine.apply_step import apply_step
from foveate.engine.features import EncoderOutputInfo, feature_rows, put_sheets, starts_of
from foveate.engine.features import sheets as sheets_of
from foveate.engine.images import ImageGroup, ImageState, group_images
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.prompt import PromptContext
from foveate.engine.total import Room, check_kept, limited, ranking
from foveate.errors import LayerError
from foveate.signals import SIGNALS, PromptSignal
from foveate.signals.signal import over_layers


def mark(
    output: Any, plan: Plan, prompt: PromptContext, deliver: Callable[[str, Tensor], Tensor]
) -> None:
    """Run all pre_llm steps on the tokens that survive the encoder, in place and once.

    Args:
        output: tagged output; its features, and DeepStack planes if it has them, get their removed
            rows marked.
        plan: the session's plan.
        prompt: what is known of the prompt.
        deliver: brings a signal (G, L, C, V) of the encoder into its shape.
    """
    source = prompt.source
    if output.marked:
        return
    output.marked = True
    if not plan.marks:
        return
    encoded: EncoderOutputInfo = output.encoded
    shapes = [encoded.shapes[i] for i in source]
    lengths = [shape.total for shape in shapes]
    sheets = sheets_of(output)
    rows_of_sheets = [feature_rows(sheet) for sheet in sheets]
    starts = starts_of(output, source)
    images = [_of_each(sheet, starts, lengths) for sheet in rows_of_sheets]
    if encoded.projector is not None:
        images.append([encoded.unprojected[i] for i in source])
    device, surviving = rows_of_sheets[0].device, encoded.surviving(source)
    groups = group_images(prompt.images, shapes, device, surviving)
    current = [
        _FeatureGroup(group, [_of_group(sheet, group) for sheet in images]) for group in groups
    ]
    projected: list[int] = []
    again = replace(encoded, projector=_noting(encoded, projected))
    for planned in plan.pre_llm:
        room = prompt.room if planned is plan.pre_llm[-1] else None
        current = [
            after
            for before in (current if room is None else _limited(current, planned, room))
            for after in _step(planned, before, again, prompt, deliver, ranked=room is not None)
        ]
    states = _states(current)
    without = prompt.without_text if plan.asks_embeddings else ()
    output.encoded = replace(
        encoded, states=states, unprojected=(), projected=sum(projected), without_text=without
    )
    fewer = sum(state.count for state in states) < sum(lengths)
    if fewer or any(after.changed for after in current):  # a merge may keep the count
        marked = _marked(rows_of_sheets, current, starts)
        put_sheets(output, list(map(_like, sheets, marked)))


def _of_each(sheet: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Sequence[Tensor]:
    """(V, D) rows of each image in a sheet."""
    return [sheet[start : start + n] for start, n in zip(starts, lengths, strict=True)]


@dataclass(frozen=True, eq=False)
class _FeatureGroup:
    """A group of images and the features of their surviving tokens.

    Args:
        group: the images.
        sheets: (G, V, D) their values on each sheet: the features first, which methods see; then
            DeepStack planes; what the projector was given is last, if methods merge that.
        changed: whether a step has removed, merged or ordered any of them.
        order: (G, V) as in `Image`.
    """

    group: ImageGroup
    sheets: list[Tensor]
    changed: bool = False
    order: Tensor | None = None

    def pick(self, part: ImageGroup) -> list[Tensor]:
        """(G, V, D) values of some of the images, on each sheet."""
        if len(part.images) == len(self.group.images):
            return self.sheets
        member = {number: i for i, number in enumerate(self.group.numbers)}
        members = [member[number] for number in part.numbers]
        return [x.index_select(0, upload(members, x.device)) for x in self.sheets]


def _limited(
    current: Sequence[_FeatureGroup], planned: PlannedStep, room: Room
) -> list[_FeatureGroup]:
    """Groups whose images know how many tokens they may have, see `foveate.engine.total`."""
    groups = limited([of.group for of in current], planned, room)
    return [replace(of, group=group) for of, group in zip(current, groups, strict=True)]


def _states(groups: Sequence[_FeatureGroup]) -> list[ImageState]:
    """The state of each image, in order of appearance."""
    ordered = any(of.group.ordered for of in groups)
    states = {
        image.number: ImageState(
            count=of.group.count,
            tokens_at_start=image.tokens_at_start,
            labels={method: label[i] for method, label in of.group.labels.items()},
            index=of.group.index[i] if ordered else None,
            kept=image.kept,
            order=None if of.order is None else of.order[i],
        )
        for of in groups
        for i, image in enumerate(of.group.images)
    }
    return [states[number] for number in sorted(states)]


def _marked(
    sheets: Sequence[Tensor], groups: Sequence[_FeatureGroup], starts: Sequence[int]
) -> list[Tensor]:
    """Sheets (N, D) of all images, of which each begins somewhere, that hold the surviving tokens,
    and else NaN.
    """
    rows = []
    for each in groups:
        first = upload([starts[number] for number in each.group.numbers], sheets[0].device)
        rows.append(each.group.index.sort().values + first[:, None])
    where = torch.cat([row.flatten() for row in rows])
    marked = []
    for number, sheet in enumerate(sheets):
        values = torch.cat([each.sheets[number].flatten(0, 1) for each in groups])
        marked.append(torch.full_like(sheet, torch.nan).index_copy(0, where, values))
    return marked


def _noting(encoded: EncoderOutputInfo, rows: list[int]) -> Callable[[Tensor], Tensor] | None:
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
    of: _FeatureGroup,
    encoded: EncoderOutputInfo,
    prompt: PromptContext,
    deliver: Callable[[str, Tensor], Tensor],
    *,
    ranked: bool,
) -> list[_FeatureGroup]:
    """What one step makes of a group; `ranked` says whether its survivors are."""
    needs = planned.step.needs

    def features(part: ImageGroup) -> Tensor:
        return of.pick(part)[0]

    def signals(part: ImageGroup) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for need in needs:
            signal = SIGNALS[need.name]
            if isinstance(signal, PromptSignal):
                value, masks = signal.of_prompt(prompt, part)
                found |= {need.name: value, **masks}
            else:
                found[need.name] = deliver(need.name, _signal(need, encoded, prompt.source, part))
        return found

    def order(part: ImageGroup, after: ImageGroup) -> Tensor:
        check_kept(after, planned)
        known = signals(part)
        return ranking(planned, part, after, lambda: features(part), known)

    unasked = prompt.without_query(needs, of.group)
    parts = apply_step(planned, of.group, features, signals, unasked, prompt.training)
    return [
        _FeatureGroup(
            after,
            _apply(planned, reduction, of.pick(part), encoded.projector),
            of.changed or reduction is not None,
            order(part, after) if ranked else None,
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
            it cannot be told and has no columns once something has been merged after it.
        projector: as in `EncoderOutputInfo`.

    Raises:
        LayerError: the step merges before the projector what was merged after it.
    """
    if reduction is None:
        return sheets
    planes = replace(reduction, values=None)
    made = [reduction.apply(sheets[0]), *(planes.apply(x) for x in sheets[1:])]
    if projector is None or not reduction.merges or reduction.values is not None:
        return made
    if not planned.step.before_projector:
        made[-1] = made[-1][..., :0]
        return made
    if not made[-1].shape[-1]:
        raise LayerError(
            f"{planned.method.slug} merges what the projector is given, but a method before it has "
            f"merged tokens after the projector; put {planned.method.slug} first"
        )
    known = ~made[-1].isnan().any(-1, keepdim=True)
    altered = reduction.altered(sheets[0].shape[1])[..., None] & known
    projected = projector(made[-1].masked_fill(~known, 0.0))
    made[0] = torch.where(altered, projected.to(made[0]), made[0])
    return made


def _signal(
    need: Need, encoded: EncoderOutputInfo, source: Sequence[int], part: ImageGroup
) -> Tensor:
    """(G, L, C, V) of a group, at its surviving tokens."""
    images = [
        [encoded.signals[need.name, layer][source[i]] for layer in need.layers]
        for i in part.numbers
    ]
    rows = torch.stack([over_layers(need, image, 0) for image in images])
    index = part.index[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1)
    return rows.gather(3, index.to(rows.device))


def _of_group(sheet: Sequence[Tensor], group: ImageGroup) -> Tensor:
    """(G, K, D) of the surviving tokens of a group; a view where it is one unpruned image."""
    one = len(group.images) == 1
    x = sheet[group.numbers[0]][None] if one else torch.stack([sheet[i] for i in group.numbers])
    return x if not group.dropped else take_rows(x, group.index)


def _like(pooled: Any, rows: Tensor) -> Any:
    """(N, D) in the container that `pooled` is."""
    if isinstance(pooled, Tensor):
        return rows.view(pooled.shape)
    parts = rows.split([feature.shape[:-1].numel() for feature in pooled])
    return [part.view(feature.shape) for part, feature in zip(parts, pooled, strict=True)]
