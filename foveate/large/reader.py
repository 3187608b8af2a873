"""Reading an image of any size: from coarse to fine, and only where the question points.

The thumbnail and the tiles of level 1 are encoded; a Region Focus Module ranks the tiles' tokens by
the prompt; the best call for tiles of the next level, and so on, until the last level or until too
many tiles would be needed. What the module keeps of the last level goes to the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.errors import InputError, UnsupportedModelError
from foveate.families import Family, find_family
from foveate.large.focus import RegionFocus
from foveate.large.image import LargeImage, open_image, read_tile
from foveate.large.pyramid import (
    Level,
    Local,
    lay_out,
    levels,
    pool,
    tiles_below,
    tiles_below_as_released,
    unpadded_as_released,
)
from foveate.methods.lrsvqa import LRSVQA, RELEASED_ROUNDS

FAMILIES = ("llava", "llava_next", "llava_onevision")
"""Families with a tower on square tiles, whose features are made of tiles one by one."""


@dataclass(frozen=True, eq=False)
class Round:
    """What was looked at at one level.

    Args:
        tokens: tokens of the tiles that were encoded there.
        tiles: (n, 2) row and column of these tiles.
        scores: (N,) what the module gave each token.
        kept: (K,) tokens that survived; they called for the next level's tiles, or were read.
    """

    tokens: Local
    tiles: Tensor
    scores: Tensor
    kept: Tensor

    @property
    def boxes(self) -> Tensor:
        """(K, 4) what the survivors show, as shares of the image; NaN for newlines."""
        return self.tokens.take(self.kept).boxes()


@dataclass(frozen=True, eq=False)
class Reading:
    """An image as the language model gets it.

    Args:
        inputs: for `model.generate(**inputs)` or `model(**inputs)`: the prompt with a placeholder
            for each visual token, and their features.
        rounds: what was done, level by level; empty for an image that is no larger than a tile.
        levels: the image's pyramid, coarse to fine, the thumbnail first.
    """

    inputs: dict[str, Any]
    rounds: list[Round]
    levels: list[Level]

    @property
    def tiles(self) -> int:
        """Tiles that were encoded, the thumbnail among them."""
        return 1 + sum(len(r.tiles) for r in self.rounds)


class Reader:
    """Reads images of any size for a model.

    Args:
        model: a LLaVA, LLaVA-NeXT or LLaVA-OneVision around a Llama, Mistral or Qwen2.
        processor: its processor, for the tokenizer and the colours' mean and deviation.
        focus: a Region Focus Module or the folder of one; `None` copies layers of the model, which
            gives a module that was not trained.
        method: how much is kept, and when reading stops.
        batch: tiles that are read and encoded at once; memory grows with it.

    Raises:
        UnsupportedModelError: another family or text model, or a tower without square tiles.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        focus: RegionFocus | str | Path | None = None,
        method: LRSVQA | None = None,
        batch: int = 4,
    ) -> None:
        self.family: Any = find_family(model)
        vision = getattr(self.family.config, "vision_config", None)
        side = getattr(vision, "image_size", None)
        pixtral = getattr(vision, "model_type", "") == "pixtral"
        if self.family.model_type not in FAMILIES or not isinstance(side, int) or pixtral:
            raise UnsupportedModelError(
                f"large images are read in square tiles by {', '.join(FAMILIES)}; this is "
                f"{self.family.model_type!r}. Scale the image down for it, and use a session"
            )
        self.model, self.processor, self.batch, self.tile = model, processor, batch, side
        self.method = method or LRSVQA()
        if isinstance(focus, str | Path):
            focus = RegionFocus.load(focus, model)
        self.focus = RegionFocus.of(model) if focus is None else focus
        self._newline = getattr(self.family.base, "image_newline", None)

    @torch.no_grad()
    def read(self, image: str | Path | Image.Image | LargeImage, prompt: str) -> Reading:
        """Look at an image for a prompt.

        Args:
            image: a file, an image, or anything that gives windows of itself.
            prompt: text with one image placeholder, such as "<image> what number is red ?".

        Returns:
            Inputs for the model, and what was looked at.

        Raises:
            InputError: the image cannot be read, or the prompt has not one placeholder.
        """
        source, method = open_image(image), self.method
        pyramid = levels(source.size, self.tile, method.shortest, method.measured)
        before, after = self.text(prompt)
        embed = self.model.get_input_embeddings()
        thumbnail = self.encode(source, pyramid[0], [[0, 0]]).flatten(0, 2)
        head = torch.cat((embed(before), thumbnail))
        tail = embed(after)
        rounds: list[Round] = []
        finer = self._finer(pyramid)
        tiles = finer[0].tiles() if finer else torch.empty(0, 2)
        for number, level in enumerate(finer):
            tokens = self.look(source, level, tiles)
            scores = self.rank(head, tokens, tail)
            kept = method.chosen(scores, tokens.newline)
            rounds.append(Round(tokens, tiles, scores, kept))
            if number + 1 == len(finer):
                break
            tiles = self._called(tokens, kept, finer[number + 1])
            if len(tiles) > method.tiles and not method.as_released:
                break
        local = [r.tokens.values[r.kept] for r in rounds[-1:]]
        return Reading(self._inputs(before, [thumbnail, *local], after), rounds, pyramid)

    def _finer(self, pyramid: Sequence[Level]) -> Sequence[Level]:
        """Levels after the thumbnail that may be looked at."""
        rounds = self.method.rounds
        if rounds is None and self.method.as_released:
            rounds = RELEASED_ROUNDS
        return pyramid[1:] if rounds is None else pyramid[1 : 1 + rounds]

    def text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids in front of the placeholder and after it."""
        tokenized = self.processor.tokenizer(prompt, return_tensors="pt")
        ids = tokenized["input_ids"][0].to(self.model.device)
        placeholders = torch.where(ids == self.family.placeholder_ids["image"])[0].tolist()
        if len(placeholders) != 1:
            raise InputError(
                "a prompt about a large image has one image placeholder, this has "
                f"{len(placeholders)}"
            )
        return ids[: placeholders[0]], ids[placeholders[0] + 1 :]

    def encode(self, source: LargeImage, level: Level, tiles: list[list[int]]) -> Tensor:
        """(n, S, S, D) features of tiles, `batch` of them at a time."""
        features = []
        for start in range(0, len(tiles), self.batch):
            some = tiles[start : start + self.batch]
            pixels = torch.stack([self._pixels(source, level, *tile) for tile in some])
            features.append(tile_features(self.family, pixels.to(self.model.device)))
        return torch.cat(features)

    def _pixels(self, source: LargeImage, level: Level, row: int, column: int) -> Tensor:
        """(3, tile, tile) normalised pixels; 0, the mean colour, outside the image."""
        shown = read_tile(source, level, row, column, smooth=not self.method.as_released)
        images = self.processor.image_processor
        mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
        pixels = torch.zeros(self.tile, self.tile, 3)
        pixels[: shown.shape[0], : shown.shape[1]] = (torch.from_numpy(shown) / 255 - mean) / std
        return pixels.permute(2, 0, 1).to(self.model.dtype)

    def look(self, source: LargeImage, level: Level, tiles: Tensor) -> Local:
        """Tokens of a level's tiles, pooled, in raster order."""
        values = pool(self.encode(source, level, tiles.tolist()))
        grid = None
        if self.method.as_released:
            cells = (level.blocks[0] * values.shape[1], level.blocks[1] * values.shape[1])
            grid = unpadded_as_released(source.size, cells)
        every_row = self.method.as_released
        return lay_out(level, tiles, values, self._newline, grid, every_row)

    def rank(self, head: Tensor, tokens: Local, tail: Tensor) -> Tensor:
        """(N,) scores of the module for a level's tokens."""
        hidden = torch.cat((head, tokens.values, tail))[None]
        local = slice(len(head), len(head) + len(tokens.values))
        positions = None
        if self.method.as_released:  # tokens stand where they would on the whole grid
            rows, columns = tokens.wide
            after = rows * columns + torch.arange(len(tail))
            shifted = torch.cat((tokens.order, after)) + len(head)
            positions = torch.cat((torch.arange(len(head)), shifted))[None].to(hidden.device)
        return self.focus.scores(hidden, local, positions)[0].cpu()

    def _called(self, tokens: Local, kept: Tensor, finer: Level) -> Tensor:
        """Tiles of the next level that survivors call for."""
        if self.method.as_released:
            return tiles_below_as_released(tokens.cell[kept], tokens.wide, finer.blocks)
        return tiles_below(tokens.take(kept), finer)

    def _inputs(self, before: Tensor, visual: list[Tensor], after: Tensor) -> dict[str, Any]:
        features = torch.cat(visual)
        token = self.family.placeholder_ids["image"]
        ids = torch.cat((before, before.new_full((len(features),), token), after))[None]
        encoded: Any = BaseModelOutputWithPooling
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_encoder_outputs": {"image": encoded(pooler_output=[features])},
        }


def tile_features(family: Family, pixels: Tensor) -> Tensor:
    """(n, S, S, D) projected features of tiles, before any packing: (n, 3, tile, tile) pixels."""
    config, base = family.config, family.base
    chosen = config.vision_feature_layer
    states = base.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    layers = [states[i] for i in ([chosen] if isinstance(chosen, int) else chosen)]
    if config.vision_feature_select_strategy == "default":
        layers = [layer[:, 1:] for layer in layers]
    features = base.multi_modal_projector(torch.cat(layers, dim=-1))
    side = round(features.shape[1] ** 0.5)
    return features.unflatten(1, (side, side))
