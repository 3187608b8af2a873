"""Vision towers that several families share: where their layers are, and how these are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from foveate.families.block import Block
from foveate.families.encoder import Encoder
from foveate.families.family import Family
from foveate.families.plain import CLIP_BLOCK, tower_encoder
from foveate.families.rows import EncoderImage, cut, packed, pixels_of_rows, placed

Said = TypeVar("Said")


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    Args:
        layers: where its layers are.
        block: how they are made.
        root: the module within it whose output are rows; itself by default.
        class_token: whether row 0 is a class token.
        packed: which rows each image has, from the tower's arguments, the side of a cell and the
            tower; see `Encoder`, as for the others.
        fed: the same for the patches of the tower's input, in their order there, or for those that
            it cuts images into; `None` if `packed` is.
        windows: the same for windows as for `packed`.
        padded: see `Encoder`.
        readers: modules, within the root, that read rows after layers: a module, or a list.
        taps: what the config calls the layers whose outputs the readers are handed as well.
        whole_after_layers: see `Encoder`.
        returns_rows: see `Encoder`.
        masks_layers: see `Encoder`.
        scaling: see `Encoder`.
        axes: see `Encoder`.
    """

    layers: str
    block: Block
    root: str = ""
    class_token: bool = False
    packed: Callable[[Mapping[str, Any], int, Any], list[EncoderImage]] | None = None
    fed: Callable[[Mapping[str, Any], int, Any], list[EncoderImage]] | None = None
    windows: Callable[[Mapping[str, Any], int, Any], Tensor] | None = None
    padded: bool = False
    readers: tuple[str, ...] = ()
    taps: str = ""
    whole_after_layers: bool = False
    returns_rows: bool = True
    masks_layers: bool = True
    scaling: float | None = None
    axes: int = 1


def _by_places(arguments: Mapping[str, Any], side: int, tower: Any) -> list[EncoderImage]:
    """Patches wherever their places say."""
    return placed(arguments["pixel_position_ids"], side)


def _by_cells(arguments: Mapping[str, Any], side: int, tower: Any) -> list[EncoderImage]:
    """Patches in the order of cells."""
    sizes = _sizes(arguments)
    return packed(sizes, [side] * len(sizes), raster=False)


def _by_given_cells(arguments: Mapping[str, Any], side: int, tower: Any) -> list[EncoderImage]:
    """Patches in the order of cells, whose side is given for each image."""
    return packed(_sizes(arguments), arguments["merge_sizes"].tolist(), raster=False)


def _by_windows(arguments: Mapping[str, Any], side: int, tower: Any) -> list[EncoderImage]:
    """Patches in the order of cells, and cells in the order of windows."""
    sizes, (order, _) = _sizes(arguments), _windows(arguments, side, tower.config)
    return packed(sizes, [side] * len(sizes), order, raster=False)


def _by_patch_windows(arguments: Mapping[str, Any], side: int, tower: Any) -> list[EncoderImage]:
    """Patches in the order of windows, and in raster order within these."""
    order, _ = _windows(arguments, 1, tower)
    position = order.argsort().cpu()
    return [replace(one, rows=position[one.rows]) for one in _by_raster(arguments, side, tower)]


def _windows(arguments: Mapping[str, Any], side: int, sizes: Any) -> tuple[Tensor, Tensor]:
    """(tokens) the token at each position, and (S + 1) rows at which windows begin and end.

    Args:
        arguments: the tower's.
        side: side of a token in patches.
        sizes: what has the sizes of windows and patches.
    """
    return get_vision_window_index(
        arguments["grid_thw"],
        spatial_merge_size=side,
        window_size=sizes.window_size,
        patch_size=sizes.patch_size,
        kwargs=dict(arguments),
    )


def _window_bounds(arguments: Mapping[str, Any], side: int, tower: Any) -> Tensor:
    """Where windows of cells begin and end."""
    return _windows(arguments, side, tower.config)[1]


def _by_raster(arguments: Mapping[str, Any], side: int, tower: Any) -> list[EncoderImage]:
    """Patches in raster order, of images of given sizes or of grids."""
    sizes = _sizes(arguments) if "grid_thw" in arguments else _patch_grids(arguments, tower)
    return packed(sizes, [side] * len(sizes), raster=True)


