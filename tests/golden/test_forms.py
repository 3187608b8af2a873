"""The harness reads every documented form of a case, also those that no case at hand has.

Expected arrays are worked out here by plain loops over what the cases' README says.
"""

import json

import golden_vision
import numpy as np
import pytest
import torch
from golden_case import Case, checks_of
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel


def saved(folder, slug, arrays, **facts):
    """A case of some arrays in a file."""
    path = folder / slug / "case.safetensors"
    path.parent.mkdir()
    arrays = {name: array.contiguous() for name, array in arrays.items()}
    save_file(arrays, path, {name: json.dumps(fact) for name, fact in facts.items()})
    return Case(slug, path, folder)


def every(k, total, sized):
    """Arrays of a kth matching of two images: all but the last of each run of k merge."""
    generator = torch.Generator().manual_seed(k * total)
    metric, x = (torch.randn(2, total, width, generator=generator) for width in (8, 5))
    size = torch.randint(1, 4, (2, total, 1), generator=generator).float()
    keys, whole = torch.nn.functional.normalize(metric, dim=-1), total // k * k
    last = list(range(k - 1, whole, k))
    arrays = {"metric": metric, "x": x}
    into = torch.zeros(2, whole, dtype=torch.long)
    for image in range(2):
        for token in range(whole):
            alike = [float(keys[image, token] @ keys[image, other]) for other in last]
            into[image, token] = last.index(token) if token in last else alike.index(max(alike))
    moved = [token for token in range(whole) if token not in last]
    if moved:
        arrays["dst_idx"] = into[:, moved]
    for suffix, mass in (("", torch.ones_like(size)), ("_sized", size)):
        sums, counts = torch.zeros(2, len(last), 5), torch.zeros(2, len(last), 1)
        for image in range(2):
            for token in range(whole):
                sums[image, into[image, token]] += x[image, token] * mass[image, token]
                counts[image, into[image, token]] += mass[image, token]
        arrays |= {f"wavg_x{suffix}": sums / counts, f"wavg_size{suffix}": counts}
        back = torch.stack([(sums / counts)[image, into[image]] for image in range(2)])
        if not sized:
            break
    if sized:
        arrays["size_in"] = size
    return arrays | {"unmerged": back}


@pytest.mark.parametrize(("k", "total"), [(1, 6), (2, 16), (2, 17), (3, 17), (5, 19)])
@pytest.mark.parametrize("sized", [False, True])
def test_matching_every_kth_drops_a_remainder(k, total, sized, tmp_path):
    params = {"kind": "kth_bipartite_soft_matching", "k": k, "seed": 0}
    for check in checks_of(saved(tmp_path, "tome", every(k, total, sized), params=params)).values():
        check()


@pytest.mark.parametrize(
    ("r", "schedule"),
    [
        (7, [7] * 5),
        ([20, 0, 10], [20, 0, 10, 0, 0]),
        ({"r": 8, "inflect": 1.0}, [0, 4, 8, 12, 16]),
        ({"r": 6, "inflect": -0.5}, [9, 7, 6, 4, 3]),
    ],
)
def test_an_encoder_may_merge_by_any_form_of_r(r, schedule, tmp_path):
    params = {"kind": "end_to_end", "r": r, "schedule": schedule, "prop_attn": False}
    case = saved(tmp_path, "tome", {"image": torch.zeros(1)}, params=params)
    assert list(golden_vision._method(case).schedule(5)) == schedule


def encoded(images):
    """A random CLIP of 576 patches, its file form, and what the release reads off it."""
    config = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 48, "patch_size": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(**config, initializer_factor=3.0)).eval()
    pixels = torch.randn(images, 3, 48, 48)
    with torch.no_grad():
        states = clip(pixels, output_hidden_states=True).hidden_states[-2]
        last = clip.encoder.layers[-1]
        normed = last.layer_norm1(states)
        query, key = last.self_attn.q_proj(normed), last.self_attn.k_proj(normed)
        attention = (query[:, :1] @ key.mT / 4).softmax(-1)[:, 0, 1:]
    weights = {f"encoder.vision_model.{name}": w for name, w in clip.state_dict().items()}
    keys = torch.nn.functional.normalize(key[:, 1:], dim=-1)
    return {"pixel_values": pixels, **weights}, config, states[:, 1:], attention, keys


