"""A bright patch in a blank image changes the tokens whose boxes show it, and no others as much.

Images take the way of the family's image processor, where what it makes is more than pixels.
"""

import copy
import functools
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import (
    Cosmos3EdgeImageProcessorPil,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import (
    HunYuanVLImageProcessorPil,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
    PaddleOCRVLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import (
    VideoLlama3ImageProcessorPil,
)

import foveate
from foveate.core import Keep, Scorer, Step
from tests.conformance.test_pixels import IMAGES, NAMES, model_of, prompt
from tests.conformance.test_pixels_grids import VIDEO
from tests.conformance.test_pixels_grids import prompt as prompt_on_grids
from tests.conformance.zoo import MEMBERS, phi4_multimodal
from tests.conformance.zoo.llava_next import PINPOINTS, SIZES
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.towers import SIDE
from tests.methods_for_tests import EveryThird

# left, top, right and bottom edge of each image's patch; none is its own transpose
PATCHES = [(0.5, 0.25, 1, 0.5), (0, 0.75, 0.5, 1), (0.25, 0, 0.5, 0.5)]
ONEVISION = ("llava_onevision", "llava_onevision-tiles")
RESAMPLED = ("llava_next", "llava_next_video", *ONEVISION)  # edges of patches blur
BLANK, BRIGHT = 51, (255, 10, 120)  # no multiple of each other: norms hide scales
OUTPUT = re.compile(
    r"(model\.)?(embed_tokens_extend\.)?(vision|visual|image|video).*\.(self_attn|attn|attention|conv)"
    r"\.(out_proj|o_proj|proj|projection_layer)"
)

STRIPS = {  # argument with the grids of patches
    "lfm2_vl": "spatial_shapes", "minicpm_ocr": "target_sizes", "minicpmv4_6": "target_sizes",
    "minicpmv4_7": "target_sizes",
}  # fmt: skip
NO_TOWER = ("gemma4_unified",)
SEEN = {
    "image": ("pixel", "image_", "spatial_", "target_"),
    "video": ("pixel", "video_"),
}  # by encoders


@dataclass(frozen=True)
class Changed(Scorer):
    """Keep the tokens whose features differ most from those of the blank image."""

    blank: dict = field(default_factory=dict)  # (tokens, grid) -> (V, D)
    keep: Keep = 1
    positions: str = "original"
    slug, stage, needs, paper = "changed", "pre_llm", (), ""

    def steps(self, model):
        return (Step("pre_llm"),)

    def scores(self, tokens):
        features = tokens.features()
        return (features - self.blank[features.shape[1], tokens.grid]).norm(dim=-1)


@functools.cache
def local_model(name):
    """A member's model whose tower does not mix tokens: what attention adds is zero."""
    model = copy.deepcopy(model_of(name))
    outputs = [module for path, module in model.named_modules() if OUTPUT.fullmatch(path)]
    layers = 0 if name in NO_TOWER else 3
    assert len(outputs) >= layers, "attention outputs of the tower are known"
    for parameter in (p for module in outputs for p in module.parameters()):
        parameter.data.zero_()
    return model


def picture(height, width, patch):
    """(H, W, 3) a blank image with a bright patch, or without."""
    pixels = np.full((height, width, 3), BLANK, np.uint8)
    if patch is not None:
        left, top, right, bottom = patch
        rows = slice(round(top * height), round(bottom * height))
        pixels[rows, round(left * width) : round(right * width)] = BRIGHT
    return pixels


def tensor(pixels):
    """(3, H, W) of an image."""
    return torch.from_numpy(pixels.astype(np.float32) / 64).permute(2, 0, 1)


def on_grids(name, pictures, sides=None):
    """(N, ...) patches in the order of the family's processor, and grids."""
    kinds = {
        "cosmos3_edge": Cosmos3EdgeImageProcessorPil,
        "dots3_note": Qwen2VLImageProcessorPil,
        "ernie4_5_vl_moe": Ernie4_5_VLMoeImageProcessorPil,
        "hunyuan_vl": HunYuanVLImageProcessorPil,
        "kimi_k25": PaddleOCRVLImageProcessorPil, "kimi_k25-halves": PaddleOCRVLImageProcessorPil,
        "muse_glimmer": PaddleOCRVLImageProcessorPil, "muse_spark": PaddleOCRVLImageProcessorPil,
        "paddleocr_vl": PaddleOCRVLImageProcessorPil,
        "video_llama_3": VideoLlama3ImageProcessorPil,
    }  # fmt: skip
    other = Glm4vImageProcessorPil if name.startswith("glm") else Qwen2VLImageProcessorPil
    patches, grids = [], []
    for pixels, side in zip(pictures, sides or [2] * len(pictures), strict=True):
        processor = kinds.get(name, other)(
            patch_size=4, merge_size=side, temporal_patch_size=1 if name in kinds else 2,
            do_resize=False, do_normalize=False, rescale_factor=1 / 64,
        )  # fmt: skip
        given = processor([Image.fromarray(pixels)], return_tensors="pt")
        patches.append(given["pixel_values"].float())
        grids.append(given["image_grid_thw"])
    values = torch.cat(patches)
    if name.startswith("muse"):  # both frames of a pair, of all channels each
        values = values.flatten(1).repeat(1, 2)
    return values, torch.cat(grids)


def tiled(name, pictures):
    """Thumbnails and tiles, as the family's processor cuts them."""
    kind = LlavaNextImageProcessorPil
    if name in ONEVISION:
        kind = LlavaOnevisionImageProcessorPil
    square = {"height": SIDE, "width": SIDE}
    processor = kind(
        size=square, crop_size=square, image_grid_pinpoints=PINPOINTS, rescale_factor=1 / 64,
        do_normalize=False,
    )  # fmt: skip
    given = processor([Image.fromarray(p) for p in pictures], return_tensors="pt")
    return {"pixel_values": given["pixel_values"].float(), "image_sizes": given["image_sizes"]}


def crops(pictures):
    """Molmo2's overviews and crops: (N, 64, 48) patches in raster order."""
    patches = [tensor(p).unfold(1, 4, 4).unfold(2, 4, 4) for p in pictures]
    return torch.stack([p.permute(1, 2, 3, 4, 0).reshape(64, 48) for p in patches])


def padded(grids, pictures):
    """(N, 64, 48) patches of 4 x 4 pixels, channels last, as LFM2-VL's processor pads them."""
    images = []
    for (height, width), pixels in zip(grids, pictures, strict=True):
        cut = tensor(pixels).reshape(3, height, 4, width, 4).permute(1, 3, 2, 4, 0).reshape(-1, 48)
        images.append(torch.nn.functional.pad(cut, (0, 0, 0, 64 - len(cut))))
    return torch.stack(images)


def in_one_row(grids, pictures):
    """(1, 3, 4, W) patches of 4 x 4 pixels in raster order, side by side, as MiniCPM-V has it."""
    images = [
        tensor(pixels).reshape(3, height, 4, width, 4).permute(0, 2, 1, 3, 4).reshape(3, 4, -1)
        for (height, width), pixels in zip(grids, pictures, strict=True)
    ]
    return torch.cat(images, -1)[None]


def planted(name, patches):
    """What the encoder eats for images with these patches."""
    member = MEMBERS[name]()
    pixels = member.pixels(IMAGES)
    if name in STRIPS:
        grids = pixels[STRIPS[name]].tolist()
        sizes = [(4 * height, 4 * width) for height, width in grids]
        images = [picture(*s, p) for s, p in zip(sizes, patches, strict=True)]
        cut = padded if name == "lfm2_vl" else in_one_row
        return {"pixel_values": cut(grids, images)}
    if "image_position_ids" in pixels:  # (x, y) of each patch, -1 for padding
        corners = pixels["image_position_ids"].amax(1) + 1
        images = [
            picture(4 * h, 4 * w, p) for (w, h), p in zip(corners.tolist(), patches, strict=True)
        ]
        return {"pixel_values": padded([(h, w) for w, h in corners.tolist()], images)}
    if "image_grid_thw" in pixels:
        sizes = [(4 * h, 4 * w) for _, h, w in pixels["image_grid_thw"].tolist()]
        sides = pixels["image_merge_sizes"].tolist() if "image_merge_sizes" in pixels else None
        seen = [picture(*s, p) for s, p in zip(sizes, patches, strict=True)]
        values, grids = on_grids(name, seen, sides)
        assert torch.equal(grids, pixels["image_grid_thw"])
        return {"pixel_values": values}
    if "image_grid_hw" in pixels:
        sizes = [(4 * h, 4 * w) for h, w in pixels["image_grid_hw"].tolist()]
        seen = [tensor(picture(*s, p)) for s, p in zip(sizes, patches, strict=True)]
        cut = [x.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).flatten(2) for x in seen]
        return {"pixel_values": torch.cat([rows.flatten(0, 1) for rows in cut])}
    if name.startswith("phi4_multimodal"):
        seen = [tensor(picture(*s, p)) for s, p in zip(phi4_multimodal.SIZES, patches, strict=True)]
        return phi4_multimodal.processed(seen)
    if name in RESAMPLED:
        return tiled(name, [picture(*s, p) for s, p in zip(SIZES, patches, strict=True)])
    if name.startswith("molmo2"):
        number = [0, 1, 1, 2]  # the second image has a crop of all of it after its overview
        return {"pixel_values": crops([picture(32, 32, patches[n]) for n in number])}
    if member.modality == "video":
        values = pixels["pixel_values_videos"].clone()
        for video, patch in enumerate(patches):
            for frame in range(values.shape[1]):
                seen = patch if frame == frame_of(video, values.shape[1]) else None
                values[video, frame] = tensor(picture(*values.shape[-2:], seen))
        return {"pixel_values_videos": values}
    values = pixels["pixel_values"].clone()
    tiles = values.flatten(0, -4)
    sizes = pixels.get("image_sizes", [values.shape[-2:]] * IMAGES)
    for image, ((height, width), patch) in enumerate(zip(sizes, patches, strict=True)):
        tiles[image] = 0
        tiles[image, :, :height, :width] = tensor(picture(int(height), int(width), patch))
    given = {"pixel_values": values}
    if "pixel_attention_mask" in pixels and pixels["pixel_attention_mask"].dim() == 4:
        given["pixel_attention_mask"] = torch.ones_like(pixels["pixel_attention_mask"])
    return given


def frame_of(video, frames):
    """The frame of a video in which the patch is."""
    return (video + 1) % frames


def planted_on_grids(name, patch):
    """What the encoder eats for a video of three frames, the second with a patch."""
    if name.startswith("molmo2"):
        return {"pixel_values_videos": crops([picture(32, 32, p) for p in (None, patch, None)])}
    times = 2 if name == "ernie4_5_vl_moe" else 1  # whose tokens are of two frames
    frames = [picture(16, 32, p) for p in (None, patch, None) for _ in range(times)]
    return {"pixel_values_videos": on_grids(name, frames)[0]}


def features_of(name, model, modality, inputs, counts):
    """(V, D) features of each image from the model as it is."""
    given = {n: v for n, v in fresh(inputs).items() if n.startswith(SEEN[modality])}
    with torch.no_grad():
        pooled = MEMBERS[name]().encode(model, given, modality)
    rows = [feature.reshape(-1, feature.shape[-1]) for feature in pooled]
    return torch.cat(rows).split(counts)


def shown(image, patch, frame):
    """(V) share of each token's box that shows the patch."""
    patch = torch.tensor(patch, dtype=torch.float)
    low = torch.maximum(image.boxes[:, :2], patch[:2])
    high = torch.minimum(image.boxes[:, 2:], patch[2:])
    area = (image.boxes[:, 2:] - image.boxes[:, :2]).prod(1)
    return ((high - low).clamp(min=0).prod(1) / area).nan_to_num() * (image.frame == frame)


def check(name, modality, blank, bright, patches, frames):
    """Check that the tokens that the patch of an image changes are those that show it."""
    model = local_model(name)
    with torch.no_grad(), foveate.use(model, EveryThird(1)) as run:
        model(**fresh(blank))
    images = run.record.images
    assert [image.frames > 1 for image in images] == [modality == "video"] * len(patches)
    shares = [shown(*seen) for seen in zip(images, patches, frames, strict=True)]
    counts = [image.total for image in images]
    before, after = (features_of(name, model, modality, given, counts) for given in (blank, bright))
    for old, new, share in zip(before, after, shares, strict=True):
        change = (new - old).norm(dim=1)
        if name not in RESAMPLED:
            assert torch.equal(change > 1e-4 * change.max(), share > 1e-3)
    keep = min(int((share > 0.3).sum()) for share in shares)
    assert keep > 0
    seen = {(image.total, image.grid): old for image, old in zip(images, before, strict=True)}
    with torch.no_grad(), foveate.use(model, Changed(seen, keep)) as run:
        model(**fresh(bright))
    report = run.report()
    for number, (image, share) in enumerate(zip(run.record.images, shares, strict=True)):
        kept = image.kept["pre_llm"]
        assert bool((share[kept] > 1e-3).all())
        listed = report.kept[number]["pre_llm"]
        assert [token["index"] for token in listed] == kept.tolist()
        boxes = torch.tensor([token["box"] for token in listed])
        torch.testing.assert_close(boxes, image.boxes[kept], rtol=0, atol=1e-4)
        assert [token.get("frame", 0) for token in listed] == image.frame[kept].tolist()


@pytest.mark.parametrize("name", [name for name in NAMES if not MEMBERS[name].mixes])
def test_tokens_that_change_are_where_the_patch_is(name):
    inputs, counts = prompt(name)
    modality, images = MEMBERS[name].modality, len(counts)
    blank = inputs | planted(name, [None] * images)
    frames = [0] * images
    if modality == "video":
        each = inputs["pixel_values_videos"].shape[1]
        frames = [frame_of(video, each) for video in range(images)]
    bright = inputs | planted(name, PATCHES[:images])
    check(name, modality, blank, bright, PATCHES[:images], frames)


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize("patch", PATCHES)
def test_tokens_that_change_are_in_the_frame_where_the_patch_is(name, patch):
    inputs, _, _ = prompt_on_grids(name, "video")
    blank, bright = (inputs | planted_on_grids(name, p) for p in (None, patch))
    check(name, "video", blank, bright, [patch], [1])
