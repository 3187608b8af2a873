"""Recording: what a forward over a prompt did, written down when it leaves the text model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from foveate.engine import features
from foveate.engine.cache import slots_held
from foveate.engine.features import EncoderOutputInfo
from foveate.engine.forward import Turn
from foveate.engine.tags import Tags
from foveate.engine.vision.hooks import VisionPart
from foveate.record.record import ImageRecord, Record


def describe(
    turn: Turn, output: Any, encoded: Mapping[str, Any], vision: VisionPart | None, tags: Tags
) -> Record | None:
    """The record of a forward; `None` of a decoding step, which has none.

    Args:
        turn: the forward.
        output: the text model's, with the cache that it filled.
        encoded: modality -> its features, a tagged ModelOutput, whole or a slice.
        vision: the part that shortens the stream inside the encoder, if one does.
        tags: what tagged the features.
    """
    prompt = turn.prompt
    if not prompt.groups:
        if prompt.past or prompt.length <= 1:
            return None
        note = "no image in the prompt: it passed through untouched"
        return Record(prompt.batch, turn.tokens, [], [], [], notes=[note])
    sliced = any(features.is_slice(of) for of in encoded.values())
    cache = output.past_key_values
    known = {} if sliced else {modality: of.encoded for modality, of in encoded.items()}
    return Record(
        rows=prompt.batch,
        prompt_tokens=turn.prompt_tokens,
        images=[] if sliced else _images(turn),
        layer_tokens=turn.layer_tokens,
        cache_slots=[] if cache is None else [slots_held(layer) for layer in cache.layers],
        evicted_before=turn.evicted_before,
        unread=turn.plan.unread,
        pixels=known["image"].pixels if "image" in known else None,
        encoder_tokens=[] if vision is None else vision.tokens,
        encoder_bounds=[] if vision is None else vision.bounds,
        encoded={modality: of.fed for modality, of in known.items() if of.fed},
        projected={modality: of.projected for modality, of in known.items() if of.projected},
        question_tokens=turn.looks.question_tokens,
        common_tokens=turn.common_tokens,
        notes=["chunked prefill: kept tokens are not reported"] * sliced
        + tags.notes(encoded)
        + _without_text(turn, known.values()),
    )


def _without_text(turn: Turn, known: Iterable[EncoderOutputInfo]) -> list[str]:
    """That methods which rank by the text after an image found none."""
    rows = {*turn.looks.without_text, *(row for of in known for row in of.without_text)}
    if not rows:
        return []
    return [
        f"no text follows an image of row {', '.join(map(str, sorted(rows)))}: "
        f"{', '.join(turn.plan.without_text)} went by the prompt's last token instead"
    ]


def _images(turn: Turn) -> list[ImageRecord]:
    """What was kept of each image, in order of appearance."""
    images = {image.number: (image, group) for group in turn.groups for image in group.images}
    return [
        ImageRecord(
            row=image.row,
            total=group.shape.total,
            grid=group.shape.grid,
            kept=dict(image.kept),
            locate=image.locate,
            frames=group.shape.frames,
        )
        for _, (image, group) in sorted(images.items(), key=lambda item: item[0])
    ]
