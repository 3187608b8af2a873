"""A pretrained tower, photographs with masks as it sees them, and what methods choose on it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _survival import Objects, Sources, objects_of
from _tower_methods import KEEPS, PROBED, Name, drops
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from foveate.core import Adaptive, Keep, Method, ModelFacts, Positions, Reduction, Step
from foveate.core.tokens import VisualTokens
from foveate.errors import FoveateError
from foveate.methods.downsample import pooled_grid
from foveate.run import use

LEAST, SMALL = 64, 32 * 32
"""Pixels from which on an object counts, and below which it is small, at the tower's size."""
IMAGE = 31  # the token that stands for a visual token


def load(folder: Path) -> CLIPVisionModelWithProjection:
    """The tower of a folder that transformers loads.

    Raises:
        FoveateError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise FoveateError(
            f"there is no tower in {folder}; python scripts/real_parts.py --out {folder} fetches it"
        )
    tower: CLIPVisionModelWithProjection = CLIPVisionModelWithProjection.from_pretrained(folder)
    return tower.eval()


def llava(tower: CLIPVisionModelWithProjection) -> LlavaForConditionalGeneration:
    """A LLaVA with the tower, whose language model is random, and sees its features as they are."""
    vision = tower.config
    text = LlamaConfig(
        hidden_size=vision.hidden_size, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32, vocab_size=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="linear",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    parameters = {
        name.removeprefix("vision_model."): value
        for name, value in tower.state_dict().items()
        if name.startswith("vision_model.")
    }
    holder: Any = model.model.vision_tower
    getattr(holder, "vision_model", holder).load_state_dict(parameters)
    projector: Any = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def pixels_of(image: Image.Image, size: int = 224) -> Tensor:
    """(1, 3, size, size) of a square image as CLIP is shown it."""
    values = torch.tensor(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((values / 255 - mean) / deviation).permute(2, 0, 1)[None].contiguous()


def centre(image: Image.Image) -> Image.Image:
    """The largest square in the middle of an image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class Photograph:
    """What the tower sees of a photograph, and the objects on it."""

    name: str
    pixels: Tensor
    objects: Objects


def photographs(data: Path, size: int = 224, cell: int = 16) -> Iterator[Photograph]:
    """Photographs of `coco-cc` in order of their names, cropped to a square as CLIP crops them.

    Raises:
        FoveateError: they are not there.
    """
    folder = data / "coco-cc"
    if not (folder / "annotations.json").is_file():
        raise FoveateError(f"there is no coco-cc/annotations.json in {data}; name its folder")
    listed = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    for photo in sorted(listed, key=lambda photo: photo["file"]):
        image = Image.open(folder / "images" / photo["file"]).convert("RGB")
        coloured = centre(Image.open(folder / "panoptic" / photo["panoptic"]).convert("RGB"))
        seen = np.asarray(coloured.resize((size, size), Image.Resampling.NEAREST), np.int64)
        mask = torch.tensor(seen @ np.array([1, 256, 65536]))
        things = [s["id"] for s in photo["segments"] if s["isthing"] and not s["iscrowd"]]
        objects = objects_of(mask, things, cell, LEAST, SMALL)
        yield Photograph(photo["file"], pixels_of(centre(image), size), objects)


@dataclass(frozen=True)
class Standin(Adaptive):
    """A method after the projector that stands for others, and has no budget of its own."""

    keep: Keep | None = None
    positions: Positions | None = "original"
    slug = "standin"
    stage = "pre_llm"
    needs = ()
    paper = ""

    def check_fields(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class Chooser(Standin):
    """Asks other methods what they would keep of the same encoding, and keeps everything.

    Args:
        asked: methods that act after the projector, each a step; those after its first are left
            out, as they read the language model.
        found: number of the method -> members of the batch, and what it makes of them.
    """

    asked: tuple[Method, ...] = ()
    found: dict[int, list[tuple[Sequence[int], Reduction]]] = field(default_factory=dict)

    @property
    def step_count(self) -> int | None:
        """One for each method."""
        return len(self.asked)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """The first step of each method."""
        return tuple(method.steps(model)[0] for method in self.asked)

    def reduce_each(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """Ask the method of this step."""
        method, images = self.asked[tokens.number], range(len(tokens.index))
        count = method.count(tokens.count, tokens.count, Step("pre_llm"), 0)
        shown = dataclasses.replace(tokens, number=0, quota=count)
        if isinstance(method, Adaptive):
            self.found[tokens.number] = list(method.reduce_each(shown))
        else:
            self.found[tokens.number] = [(images, method.reduce(shown, count))]
        return [(images, Reduction(torch.arange(tokens.count).expand(len(images), -1)))]


def choices(
    model: LlavaForConditionalGeneration, pixels: Tensor, asked: Mapping[Name, Method]
) -> dict[Name, list[Sources]]:
    """What each method makes of each of (G, 3, H, W) images after the projector, encoded once."""
    chooser = Chooser(asked=tuple(asked.values()))
    vision: Any = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[1, *[IMAGE] * tokens, 2]]).expand(len(pixels), -1)
    with torch.inference_mode(), use(model, chooser):
        model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
    made = {name: [Sources(tokens) for _ in pixels] for name in asked}
    for number, name in enumerate(asked):
        for members, reduction in chooser.found[number]:
            for row, image in enumerate(members):
                made[name][image].reduce(torch.arange(tokens)[None], reduction, row)
    return made


