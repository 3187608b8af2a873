"""What a method would do on a model, without running it: a record made from counts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from foveate.core.counting import TokenCount
from foveate.core.step import Step
from foveate.core.tokens import Shape
from foveate.core.video import VideoMethod
from foveate.engine.inputs import of_shapes
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.total import Room
from foveate.errors import UnsupportedModelError
from foveate.families import Family
from foveate.measure.shapes import TextShape
from foveate.measure.trace import trace
from foveate.record.record import ImageRecord, Record


def fed(family: Family, processor: Any, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """What image features are made from, as an image processor makes it of blank images, with
    shapes of floating-point tensors only.

    Args:
        family: the model.
        processor: its image processor.
        images: how many.
        size: width and height of each.
    """
    blank = Image.new("RGB", size, (127, 127, 127))
    inputs = processor(images=[blank] * images, return_tensors="pt")
    names = ("num_", "rows", "cols")  # for the prompt
    given = {n: v for n, v in inputs.items() if not n.startswith(names)}
    return of_shapes(family.fed(given))


def planned(
    family: Family, plan: Plan, arguments: Mapping[str, Any], text_tokens: int = 64
) -> Record:
    """The record of one prompt, as it would be if every step kept what it promises.

    Args:
        family: the model, whose weights are not looked at.
        plan: methods on it. Of an adaptive method, `keep` decides; without one, all tokens stay.
        arguments: what image features are made from, as `fed` gives them.
        text_tokens: of the prompt; all count as after the images.

    Raises:
        UnsupportedModelError: a step acts inside an encoder in which images differ in size.
        BudgetError: the plan's total leaves less than one token for each image.
    """
    traced = trace(family, "image", arguments)
    shapes = traced.shapes
    if not shapes:
        raise UnsupportedModelError(
            f"{family.model_type!r} is an encoder alone, for which no prompt can be planned"
        )
    stream = _Stream(family, shapes, plan)
    encoder_tokens = _inside(family, plan, traced, stream)
    layer_tokens = [[text_tokens + seen] for seen in _seen_by_layers(family, plan, stream)]
    shared = family.last_llm_layer + 1  # layers from here on see the last token alone
    layer_tokens[shared:] = [[1]] * (family.text_layers - shared)
    images = [ImageRecord(0, s.total, s.grid, k) for s, k in zip(shapes, stream.kept, strict=True)]
    return Record(
        rows=1,
        prompt_tokens=[text_tokens + sum(shape.total for shape in shapes)],
        images=images,
        layer_tokens=layer_tokens,
        cache_slots=_held(family, plan, layer_tokens, text_tokens),
        text_only_layers=plan.text_only_layers,
        evicted_before=max((step.layer for step in _evictions(plan)), default=0),
        last_tokens_from=shared if shared < family.text_layers else None,
        encoder_tokens=encoder_tokens,
        encoder_bounds=[None] * len(encoder_tokens),
        encoded={"image": arguments},
        projected=stream.projected,
        question_tokens=text_tokens,
        embedding=family.embedding,
    )


class _Stream:
    """The tokens of images on their way through a model."""

    def __init__(self, family: Family, shapes: Sequence[Shape], plan: Plan) -> None:
        self.family, self.shapes = family, shapes
        self.last_before = plan.pre_llm[-1] if plan.pre_llm else None
        self.total = plan.total[0] if isinstance(plan.total, tuple) else plan.total
        self.images = [TokenCount(shape.total) for shape in shapes]
        self.kept: list[dict[str, torch.Tensor]] = [{} for _ in shapes]  # entry -> (K,) positions
        self.projected: dict[str, int] = {}  # modality -> rows that are projected once more

    @property
    def tokens(self) -> int:
        """Surviving tokens of all images."""
        return sum(image.tokens for image in self.images)

    def act(self, step: PlannedStep) -> None:
        """Keep of each image what a step promises."""
        for image, shape, kept in zip(self.images, self.shapes, self.kept, strict=True):
            if not (isinstance(step.method, VideoMethod) and shape.frames == 1):
                image.take(step.method, step.step, step.number, step.method_number)
            kept[step.entry] = torch.arange(min(image.tokens, shape.total))
        if step is self.last_before and self.total is not None:
            self._share(step, self.total)
        if step.step.before_projector and self.family.projector("image") is not None:
            self.projected["image"] = self.projected.get("image", 0) + self.tokens

    def _share(self, step: PlannedStep, total: int) -> None:
        """Divide a total among the images, after the step that keeps to it.

        Raises:
            BudgetError: there is not one token for each image.
        """
        counts = Room([total], [[]]).share(0, [image.tokens for image in self.images])[1]
        for image, kept, count in zip(self.images, self.kept, counts, strict=True):
            image.tokens = count
            kept[step.entry] = kept[step.entry][:count]


def _seen_by_layers(family: Family, plan: Plan, stream: _Stream) -> list[int]:
    """Visual tokens that each decoder layer sees."""
    for step in plan.pre_llm:
        stream.act(step)
    seen = []
    for layer in range(family.text_layers):
        for step in (s for s in plan.llm if s.step.layer == layer):
            stream.act(step)
        seen.append(stream.tokens)
    return seen


def _evictions(plan: Plan) -> list[Step]:
    """Steps in the text model that evict from the caches of the layers before them."""
    return [s.step for s in plan.llm if "evict_cache" in s.step.effects]


def _held(
    family: Family, plan: Plan, layer_tokens: Sequence[Sequence[int]], text_tokens: int
) -> list[int]:
    """Slots that caches hold: what layers saw, less what they evict, within windows.

    Which tokens of a window are evicted depends on the tokens; counted is the most that may stay.
    """
    slots = [tokens[0] for tokens in layer_tokens]
    for step in _evictions(plan):
        slots[: step.layer] = [slots[step.layer]] * step.layer
    for layer in plan.text_only_layers:
        slots[layer] = text_tokens
    shapes = TextShape.all(family)
    return [shape.mixer.held(count) for shape, count in zip(shapes, slots, strict=True)]


def _inside(family: Family, plan: Plan, traced: Any, stream: _Stream) -> list[tuple[int, int]]:
    """Rows that each encoder layer sees; the stream goes on with what survives the encoder."""
    if not plan.vision:
        return []
    encoder = family.encoder
    assert encoder is not None  # the plan has checked it
    totals = [image.tokens for image in stream.images]
    if encoder.packed is not None or len(set(totals)) > 1:
        raise UnsupportedModelError(
            f"what {plan.vision[0].method.slug} does inside the encoder of {family.model_type!r} "
            "depends on the images; run it and read the report instead"
        )
    _, full = traced.rows
    cell = family.side("image") ** 2  # rows of a token
    image = TokenCount((full - encoder.special) // cell)
    cells, rows = image.tokens, []
    for layer in range(len(encoder.layers)):
        before = after = image.tokens * cell + encoder.special
        for step in (s for s in plan.vision if s.step.layer == layer):
            left = image.tokens
            if not (step.method.adaptive and step.method.keep is None):
                left = image.take(step.method, step.step, step.number, step.method_number)
            if "around" in step.step.effects:
                left = step.method.entering(left, step.step)
            after = left * cell + encoder.special
            before = before if step.step.inside else after
            for kept, total in zip(stream.kept, totals, strict=True):
                kept[step.entry] = torch.arange(total * image.tokens // cells)
        rows.append((before, after))
    stream.images = [TokenCount(total * image.tokens // cells) for total in totals]
    return rows
