"""Recording: what a forward over a prompt did, written down when it leaves the text model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from foveate.engine import features
from foveate.engine.cache_argument import CACHE
from foveate.engine.caches import slots_held
from foveate.engine.features import EncoderOutputInfo
from foveate.engine.forward import ForwardPass
from foveate.engine.tags import Tags
from foveate.families.family import AUDIO
from foveate.record.record import ImageRecord, Record


def describe(
    forward: ForwardPass,
    output: Any,
    encoded: Mapping[str, Any],
    tags: Tags,
    placed: Sequence[int] | None = None,
) -> Record | None:
    """The record of a forward; `None` of a decoding step, which has none.

    Args:
        forward: the forward.
        output: the text model's, with the cache that it filled.
        encoded: modality -> its features, a tagged ModelOutput, whole or a slice.
        tags: what tagged the features.
        placed: images of the encoder that are in the prompt, if not all are.
    """
    prompt = forward.prompt
    if not prompt.groups:
        if prompt.past or prompt.length <= 1:
            return None
        note = "no image in the prompt: it passed through untouched"
        tokens, embedding = forward.tokens, forward.family.embedding
        return Record(prompt.batch, tokens, [], [], [], embedding=embedding, notes=[note])
    sliced = any(features.is_slice(of) for of in encoded.values())
    cache = output.get(CACHE)  # bidirectional text models have none
    fields = {k: v for extension in forward.extensions for k, v in extension.record().items()}
    heard_first = sorted(encoded, key=AUDIO.__ne__)  # what vision encoders say is said last
    known = {} if sliced else {modality: encoded[modality].encoded for modality in heard_first}
    last = next(reversed(known.values()), None)
    return Record(
        rows=prompt.batch,
        prompt_tokens=forward.prompt_tokens,
        images=[] if sliced else _images(forward),
        layer_tokens=forward.layer_tokens,
        last_tokens_from=forward.last_tokens_from,
        cache_slots=[] if cache is None else slots_held(cache.layers),
        pixels=_pixels(known, placed),
        encoder_tokens=list(last.encoder_tokens) if last else [],
        encoder_bounds=list(last.encoder_bounds) if last else [],
        encoded={modality: of.fed for modality, of in known.items() if of.fed},
        projected={modality: of.projected for modality, of in known.items() if of.projected},
        embedding=forward.family.embedding,
        question_tokens=forward.decoder_signals.columns.question_tokens,
        **fields,
        notes=["chunked prefill: kept tokens are not reported"] * sliced
        + tags.notes(encoded)
        + _of_audio(forward)
        + _without_text(forward, known.values()),
    )


def _pixels(known: Mapping[str, EncoderOutputInfo], placed: Sequence[int] | None) -> Tensor | None:
    """Pixels of the images in the prompt, if the encoder was given any."""
    pixels = known["image"].pixels if "image" in known else None
    return pixels if pixels is None or placed is None else pixels[list(placed)]


def _of_audio(forward: ForwardPass) -> list[str]:
    """How audio is listed, and what acts on it alone."""
    if not any(group.audio for group in forward.groups):
        return []
    plan = forward.plan
    steps = (*plan.pre_llm, *plan.llm)
    own = ", ".join(dict.fromkeys(s.method.slug for s in steps if s.audio))
    return [
        "clips of audio are listed as images, and their tokens as visual tokens"
        + f"; {own} acted on them alone" * bool(own)
    ]


def _without_text(forward: ForwardPass, known: Iterable[EncoderOutputInfo]) -> list[str]:
    """That methods which rank by the text after an image found none."""
    rows = {row for of in known for row in of.without_text}
    rows.update(forward.decoder_signals.columns.without_text)
    if not rows:
        return []
    return [
        f"no text follows an image of row {', '.join(map(str, sorted(rows)))}: "
        f"{', '.join(forward.plan.without_text)} went by the prompt's last token instead"
    ]


def _images(forward: ForwardPass) -> list[ImageRecord]:
    """What was kept of each image, in order of appearance."""
    images = {image.number: (image, group) for group in forward.groups for image in group.images}
    return [
        ImageRecord(
            row=image.row,
            total=group.shape.total,
            grid=group.shape.grid,
            kept=dict(image.kept),
            locate=image.locate,
            frames=group.shape.frames,
            audio=image.audio,
        )
        for _, (image, group) in sorted(images.items(), key=lambda item: item[0])
    ]