@contextmanager
def watched(method: Method, sources: Sources) -> Iterator[Method]:
    """A method that tells what it makes of the one image that is encoded."""

    def reduce(self: Method, tokens: VisualTokens, count: int) -> Reduction:
        reduction = type(method).reduce(method, tokens, count)
        sources.reduce(tokens.index, reduction)
        return reduction

    kind: Any = type("Watched", (type(method),), {"reduce": reduce})
    yield kind(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})


def batch_of(pixels: Tensor, name: Name, cell: int = 16) -> Tensor:
    """What a tower is shown of (G, 3, H, W) images: all, or a `smaller image` of as many patches as
    `downsample` makes tokens.
    """
    if name[0] != "smaller image":
        return pixels
    height, width = (side // cell for side in pixels.shape[2:])
    grid = pooled_grid(height, width, int(height * width * name[1]))
    size = [cell * side for side in grid]
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)


def embeddings_of(
    tower: CLIPVisionModelWithProjection, pixels: Tensor, method: Method | None
) -> Tensor:
    """(G, E) embeddings of length 1 in float32 of (G, 3, H, W) images, whatever their size."""
    size = tower.config.image_size
    smaller = tuple(pixels.shape[2:]) != (size, size)
    with torch.inference_mode(), use(tower, method) if method else nullcontext():
        made = tower(pixels.to(tower.dtype), interpolate_pos_encoding=smaller).image_embeds
    return F.normalize(made.float(), dim=-1)


class Given(nn.Module):
    """Embeddings of a tower that are given."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """They, whatever the image."""
        return self.states


def from_layer(
    tower: CLIPVisionModelWithProjection, layer: int, states: Tensor
) -> CLIPVisionModelWithProjection:
    """The same tower from a layer on, with the (G, 1 + V, D) states that this layer is given."""
    config = copy.deepcopy(tower.config)
    config.num_hidden_layers -= layer
    with torch.device("meta"):
        rest = CLIPVisionModelWithProjection(config).eval()
    here, there = rest.vision_model, tower.vision_model
    here.embeddings, here.pre_layrnorm = Given(states), nn.Identity()
    here.encoder.layers = nn.ModuleList(list(there.encoder.layers)[layer:])
    here.post_layernorm, rest.visual_projection = there.post_layernorm, tower.visual_projection
    return rest


def dropped(
    tower: CLIPVisionModelWithProjection, pixels: Tensor, seeds: Sequence[int]
) -> dict[Name, list[Tensor]]:
    """Embeddings (G, E) of (G, 3, H, W) images whose patches are dropped once, within a layer.

    What all have in common, the layers before, is computed once.

    Returns:
        Method -> seed -> embeddings; `cls-drop` has no seeds.
    """
    made = {}
    with torch.inference_mode():
        states = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states
    for layer in PROBED:
        rest = from_layer(tower, layer, states[layer])
        for keep in KEEPS:
            for name, methods in drops(keep, seeds).items():
                found = [embeddings_of(rest, pixels, method) for method in methods]
                made[f"{name}, layer {layer}", keep] = found
    return made


def encoded(
    tower: CLIPVisionModelWithProjection, pixels: Tensor, method: Method | None
) -> tuple[Tensor, Sources]:
    """The embedding of one image, (E,) of length 1, and what a method left of it on the way."""
    sources = Sources((tower.config.image_size // tower.config.patch_size) ** 2)
    if method is None or not method.removes:
        return embeddings_of(tower, pixels, method)[0], sources
    with watched(method, sources) as told:
        return embeddings_of(tower, pixels, told)[0], sources
