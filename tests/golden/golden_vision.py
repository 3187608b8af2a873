"""ToMe: the released matching on given keys, and whole encoders with recorded weights."""

import json
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from golden_case import Case, Check, assert_close, assert_same
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

import foveate
from foveate.core import Reduction, VisualTokens
from foveate.families import find_family
from foveate.methods.tome import ToMe
from foveate.ops.matching import match, match_every

FLOATS, MODEL = 1e-5, 1e-4  # absolute tolerances


def checks(case: Case) -> dict[str, Check]:
    if "params" not in case.facts or "kind" not in case.facts["params"]:
        return {"weights": partial(_check_schedules, case)}
    found = {
        "bipartite_soft_matching": {"matching": _check_matching, "method": _check_method},
        "kth_bipartite_soft_matching": {"matching": _check_every},
        "end_to_end": {"layers": _check_layers, "logits": _check_logits},
    }
    return {
        name: partial(check, case) for name, check in found[case.facts["params"]["kind"]].items()
    }


# -- the matching alone


def _special(case: Case) -> int:
    params = case.facts["params"]
    return int(params["class_token"]) + int(params["distill_token"])


def _reduction(case: Case, mass: Tensor | None) -> Reduction:
    """The reduction of all rows, special ones included, in the release's order."""
    special = _special(case)
    keys = F.normalize(case.arrays["metric"], dim=-1)[:, special:]
    index, slot = match(keys, case.facts["params"]["r_effective"], special)
    return Reduction.mean(index, slot, None if mass is None else mass[:, special:, 0]).after(
        special
    )


def _check_matching(case: Case) -> None:
    arrays = case.arrays
    total = arrays["x"].shape[1]
    reduction = _reduction(case, None)
    slot, _ = reduction._segments(total)
    pairs = zip(arrays["src_idx"], arrays["dst_idx"], strict=True)
    for image, (sources, targets) in enumerate(pairs):
        survivor = reduction.index[image][slot[image]]
        moved = (survivor != torch.arange(total)).nonzero()[:, 0]
        assert_same(moved, (2 * sources).sort().values, "tokens that merge away")
        assert_same(survivor[2 * sources], 2 * targets + 1, "tokens that they merge into")
    for image, order in enumerate(reduction.index):
        even = order[order % 2 == 0]
        assert_same(even, 2 * arrays["unm_idx"][image], "what is left of the even rows, in order")
    for mass, suffix in ((None, ""), (arrays["size_in"], "_sized")):
        reduction = _reduction(case, mass)
        merged = reduction.apply(arrays["x"])
        assert_close(merged, arrays[f"wavg_x{suffix}"], FLOATS, "x")
        sizes = torch.ones_like(arrays["size_in"]) if mass is None else mass
        slot, _ = reduction._segments(total)
        got = sizes.new_zeros(merged.shape[:2]).scatter_add(1, slot, sizes[..., 0])
        assert_close(got[..., None], arrays[f"wavg_size{suffix}"], FLOATS, "sizes")
    if _special(case) == 2:
        # The release's merge moves the distillation token to row 1, but its unmerge looks for it at
        # the head of the odd rows: hand it over where that looks, to have the same.
        even = arrays["unm_idx"].shape[1]
        taken = [
            merged[:, :1],
            merged[:, even : even + 1],
            merged[:, 1:even],
            merged[:, even + 1 :],
        ]
        merged = torch.cat(taken, 1)
    back = reduction.recover(merged, total)
    assert_close(back, arrays["unmerged"], FLOATS, "unmerged")
    source = F.one_hot(slot, merged.shape[1]).transpose(1, 2).float()
    assert_same(source, arrays["source"], "sources")


def _check_method(case: Case) -> None:
    """`ToMe.reduce` and its clipping, on the patches."""
    arrays, params, special = case.arrays, case.facts["params"], _special(case)
    patches = arrays["x"][:, special:]
    images, total = patches.shape[:2]
    method = ToMe(**_fields(params["r"]))
    steps = method.steps(_Facts())  # none where nothing merges
    count = method.count(total, total, steps[0], 0) if steps else total
    assert total - count == params["r_effective"]
    tokens = VisualTokens(
        lambda: patches,
        torch.arange(total).expand(images, -1),
        (1, total),
        signals={"encoder_keys": arrays["metric"][:, None, None, special:]},
        merged=arrays["size_in"][:, special:, 0],
        special=special,
    )
    merged = method.reduce(tokens, count).apply(patches)
    full = torch.cat((arrays["x"][:, :special], merged), 1)
    assert_close(full, arrays["wavg_x_sized"], FLOATS, "x")


class _Facts:
    text_layers, vision_layers, feature_layer = 0, 4, 3


