"""GTP-ViT: recorded selections and propagations, and a whole encoder with recorded weights."""

from collections.abc import Iterator
from functools import partial

import torch
from golden_case import Case, Check, assert_close, assert_same
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

import foveate
from foveate.core import VisualTokens
from foveate.methods.gtpvit import GTPViT

SCORES = {"Mixed": "mixed", "IMG": "received", "CLS": "cls", "Diag": "diagonal", "Sum": "sum"}
SCORE = {
    f"{name}Attn{how}": f"{kind}-{how.lower()}"
    for name, kind in SCORES.items()
    for how in ("Max", "Mean")
} | {"CosSimMax": "cosine-max", "CosSimMean": "cosine-mean"}


def checks(case: Case) -> dict[str, Check]:
    kind = case.facts["params"]["kind"]
    check = {"select": _select, "propagate": _propagate, "end_to_end": _model}[kind]
    return {kind: partial(check, case)}


def _select(case: Case) -> None:
    params, attention = case.facts["params"], case.arrays["attn"]
    special = int(params["class_token"])
    scores = GTPViT(score=SCORE[params["selection"]]).scores(attention, special)[:, special:]
    order = scores.argsort(dim=1, descending=True, stable=True) + special
    kept = scores.shape[1] - params["num_prop"]
    assert_same(order[:, :kept], case.arrays["index_kept"], "kept, best first")
    assert_same(order[:, kept:], case.arrays["index_prop"], "propagated, best first")


def _propagate(case: Case) -> None:
    """Recorded graphs have weights of any kind, so that links are given as they are."""
    arrays, alpha = case.arrays, case.facts["params"]["alpha"]
    special = int(case.facts["params"]["class_token"])
    x, graph, scales = arrays["x"], arrays["graph"], arrays.get("token_scales")
    images, total = graph.shape[:2]
    kept = arrays["index_kept"] - special
    scores = torch.zeros(images, total).scatter(1, kept, 1.0)
    tokens = VisualTokens(
        lambda: x[:, special:],
        torch.arange(total).expand(images, -1),
        (1, total),
        merged=None if scales is None else scales[:, special:],
        memory={"scores": scores, "graph": (graph, torch.ones(images, total))},
    )
    method = GTPViT(alpha=alpha, token_scale=scales is not None)
    reduction = method.reduce(tokens, kept.shape[1])
    order = kept.argsort(dim=1)
    assert_same(reduction.index, kept.gather(1, order), "kept")
    for got, name in ((reduction.apply(x[:, special:]), "x_out"), (reduction.mass, "scales")):
        want = arrays.get("token_scales_out" if name == "scales" else name)
        if want is None:
            continue
        want = want[:, special:]
        at = order[..., None].expand(-1, -1, want.shape[2]) if want.dim() == 3 else order
        assert_close(got, want.gather(1, at), 1e-5, name)


def _model(case: Case) -> None:
    """The whole encoder: links, what survives each block, and the states after it."""
    params, arrays = case.facts["params"], case.arrays
    stored = case.path.parent / params["weights"]
    model, facts = _vit(Case(case.slug, stored, case.root))
    method = GTPViT(
        r=params["num_prop"],
        alpha=params["alpha"],
        neighbours=params["num_neighbours"],
        graph=params["graph_type"].lower(),
        score=SCORE[params["selection"]],
        sparsity=float(params["sparsity"]),
        token_scale=params["token_scale"],
    )
    seen: list[Tensor] = []
    with torch.no_grad():
        embedded = model.embeddings(arrays["image"])
    side = facts["img_size"] // facts["patch_size"]
    tokens = VisualTokens(
        lambda: embedded[:, 1:], torch.arange(side * side)[None], (side, side), special=1
    )
    linked, norm = method.links(tokens)
    assert_close(linked * norm[:, None] * norm[..., None], arrays["graph0"], 1e-5, "graph")
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
        for layer in model.layers
    ]
    with foveate.use(model, method) as run, torch.no_grad():
        output = model(arrays["image"])
    for handle in handles:
        handle.remove()
    left = torch.arange(side * side)[None]
    (kept,) = run.record.images
    for number, want in _blocks(arrays):
        left = left.gather(1, arrays[f"index_kept{number}"] - 1)  # best first
        raster, order = left.sort(dim=1)
        assert_same(kept.kept[f"vision:{number}"], raster[0], f"kept in block {number}")
        rows = torch.cat((torch.zeros(1, 1, dtype=torch.long), order + 1), 1)[..., None]
        assert_close(
            seen[number], want.gather(1, rows.expand(-1, -1, want.shape[2])), 1e-4, f"{number}"
        )
    weights = load_file(stored)
    logits = output.last_hidden_state[:, 0] @ weights["head.weight"].T + weights["head.bias"]
    assert_close(logits, arrays["logits"], 1e-4, "logits")


def _blocks(arrays: dict[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    number = 0
    while (states := arrays.get(f"block{number}_out")) is not None:
        yield number, states
        number += 1


def _vit(case: Case) -> tuple[ViTModel, dict]:
    """A ViT with recorded weights, which timm names otherwise."""
    facts, arrays = case.facts["params"], case.arrays
    config = ViTConfig(
        hidden_size=facts["embed_dim"],
        num_hidden_layers=facts["depth"],
        num_attention_heads=facts["num_heads"],
        intermediate_size=facts["embed_dim"] * facts["mlp_ratio"],
        image_size=facts["img_size"],
        patch_size=facts["patch_size"],
        layer_norm_eps=facts["norm_eps"],
        qkv_bias=True,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
    }
    found = {
        "embeddings.cls_token": arrays["cls_token"],
        "embeddings.position_embeddings": arrays["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": arrays["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": arrays["patch_embed.proj.bias"],
        "layernorm.weight": arrays["norm.weight"],
        "layernorm.bias": arrays["norm.bias"],
    }
    for name, value in arrays.items():
        if not name.startswith("blocks."):
            continue
        _, number, rest = name.split(".", 2)
        if rest.startswith("attn.qkv"):
            for part, values in zip("qkv", value.chunk(3), strict=True):
                found[f"layers.{number}.attention.{part}_proj.{rest.rsplit('.')[-1]}"] = values
            continue
        for old, new in names.items():
            rest = rest.replace(old, new)
        found[f"layers.{number}.{rest}"] = value
    model.load_state_dict(found)
    return model, facts
