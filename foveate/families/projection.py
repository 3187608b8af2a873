"""Features of images as the prompt is given them, whoever projects them."""

from __future__ import annotations

from typing import Any

from foveate.families.family import Family


def project(family: Family, modality: str, output: Any) -> None:
    """Put an encoder's output through the late projector, if there is one, so that in every family
    `pooler_output` are the features that the prompt is given.

    Args:
        family: the model.
        modality: `image` or `video`.
        output: what `get_image_features` returns; left alone if that is a tuple.
    """
    rows, projector = getattr(output, "last_hidden_state", None), family.late_projector(modality)
    if projector is not None and rows is not None:
        made = projector(rows.reshape(-1, rows.shape[-1]))
        output.pooler_output = made.view(*rows.shape[:-1], made.shape[-1])
