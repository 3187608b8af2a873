"""VTC-CLS and FasterVLM: a recorded CLIP encoder, run inside a LLaVA around it."""

from collections.abc import Iterator
from functools import partial

import torch
from golden_case import Case, Check, Watch, assert_close, assert_same
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import foveate
from foveate.core import Method, Scorer, VisualTokens
from foveate.families import find_family
from foveate.methods.fastervlm import FasterVLM
from foveate.methods.vtccls import VTCCLS

IMAGE, TEXT = 7, 3  # token ids
FEATURES = {"vtc-cls": "features", "fastervlm": "output_features"}


def checks(case: Case) -> dict[str, Check]:
    found = {"scores": _check_scores, "model": _check_model}
    if any(name.endswith(".output_source") for name in case.names):
        found["stitched"] = _check_stitched
    return {name: partial(check, case) for name, check in found.items()}


def _runs(case: Case) -> Iterator[tuple[str, Scorer, dict[str, Tensor]]]:
    """What is run, the method that should do the same, and expectations with a crop axis."""
    for run, expected in case.runs():
        kept = expected["kept"].shape[-1]
        if case.slug == "vtc-cls":
            assert kept == run["token_num"], run
            one_crop = {name: expected[name][None] for name in ("kept", "score")}
            yield str(run), VTCCLS(keep=kept, layers=run["start_layer"]), expected | one_crop
        else:
            yield str(run), FasterVLM(keep=kept), expected


def build(case: Case) -> LlavaForConditionalGeneration:
    """LLaVA with the recorded encoder, a projector that changes nothing, and a random Llama."""
    vision = CLIPVisionConfig(**case.facts["encoder_config"])
    text = LlamaConfig(
        vocab_size=16,
        hidden_size=vision.hidden_size,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        projector_hidden_act="linear",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    prefix = "encoder.vision_model."
    weights = {
        name.removeprefix(prefix): array
        for name, array in case.arrays.items()
        if name.startswith(prefix)
    }
    missing, unexpected = model.model.vision_tower.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all("position_ids" in name for name in missing), missing
    for linear in (
        model.model.multi_modal_projector.linear_1,
        model.model.multi_modal_projector.linear_2,
    ):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def prompt(case: Case, tokens: int) -> dict[str, Tensor]:
    """One prompt in which a run of placeholders for each crop stands between text tokens."""
    pixels = case.arrays["pixel_values"]
    ids = [TEXT]
    for _ in pixels:
        ids += [IMAGE] * tokens + [TEXT]
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


def encode(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(B, V, C) features, and the full attention maps of each layer, by the eager kernel."""
    tower = model.model.vision_tower
    kernel = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    tower.set_attn_implementation(kernel)
    return out.hidden_states[-2][:, 1:], list(out.attentions)


def _check_scores(case: Case) -> None:
    """The method alone, on attention maps that are computed in full."""
    model = build(case)
    features, maps = encode(model, case.arrays["pixel_values"])
    images, total = features.shape[:2]
    for run, method, expected in _runs(case):
        (step,) = method.steps(find_family(model))
        (need,) = step.needs
        signal = torch.stack([maps[layer][:, :, 0, 1:] for layer in need.layers], dim=1)
        index = torch.arange(total).expand(images, -1)
        side = round(total**0.5)
        tokens = VisualTokens(
            lambda: features, index, (side, side), signals={"cls_attention": signal}
        )
        assert_close(method.scores(tokens), expected["score"], 1e-5, f"scores of {run}")
        kept = method.reduce(tokens, expected["kept"].shape[-1]).index
        assert_same(kept, expected["kept"], f"kept of {run}")
        if "kept_mask" in expected:
            mask = torch.zeros_like(expected["kept_mask"]).scatter(1, kept, 1)
            assert_same(mask, expected["kept_mask"], f"mask of {run}")


def run_in_model(
    model: LlavaForConditionalGeneration, method: Method, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Kept patches (crops, K), and what decoder layer 0 is given: hidden states, (cos, sin)."""
    seen = {}

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen["hidden"], seen["rotary"] = args[0][0], kwargs["position_embeddings"]

    with foveate.use(model, method) as run, torch.no_grad():
        handle = Watch(model.model.language_model.layers[0], look)
        model(**inputs)
        handle.remove()
    assert all(list(places) == ["pre_llm"] for places in run.kept)
    return torch.stack([places["pre_llm"] for places in run.kept]), seen["hidden"], seen["rotary"]


def _check_model(case: Case) -> None:
    """The whole model: pixels in, kept patches and the sequence the language model reads out."""
    model = build(case)
    features, _ = encode(model, case.arrays["pixel_values"])
    inputs = prompt(case, features.shape[1])
    language = model.model.language_model
    text = language.embed_tokens.weight[TEXT].detach()[None]
    for run, method, expected in _runs(case):
        kept, hidden, rotary = run_in_model(model, method, inputs)
        assert_same(kept, expected["kept"], f"kept of {run}")
        values = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        recorded = expected[FEATURES[case.slug]]
        if "output_source" not in expected:
            assert_close(values, recorded, 1e-4, f"features of {run}")
        sequence = torch.cat([text, *[torch.cat((crop, text)) for crop in values]])
        assert_close(hidden, sequence, 1e-4, f"sequence of {run}")
        consecutive = torch.arange(len(sequence))[None]
        for got, want in zip(rotary, language.rotary_emb(hidden, consecutive), strict=True):
            assert_close(got, want, 1e-5, f"positions of {run}")


def _check_stitched(case: Case) -> None:
    """Tiled images: the order in which the release hands kept patches on."""
    model = build(case)
    features, _ = encode(model, case.arrays["pixel_values"])
    crops, total = features.shape[:2]
    side = round(total**0.5)
    inputs = prompt(case, total)
    for (grid, _), (run, method, expected) in zip(case.runs(), _runs(case), strict=True):
        kept, _, _ = run_in_model(model, method, inputs)
        alive = torch.zeros(crops, total, dtype=torch.bool).scatter(1, kept, True)
        source = torch.arange(crops * total).view(crops, total)
        tiles = (grid["grid_h"], grid["grid_w"], side, side)
        raster = source[1:].view(tiles).transpose(1, 2).flatten()
        order = torch.cat((source[0], raster))
        order = order[alive.flatten()[order]]
        assert_same(order, expected["output_source"], f"order of {run}")
        got = features.flatten(0, 1)[order]
        assert_close(got, expected["output_features"], 1e-4, f"features of {run}")