def _patch_grids(arguments: Mapping[str, Any], tower: Any) -> list[tuple[int, int, int]]:
    """(1, height, width) in patches of images of given sizes, or of the size that all have."""
    pixels, given = arguments["pixel_values"], arguments.get("image_sizes")
    given = [pixels.shape[-2:]] * len(pixels) if given is None else given
    patch = tower.config.patch_size
    return [(1, int(h) // patch, int(w) // patch) for h, w in given]


def _by_chunks(arguments: Mapping[str, Any], side: int, tower: Any) -> list[EncoderImage]:
    """Patches in raster order, frame by frame; a token is pooled over the frames of its chunk."""
    frames = _by_raster(arguments, side, tower)
    chunks = (one.rows.unflatten(0, (one.frames, -1)).transpose(0, 1) for one in frames)
    return [
        EncoderImage(one.grid, rows.flatten(1)) for one, rows in zip(frames, chunks, strict=True)
    ]


def _by_frames(arguments: Mapping[str, Any], side: int, tower: Any) -> list[EncoderImage]:
    """Patches in the order of cells; a token of a video is made of as many frames as are merged."""
    together, images = tower.config.temporal_merge_size, []
    for one in _by_cells(arguments, side, tower):
        merged = together if one.frames > 1 else 1
        frames = one.frames // merged
        rows = one.rows.unflatten(0, (frames, merged, -1)).transpose(1, 2)
        images.append(EncoderImage(one.grid, rows.flatten(2).flatten(0, 1), frames))
    return images


def _sizes(arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    return arguments["grid_thw"].tolist()


_QWEN = Tower(
    "blocks",
    Block("norm1", "attn", "norm2", matrices=("qkv",), output="proj"),
    packed=_by_cells,
    fed=_by_cells,
    readers=("merger",),
)
_GLM = replace(_QWEN, readers=("post_layernorm",), returns_rows=False)
_WINDOWS = replace(_QWEN, packed=_by_windows, windows=_window_bounds)
_OMNI = replace(_WINDOWS, block=replace(_QWEN.block, matrices=("q", "k", "v")))
_GLM_OCR = replace(_GLM, block=replace(_GLM.block, norms=("q_norm", "k_norm"), norms_heads=True))
_QWEN3 = replace(_QWEN, readers=("merger", "deepstack_merger_list"))
_GEMMA4 = Tower(
    "encoder.layers",
    Block(
        "input_layernorm",
        "self_attn",
        "pre_feedforward_layernorm",
        scale1=("post_attention_layernorm",),
        scale2=("post_feedforward_layernorm",),
        norms=("q_norm", "k_norm"),
        norms_heads=True,
    ),
    packed=_by_places,
    fed=_by_places,
    padded=True,
    readers=("pooler",),
    returns_rows=False,
    scaling=1.0,
    axes=2,
)
_ERNIE = replace(_QWEN, packed=_by_frames, fed=_by_frames, readers=("ln",), returns_rows=False)
_IDEFICS = Tower("encoder.layers", CLIP_BLOCK)
_INTERNVL = Tower(
    "encoder.layer",
    Block(
        "layernorm_before",
        "attention",
        "layernorm_after",
        scale1=("lambda_1",),
        scale2=("dropout", "lambda_2"),
        norms=("q_norm", "k_norm"),
    ),
    class_token=True,
    masks_layers=False,
)
_MOONVIT = Tower(
    "layers",
    Block("norm1", "attn", "norm2", output="proj"),
    packed=_by_chunks,
    fed=_by_chunks,
    readers=("final_layernorm",),
    returns_rows=False,
)
_QIANFAN = replace(
    _INTERNVL,
    layers="layers",
    block=replace(
        _INTERNVL.block,
        scale1=("lambda_1", "drop_path1"),
        scale2=("dropout", "lambda_2", "drop_path2"),
    ),
)
_MUSE = Tower(
    "layers",
    Block("norm1", "attn", "norm2", output="proj"),
    packed=_by_patch_windows,
    fed=_by_raster,
    whole_after_layers=True,
    returns_rows=False,
)
_OVIS = Tower(
    "encoder.layers", Block("rms_norm1", "attention", "rms_norm2", "ffn"), root="transformer"
)
_EDGE = Tower(
    "encoder.layers", replace(CLIP_BLOCK, output="out_proj"), packed=_by_cells, fed=_by_cells
)
_VIDEO_LLAMA = replace(
    _EDGE,
    packed=_by_given_cells,
    fed=_by_given_cells,
    readers=("post_layernorm",),
    returns_rows=False,
)
_GRANITE = replace(_IDEFICS, readers=("connector",), taps="deepstack_visual_indexes")
_HUNYUAN = Tower(
    "layers",
    replace(CLIP_BLOCK, output="o_proj"),
    packed=_by_raster,
    fed=_by_raster,
    whole_after_layers=True,
    returns_rows=False,
)
_MINIMAX = replace(_EDGE, layers="layers", block=replace(_EDGE.block, flat=True))
_MINICPM = replace(_EDGE, packed=None, fed=None)
_PADDLE = Tower(
    "encoder.layers",
    replace(CLIP_BLOCK, output="out_proj"),
    root="vision_model",
    packed=_by_raster,
    fed=_by_raster,
)
_PIXTRAL = Tower(
    "transformer.layers",
    Block("attention_norm", "attention", "ffn_norm", "feed_forward"),
    packed=_by_raster,
    fed=_by_raster,
)

TOWERS: dict[str, Tower] = {  # vision_config.model_type -> tower
    "cohere_compass_vision": _QWEN3,
    "cosmos3_edge_vision": _EDGE,
    "dots3_note_vision_encoder": replace(_GLM_OCR, readers=("norm",)),
    "ernie4_5_vl_moe_vision": _ERNIE,
    "exaone4_5_vision": _WINDOWS,
    "gemma4_vision": _GEMMA4,
    "glm4v_moe_vision": _GLM,
    "glm4v_vision": _GLM,
    "glm_ocr_vision": _GLM_OCR,
    "granite_docling_vision": _GRANITE,
    "hunyuan_vl_vision": _HUNYUAN,
    "idefics3_vision": _IDEFICS,
    "internvl_vision": _INTERNVL,
    "kimi_k25_vision": _MOONVIT,
    "janus_vision_model": _IDEFICS,
    "minicpm_ocr_vision": _MINICPM,
    "minicpmv4_6_vision": _MINICPM,
    "minicpmv4_7_vision": _MINICPM,
    "minimax_m3_vl_vision": _MINIMAX,
    "molmo2_vision": replace(_IDEFICS, layers="layers"),
    "muse_glimmer_vision": _MUSE,
    "muse_spark_vision": _MUSE,
    "ovis2_vision": _OVIS,
    "paddleocr_vl_vision": _PADDLE,
    "phi4_multimodal_vision": replace(_IDEFICS, whole_after_layers=True),
    "pixtral": _PIXTRAL,
    "qianfan_ocr_vision": _QIANFAN,
    "qwen2_5_omni_vision_encoder": _OMNI,
    "qwen2_5_vl_vision": _WINDOWS,
    "qwen2_vl_vision": _QWEN,
    "qwen3_5_moe_vision": _QWEN,
    "qwen3_5_vision": _QWEN,
    "qwen3_omni_moe_vision_encoder": _QWEN3,
    "qwen3_vl_moe_vision": _QWEN3,
    "qwen3_vl_vision": _QWEN3,
    "smolvlm_vision": _IDEFICS,
    "video_llama_3_vision": _VIDEO_LLAMA,
}


def tower(family: Family, path: str) -> Encoder | None:
    """The vision tower of a family, or `None` if its kind is not known.

    Args:
        family: the family.
        path: where the tower is in the base model.
    """
    vision, module = family.config.vision_config, family._child(family.base, path)
    encoder = tower_encoder(module)
    if encoder is None and vision.model_type in TOWERS:
        encoder = _encoder(TOWERS[vision.model_type], family, module)
    return encoder


def _encoder(kind: Tower, family: Family, module: Any) -> Encoder:
    root = family._child(module, kind.root) if kind.root else module
    heads = getattr(root.config, "num_heads", None)
    readers: list[Any] = []
    for name in kind.readers:
        reader = family._child(root, name)
        readers += reader if isinstance(reader, nn.ModuleList) else [reader]
    layers = family._child(root, kind.layers)
    return Encoder(
        layers=layers,
        attention=lambda layer: getattr(layer, kind.block.attention),
        heads=heads or root.config.num_attention_heads,
        class_token=kind.class_token,
        projections=kind.block.projections,
        by_head=kind.block.norms_heads,
        groups=getattr(getattr(layers[0], kind.block.attention), "num_key_value_groups", 1),
        tower=root,
        block=kind.block,
        packed=_bound(kind.packed, root),
        windows=_bound(kind.windows, root),
        pixels=None if kind.fed is None else functools.partial(_pixels, kind.fed, root),
        padded=kind.padded,
        readers=tuple(readers),
        taps=tuple(sorted(getattr(root.config, kind.taps))) if kind.taps else (),
        whole_after_layers=kind.whole_after_layers,
        returns_rows=kind.returns_rows,
        masks_layers=kind.masks_layers,
        scaling=kind.scaling,
        axes=kind.axes,
    )


def _bound(
    says: Callable[[Mapping[str, Any], int, Any], Said] | None, tower: Any
) -> Callable[[Mapping[str, Any], int], Said] | None:
    """What says something from the arguments of any tower, for this one."""
    return None if says is None else lambda given, side: says(given, side, tower)


def _pixels(
    fed: Callable[[Mapping[str, Any], int, Any], list[EncoderImage]],
    tower: Any,
    arguments: Mapping[str, Any],
    side: int,
) -> list[Tensor]:
    """Return the (V, P) pixels of each image's tokens, from the tower's input."""
    given: Tensor = arguments["hidden_states" if "hidden_states" in arguments else "pixel_values"]
    images = fed(arguments, side, tower)
    if "grid_thw" in arguments:
        count = int(arguments["grid_thw"].prod(-1).sum())
        return pixels_of_rows(given.reshape(count, -1), images)
    if given.dim() == 3:  # patches of images that are padded to one length
        return pixels_of_rows(given.flatten(0, 1), images)
    patches, grids = cut(given, (tower.config.patch_size,) * 2), _patch_grids(arguments, tower)
    apart = [
        image[:height, :width].flatten(0, 1)
        for image, (_, height, width) in zip(patches, grids, strict=True)
    ]
    return pixels_of_rows(torch.cat(apart), images)