def released(x, attention, keys, plus, ratio):
    """PruMerge as its method card has it, image by image, doubles and all."""
    share = ratio or len(outliers(attention)) / attention.numel()
    order, outputs = [], []
    for a, values, own in zip(attention, x, keys, strict=True):
        kept = a.topk(int(len(a) * share)).indices.tolist()
        if plus and ratio:
            kept += list(range(int(1 / ratio) // 2, 575, int(1 / ratio)))
        elif plus:
            kept += [i for i in range(0, 575, int(int(1 / share) / 3)) if i not in kept]
        marked = torch.arange(len(a)).index_fill(0, torch.tensor(kept), 0)
        rest = marked.sort().values[len(kept) :].tolist()
        merged = []
        for place, patch in enumerate(kept):
            pool = torch.tensor([*kept[:place], *kept[place + 1 :], *rest])
            near = pool[(own[pool] @ own[patch]).topk(32).indices]
            merged.append(values[patch] + (values[near] * a[near, None]).sum(0))
        order.append(kept)
        outputs.append(torch.stack([*merged, (values[rest] * a[rest, None]).sum(0)]))
    return torch.tensor(order), torch.stack(outputs)


def outliers(attention):
    low, high = np.percentile(attention.flatten().numpy(), (25, 75))
    return attention[attention > high + 1.5 * (high - low)]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("ratio", [None, 0.125])
@pytest.mark.parametrize("plus", [False, True])
def test_prumerge_of_one_image_and_of_two(plus, ratio, images, tmp_path):
    """With a fixed ratio the release keeps some patches twice; its fence is one for the batch."""
    arrays, config, *seen = encoded(images)
    coupled = plus and ratio is None and images > 1  # the release fails, or leaves a grid to one
    kept, output = released(*seen, plus and not coupled, ratio)
    assert (len({*kept[0].tolist()}) < kept.shape[1]) == bool(plus and ratio)
    run = {
        "variant": "plus" if plus else "base", "adaptive": ratio is None, "ratio_argument": ratio
    }  # fmt: skip
    arrays |= {"run0.kept_in_order": kept, "run0.output": output}
    case = saved(tmp_path, "llava-prumerge", arrays, runs=[run], encoder_config=config)
    for check in checks_of(case).values():
        if coupled:
            with pytest.raises(pytest.skip.Exception, match="depends on the others"):
                check()
        else:
            check()


def semantic(begun, around, weights, heads, shortcut):
    """A block of the release: (n, C) tokens attend to themselves and to (m, C) others."""

    def linear(name, x):
        return x @ weights[f"w.{name}.weight"].T + weights[f"w.{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * weights[f"w.{name}.weight"] + weights[f"w.{name}.bias"]

    query = linear("attn.q", norm("norm1", begun))
    key, value = linear("attn.kv", norm("norm1", torch.cat((begun, around)))).chunk(2, -1)
    width = query.shape[1] // heads
    parts = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / width**0.5
        parts.append(scores.softmax(-1) @ value[:, part])
    made = weights["w.layer_scale_1"] * linear("attn.proj", torch.cat(parts, 1))
    made = begun + made if shortcut else made
    hidden = torch.nn.functional.gelu(linear("mlp.fc1", norm("norm2", made)))
    return made + weights["w.layer_scale_2"] * linear("mlp.fc2", hidden)


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("mode", ["dense", "refine"])
def test_semantic_tokens_of_every_mode(mode, shortcut, side, tmp_path):
    """Four windows of 7 x 7 of a grid of 14 x 14, each with the 10 x 10 patches around it."""
    generator = torch.Generator().manual_seed(side)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / 3

    shapes = {"attn.q": (8, 8), "attn.kv": (16, 8), "attn.proj": (8, 8), "mlp.fc1": (32, 8)}
    shapes |= {"mlp.fc2": (8, 32), "norm1": (8,), "norm2": (8,)}
    weights = {f"w.layer_scale_{i}": random(8) for i in (1, 2)}
    for name, shape in shapes.items():
        weights |= {f"w.{name}.weight": random(*shape), f"w.{name}.bias": random(shape[0])}
    x, given = random(2, 14, 14, 8), random(2, 2 * side, 2 * side, 8)
    out = torch.zeros_like(given)
    for image, row, column in np.ndindex(2, 2, 2):
        here = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
        begun = given[image][here]
        if mode == "dense":
            window = x[image, row * 7 : row * 7 + 7, column * 7 : column * 7 + 7]
            begun = torch.nn.functional.adaptive_max_pool2d(window.permute(2, 0, 1), side)
            begun = begun.permute(1, 2, 0)
        around = x[image, row * 4 : row * 4 + 10, column * 4 : column * 4 + 10].reshape(100, 8)
        made = semantic(begun.reshape(-1, 8), around, weights, 2, shortcut)
        out[image][here] = made.view(side, side, 8)
    params = {
        "kind": "SemanticAttentionBlock", "dim": 8, "num_heads": 2, "window_size": 7,
        "sample_window_size": side, "shortcut": shortcut, "grid": 14, "mode": mode,
        "kv_window": 10, "kv_stride": 4, "norm_eps": 1e-5,
    }  # fmt: skip
    arrays = {"x": x.flatten(1, 2), "semantic_out": out.flatten(1, 2), **weights}
    if mode == "refine":
        arrays["semantic_in"] = given.flatten(1, 2)
    for check in checks_of(saved(tmp_path, "stvit", arrays, params=params)).values():
        check()
