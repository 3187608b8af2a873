"""The `foveate` object of a response: what was removed for a request, and what that saved."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from foveate.errors import InputError
from foveate.measure.account import account, of_row, unpruned
from foveate.measure.flops import kv_bytes
from foveate.record.record import Record, by_image, site_name
from foveate.report.draw import show_stages
from foveate.run import Session


def summarise(session: Session, row: int, prompt_tokens: int) -> dict[str, Any]:
    """What a session did to one row of the batch that it saw last, as it would be alone.

    Args:
        session: attached or left.
        row: row of the batch, 0-based.
        prompt_tokens: of the row, without padding.

    Returns:
        `visual_tokens`: `before`, and `after` the last step.
        `flops`: of the language model on the prompt, and with all tokens (`prefill_all`).
        `kv_bytes`: of the cache after the prompt, `now` and with `all` tokens.
    """
    family, seen = session.family, session.record
    if seen is None or not seen.images:  # text passed through, of which the record tells no rows
        own = Record(1, [prompt_tokens], [], [], [])
    else:
        own = of_row(seen, row)
    record = _filled(own, family.text_layers)
    whole, dtype = unpruned(record), session._model.dtype
    before, after = record.visual_tokens(0)
    return {
        "visual_tokens": {"before": before, "after": after},
        "flops": {
            "prefill": account(record, family, session.methods).prefill,
            "prefill_all": account(whole, family).prefill,
        },
        "kv_bytes": {
            "now": kv_bytes(family, record.cache_slots, 1, dtype),
            "all": kv_bytes(family, whole.cache_slots, 1, dtype),
        },
    }


def draw(session: Session, row: int, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """What each step kept of each image of a row: counts, and drawings as data URLs.

    A stage whose tokens cannot be placed on the image has a `picture` of `None`, and says why in
    `note`.
    """
    if not images:
        return []
    assert session.record is not None  # a prompt has passed
    record = of_row(session.record, row)
    try:
        drawn: Sequence[dict[str, Image.Image]] = show_stages(record, images)
        note = None
    except InputError as error:
        drawn, note = [{}] * len(images), str(error)
    groups = by_image(record.images)
    if len(groups) != len(images):  # each tile was given as an image
        groups = [[image] for image in record.images]
    return [
        {
            "before": sum(tile.total for tile in tiles),
            "stages": [
                {
                    "site": site,
                    "name": site_name(site),
                    "kept": sum(len(tile.kept[site]) for tile in tiles),
                    "picture": _data_url(panels.get(site)),
                    **({} if note is None else {"note": note}),
                }
                for site in tiles[0].kept
            ],
        }
        for tiles, panels in zip(groups, drawn, strict=True)
    ]


def _filled(record: Record, layers: int) -> Record:
    """With what a prompt without images passed through untouched."""
    if record.layer_tokens:
        return record
    tokens = [list(record.prompt_tokens)] * layers
    return replace(record, layer_tokens=tokens, cache_slots=[record.prompt_tokens[0]] * layers)


def _data_url(picture: Image.Image | None) -> str | None:
    if picture is None:
        return None
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
