"""Llama 4: a tower whose class token is its last row, pixel shuffle, and a text model whose layers
rotate and see chunks of the sequence, or do neither. Each tile counts as an image.

Chunks are those of the original positions, whatever is removed: a layer sees what is left of them.
Layers that do not rotate sharpen attention as the prompt grows long. They count tokens for that
where they have them all, so prompts with images are refused there; in generation they count by the
cache, which knows original positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foveate.families.family import Family, register_family
from foveate.record.tiles import Tiling, join

NAMES = 2  # tokens between tiles of an image, at most


@register_family("llama4")
class Llama4(Family):
    """`Llama4ForConditionalGeneration`, which makes features and places them itself.

    Tiles are separated by one token within a row and by another after it; then comes a token that
    opens the thumbnail.
    """

    text_path = "language_model.model"

    @property
    def tempered_from(self) -> int | None:
        """The last of `floor_scale` positions."""
        text = self.text.config
        tempered = text.attn_temperature_tuning and not all(
            map(self.rotates, range(len(self.layers)))
        )
        return text.floor_scale - 1 if tempered else None

    def rotates(self, layer: int) -> bool:
        """As the attention module itself decides."""
        attention: Any = self.layers[layer].self_attn
        return bool(attention.use_rope)

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token."""
        return round(1 / self.config.vision_config.pixel_shuffle_ratio)

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Why methods cannot act inside; each token has patches of its own all the same."""
        return (
            "its class token is the last row of the encoder and not the first, and rows are "
            "rotated by one table of all of them, which methods cannot act on yet"
        )

    def late_projector(self, modality: str) -> Any:
        """A matrix, one row at a time."""
        return self.base.multi_modal_projector

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles are of one image if at most two tokens are in between, none of which opens one."""
        if ids is None:
            return [Tiling(len(spans))]
        opening = self.config.boi_token_id

        def together(end: int, start: int) -> bool:
            return start - end <= NAMES and opening not in ids[end:start]

        return [_tiling(ids, tiles) for tiles in join(spans, together)]


def _tiling(ids: Sequence[int], tiles: Sequence[tuple[int, int]]) -> Tiling:
    """The arrangement of the tiles of an image, the last of which is its thumbnail."""
    *cut, _ = tiles
    if not cut:
        return Tiling(1)
    after = [ids[end] for _, end in cut]
    rows = after.count(after[-1])
    columns = len(cut) // rows
    regular = after == (after[: columns - 1] + after[-1:]) * rows
    return Tiling(len(tiles), (rows, columns) if regular else None)
