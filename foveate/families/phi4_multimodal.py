"""Phi-4 Multimodal: crops of a SigLIP tower, put together and unpadded, with a newline after every
line; then a separator, and a thumbnail with newlines.

The text model is the base model too, and has a module that makes features of images and audio and
puts them in the prompt. Audio is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.tokens import Shape
from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.rows import cell_means, raster_rows, taken
from foveate.families.towers import tower
from foveate.record.boxes import cells

IMAGES = ("image_pixel_values", "image_sizes", "image_attention_mask")
PATCHES = "image_patches"  # height and width of each image, which is what its mask says
NEWLINE, SEPARATOR = -1, -2  # in place of a cell
AUDIO = ("audio_input_features", "audio_embed_sizes", "audio_attention_mask")


@register_family("phi4_multimodal")
class Phi4Multimodal(Family):
    """`Phi4MultimodalForCausalLM` and `Phi4MultimodalModel`.

    Newlines and the separator count as visual tokens.
    """

    text_path = ""
    planar = False  # crops, thumbnail and newlines form no single grid
    placed_by = ("image_sizes", "image_attention_mask")

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Images alone; audio is text to methods."""
        return {"image": self.config.vision_config.image_token_id}

    @property
    def unheard(self) -> str:
        """Who places it."""
        return "one module makes its features and places them in the prompt, unseen by methods"

    # -- features, which the text model makes itself

    def with_embeddings(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with embeddings in place of ids, images and audio."""
        text = self.text
        given = {name: arguments.get(name) for name in (*IMAGES, *AUDIO)}
        ids = arguments["input_ids"]
        rest = {n: v for n, v in arguments.items() if n not in given and n != "input_ids"}
        embeds = text.embed_tokens_extend(ids, text.embed_tokens(ids), **given)
        return {**rest, "inputs_embeds": embeds}

    def placer(self, modality: str) -> Any:
        """The image side of that module."""
        return self.text.embed_tokens_extend.image_embed

    def lengths(self, modality: str, arguments: Mapping[str, Any]) -> list[int]:
        """Visual tokens of each image."""
        return [len(source) for source in self._sources(arguments)]

    def encode(self, modality: str, arguments: Mapping[str, Any]) -> Any:
        """The features of images, from a prompt of placeholders alone."""
        lengths, pixels = self.lengths(modality, arguments), arguments["image_pixel_values"]
        ids = torch.full((1, sum(lengths)), self.placeholder_ids[modality])
        embeds = pixels.new_zeros(*ids.shape, self.config.hidden_size)
        place, mask = self.placer(modality), self._mask(arguments)
        (rows,) = place(ids, embeds, pixels, arguments["image_sizes"], mask)
        return BaseModelOutputWithPooling(pooler_output=rows.split(lengths))

    def fed(self, arguments: Mapping[str, Any], images: int | None = None) -> dict[str, Any]:
        """Images with the sizes that their masks say, in place of these."""
        given = {name: arguments[name] for name in IMAGES[:2]}
        return {**given, PATCHES: self._patches(arguments)}

    def pixels(self, images: int, arguments: Mapping[str, Any]) -> Tensor | None:
        """(N, C, H, W) the thumbnail of each image, the padding around it cut off."""
        thumbnails, shares = arguments["image_pixel_values"][:, 0], self._shares(arguments)
        height, width = thumbnails.shape[-2:]
        cut = [
            thumbnail[:, : round(height * down), : round(width * across)]
            for thumbnail, (down, across) in zip(thumbnails, shares.tolist(), strict=True)
        ]
        return torch.cat([interpolate(image[None], (height, width)) for image in cut])

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Tokens of each image, in one row."""
        return [Shape(len(feature), (1, len(feature))) for feature in pooled]

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Boxes of cells, which lie within the image but for a last patch; NaN for newlines, for
        the separator, and for cells of the thumbnail that show padding alone.
        """
        rows, columns = self._grids(arguments)[number]
        down, across = self._shares(arguments)[number].tolist()
        image, side = torch.tensor([across, down, across, down]), self._cells
        thumbnail = cells(side, side).view(1, side, side, 4)
        crops = cells(rows * side, columns * side).view(rows, side, columns, side, 4)
        every = torch.cat((thumbnail, crops.transpose(1, 2).flatten(0, 1))) / image
        source = self._sources(arguments)[number]
        boxes = every.view(-1, 4).clamp(max=1)[source.clamp(min=0)]
        nowhere = (source < 0) | ((boxes[:, 2:] - boxes[:, :2]).prod(1) == 0)
        return boxes.masked_fill(nowhere[:, None], torch.nan)

    # -- the tower

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token, where all patches of a crop see each other."""
        path = "embed_tokens_extend.image_embed.img_processor"
        return None if self.mixing("image", {}) else tower(self, path)

    @property
    def _sees_all(self) -> bool:
        """Whether all patches of a crop see each other, whatever padding there is: modules say that
        they are causal, which kernels but eager's go by where they are given no mask.
        """
        module = self.text.embed_tokens_extend.image_embed.img_processor
        eager = module.config._attn_implementation == "eager"
        return eager or not module.encoder.layers[0].self_attn.is_causal

    @property
    def feature_layer(self) -> int:
        """The layer after `hidden_states[feature_layer]`."""
        layer = self.config.vision_config.feature_layer
        return layer - 1 if layer >= 0 else self.vision_layers + layer

    def side(self, modality: str) -> int:
        """Side of the cells that are averaged."""
        return 2

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Why methods cannot act inside; each token has patches of its own all the same."""
        if self._side % self.side("image"):
            return "the last patches of its crops are averaged with copies of others"
        if self._sees_all:
            return ""
        return (
            "its attention is causal, by a mistake in transformers, unless it is 'eager', or "
            "'sdpa' and some crop has padding; set it to 'eager' by "
            "model.set_attn_implementation({'vision_config': 'eager'})"
        )

    def per_token(
        self, modality: str, rows: Any, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """Means of cells, put together as the model does with their features."""
        patches = raster_rows(self._side, self._side, self.side(modality))
        means = torch.cat(cell_means(rows, patches), 1).T
        return [taken(means, source, newline).T for source in self._of_all(arguments)]

    def follow(
        self, modality: str, surviving: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """Which tokens survive: a newline if a token of its line does, and the separator always."""
        of_cells, found = torch.cat(list(surviving)), []
        for source in self._of_all(arguments):
            tokens, source = taken(of_cells, source, False), source.to(of_cells.device)
            newline = source == NEWLINE
            line = newline.cumsum(0) - newline.long()
            lines = torch.zeros_like(line).index_add(0, line, tokens.long()) > 0
            found.append(tokens | (newline & lines[line]) | (source == SEPARATOR))
        return found

    def sources(self, modality: str, count: int, arguments: Mapping[str, Any]) -> Tensor:
        """Cells; a newline and the separator stand for the last before."""
        source = torch.cat(self._of_all(arguments))
        last = torch.arange(len(source)).masked_fill(source < 0, 0).cummax(0).values
        return source[last]

    def _of_all(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The same as `_sources`, of the cells in the crops of all images."""
        crops = arguments["image_pixel_values"].shape[1]
        return [
            torch.where(source < 0, source, source + number * crops * self._cells**2)
            for number, source in enumerate(self._sources(arguments))
        ]

    # -- where tokens are

    def _sources(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """(V) cell, of all in the crops of an image, that each of its tokens is, or `NEWLINE`
        or `SEPARATOR`.
        """
        side, found = self._cells, []
        grids, patches = self._grids(arguments), self._patches(arguments).tolist()
        for (rows, columns), real in zip(grids, patches, strict=True):
            every = torch.arange((1 + rows * columns) * side**2).view(-1, side, side)
            height, width = map(self._cells_of, real)
            crops = _together(every, (rows, columns))[:height, :width]
            lines, thumbnail = (pad(of, (0, 1), value=NEWLINE) for of in (crops, every[0]))
            separator = torch.tensor([SEPARATOR])
            found.append(torch.cat((lines.flatten(), separator, thumbnail.flatten())))
        return found

    def _shares(self, arguments: Mapping[str, Any]) -> Tensor:
        """(N, 2) share of the height and the width of all crops that an image has of them."""
        whole = torch.tensor(self._grids(arguments)) * self._side
        return self._patches(arguments) / whole

    def _patches(self, arguments: Mapping[str, Any]) -> Tensor:
        """(N, 2) height and width in patches of each image, without padding around it."""
        if PATCHES in arguments:
            return arguments[PATCHES]
        masks, grids = arguments["image_attention_mask"].bool().cpu(), self._grids(arguments)
        joined = [_together(mask, grid) for mask, grid in zip(masks, grids, strict=True)]
        return torch.tensor([[int(of[:, 0].sum()), int(of[0].sum())] for of in joined])

    def _mask(self, arguments: Mapping[str, Any]) -> Tensor:
        """(N, crops, S, S) which patches are of images of so many."""
        images, crops = arguments["image_pixel_values"].shape[:2]
        mask = torch.ones(images, crops, self._side, self._side, dtype=torch.bool)
        grids, patches = self._grids(arguments), self._patches(arguments)
        for of, (rows, columns), (height, width) in zip(mask, grids, patches.tolist(), strict=True):
            down, across = torch.arange(rows * self._side), torch.arange(columns * self._side)
            within = (down < height)[:, None] & (across < width)
            within = within.view(rows, self._side, columns, self._side).transpose(1, 2)
            of[1 : rows * columns + 1] = within.flatten(0, 1)
        return mask

    def _grids(self, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of the crops of each image."""
        sizes = arguments["image_sizes"].view(-1, 2) // self.config.vision_config.crop_size
        return [(rows, columns) for rows, columns in sizes.tolist()]

    @property
    def _side(self) -> int:
        """Side of a crop in patches."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    @property
    def _cells(self) -> int:
        """Side of a crop in cells."""
        return self._cells_of(self._side)

    def _cells_of(self, patches: int) -> int:
        """Cells that so many patches in a line are of: those of each crop fill up the last."""
        crops, rest = divmod(patches, self._side)
        return crops * -(-self._side // 2) + -(-rest // 2)


def _together(crops: Tensor, grid: tuple[int, int]) -> Tensor:
    """(rows S, columns S) of what is known of the crops of an image, (1 + N, S, S), of which the
    first is its thumbnail and the last may be empty.
    """
    rows, columns = grid
    crops = crops[1 : rows * columns + 1].unflatten(0, (rows, columns))
    return crops.transpose(1, 2).flatten(2).flatten(0, 1)