def _check_every(case: Case) -> None:
    arrays = case.arrays
    keys = F.normalize(arrays["metric"], dim=-1)
    every, total = case.facts["params"]["k"], keys.shape[1]
    whole = total // every * every  # the release drops the remainder, and unmerges without it
    index, slot = match_every(keys, every)
    assert bool((slot[:, whole:] < 0).all()), "the remainder merges into nothing"
    if "dst_idx" in arrays:  # runs of one merge nothing
        sources = [i for i in range(whole) if i % every != every - 1]
        assert_same(slot[:, sources], arrays["dst_idx"].flatten(1), "tokens that they merge into")
    for mass, suffix in ((None, ""), (arrays.get("size_in"), "_sized")):
        if f"wavg_x{suffix}" not in arrays:
            continue
        sizes = torch.ones_like(keys[..., :1]) if mass is None else mass
        reduction = Reduction.mean(index, slot, sizes[..., 0])
        merged = reduction.apply(arrays["x"])
        assert_close(merged, arrays[f"wavg_x{suffix}"], FLOATS, "x")
        counted = sizes[..., 0].masked_fill(slot < 0, 0)
        counted = counted.new_zeros(index.shape).scatter_add(1, slot.clamp(min=0), counted)
        assert_close(counted[..., None], arrays[f"wavg_size{suffix}"], FLOATS, "sizes")
    back = reduction.recover(merged, total)[:, : arrays["unmerged"].shape[1]]
    assert back.shape[1] >= whole
    assert_close(back, arrays["unmerged"], FLOATS, "unmerged")
    if "source" in arrays:
        taken = F.one_hot(slot.clamp(min=0), len(index[0])) * (slot >= 0)[..., None]
        assert_same(taken.transpose(1, 2), arrays["source"], "sources")


def _fields(r: Any) -> dict[str, Any]:
    """Fields of the method from a recorded r: a number, one for each layer, or one that tilts."""
    if isinstance(r, dict):
        return {"r": r["r"], "inflect": r["inflect"]}
    return {"r": tuple(r) if isinstance(r, list) else r}


def _check_schedules(case: Case) -> None:
    """The recorded schedules, which have no file of their own among the cases."""
    for row in json.loads((case.path.parent / "schedules.json").read_text()):
        schedule = ToMe(**_fields(row["r"])).schedule(row["num_layers"])
        assert list(schedule) == row["schedule"], row


# -- whole encoders


def _build(case: Case) -> Any:
    """The recorded timm encoder as a transformers model."""
    path = case.path.parent / case.facts["params"]["weights"]
    weights = load_file(path)
    distilled = "dist_token" in weights
    kind, config = (
        (DeiTForImageClassificationWithTeacher, DeiTConfig)
        if distilled
        else (ViTForImageClassification, ViTConfig)
    )
    model = kind(
        config(
            image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=5,
            num_attention_heads=4, intermediate_size=128, num_labels=10, layer_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    prefix = "deit" if distilled else "vit"
    renamed = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    state = {}
    for name, array in weights.items():
        stem, _, kind_of = name.rpartition(".")
        if name in renamed:
            state[f"{prefix}.{renamed[name]}"] = array
        elif stem in heads:
            state[f"{heads[stem] if distilled else 'classifier'}.{kind_of}"] = array
        else:
            state |= {f"{prefix}.{key}": value for key, value in _block(name, array).items()}
    model.load_state_dict(state)
    return model


def _block(name: str, array: Tensor) -> dict[str, Tensor]:
    """A weight of a timm block under its transformers names; fused projections are split."""
    _, number, *inner, kind = name.split(".")
    start = f"layers.{number}"
    if inner == ["attn", "qkv"]:
        parts = zip(("q_proj", "k_proj", "v_proj"), array.chunk(3), strict=True)
        return {f"{start}.attention.{part}.{kind}": piece for part, piece in parts}
    names = {
        ("attn", "proj"): "attention.o_proj",
        ("norm1",): "layernorm_before",
        ("norm2",): "layernorm_after",
        ("mlp", "fc1"): "mlp.fc1",
        ("mlp", "fc2"): "mlp.fc2",
    }
    return {f"{start}.{names[tuple(inner)]}.{kind}": array}


def _method(case: Case) -> ToMe:
    params = case.facts["params"]
    return ToMe(**_fields(params["r"]), prop_attn=params["prop_attn"])


def _check_layers(case: Case) -> None:
    """The output of every layer, in the release's order, and what became of each token."""
    model, method = _build(case), _method(case)
    assert list(method.schedule(5)) == case.facts["params"]["schedule"]
    encoder = find_family(model).encoder
    outputs: list[Tensor] = []
    with foveate.use(model, method) as run, torch.no_grad():
        handles = [
            layer.register_forward_hook(lambda module, args, output: outputs.append(output))
            for layer in encoder.layers
        ]
        with run.vision.collect("image", {}) as passes:
            model(case.arrays["image"])
        for handle in handles:
            handle.remove()
    for i, output in enumerate(outputs):
        assert_close(output, case.arrays[f"block{i}_out"], MODEL, f"output of layer {i}")
    (encoding,) = passes
    (images,) = encoding.groups
    whole = images.layout.after(encoder.special)
    total = images.total + encoder.special
    assert_same(whole.sizes(total)[..., None], case.arrays["size"], "sizes")
    slot, _ = whole._segments(total)
    source = F.one_hot(slot, whole.kept).transpose(1, 2).float()
    assert_same(source, case.arrays["source"], "sources")


def _check_logits(case: Case) -> None:
    model = _build(case)
    with foveate.use(model, _method(case)), torch.no_grad():
        logits = model(case.arrays["image"]).logits
    assert_close(logits, case.arrays["logits"], MODEL, "logits")
    with torch.no_grad():
        distance = (model(case.arrays["image"]).logits - logits).abs().max()
    assert distance > 10 * MODEL, "merging changes nothing, so this test shows nothing"
