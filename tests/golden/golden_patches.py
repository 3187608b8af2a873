"""Methods that reduce what a recorded CLIP encoder made of each crop: order and values of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import golden_qwen
import pytest
import torch
from golden_case import Case, Check, Watch, assert_close, assert_same
from golden_encoder import IMAGE, TEXT, build, prompt
from torch import Tensor, nn

import foveate
from foveate.core import Adaptive, Method, VisualTokens
from foveate.families import find_family
from foveate.methods.fopru import FoPru
from foveate.methods.hiprune import HiPrune
from foveate.methods.llavaprumerge import LLaVAPruMerge
from foveate.methods.visionzip import VisionZip


@dataclass(frozen=True)
class Run:
    """A recorded run.

    Args:
        name: what it is called in messages.
        method: what should do the same.
        index: for each image, (K) patches that survivors stand at, in order; may stop before the
            last ones.
        values: for each image, (K, C) survivors.
        atol: absolute tolerance of their values.
    """

    name: str
    method: Method
    index: Sequence[Tensor]
    values: Sequence[Tensor]
    atol: float = 1e-4


def checks(case: Case) -> dict[str, Check]:
    if any(name.startswith("visual.") for name in case.names):
        return golden_qwen.checks(case)
    found = {"reductions": _check_reductions, "model": _check_model}
    if case.slug == "fopru":
        found["scores"] = _check_significance
    return {name: partial(check, case) for name, check in found.items()}


def _runs(case: Case, model: nn.Module, eager: _Eager) -> Iterator[Run]:
    features = eager.features
    side = round(features.shape[1] ** 0.5)
    for run, expected in case.runs():
        name = str(run)
        if case.slug == "hiprune":
            method = HiPrune(
                keep=run["per_image_budget"],
                alpha=run["alpha"],
                layer=run["object_layer_1based"] - 1,
                as_released="llava",
            )
            yield Run(name, method, expected["kept"], _rows(features, expected["kept"]))
        elif case.slug == "fopru":
            keep = run["k"] * (side if run["strategy"] == "row" else 1)
            method = FoPru(keep=keep, strategy=run["strategy"])
            yield Run(name, method, expected["kept"][None], expected["features"])
        elif case.slug == "visionzip":
            # The class token's own feature, first in the release, is no visual token.
            keep = run["dominant"] - 1 + run["contextual"]
            method = VisionZip(keep=keep, contextual=run["contextual"])
            yield Run(name, method, expected["dominant_kept"], expected["output"][:, 1:])
        else:
            yield _prumerge(name, run, expected, model, eager)


def _prumerge(
    name: str, run: dict, expected: dict[str, Tensor], model: nn.Module, eager: _Eager
) -> Run:
    """With a fixed ratio the release may keep a patch twice; here each is kept once."""
    plus, images = run["variant"] == "plus", len(expected["output"])
    if plus and run["adaptive"] and images > 1:
        pytest.skip(
            "PruMerge+ as released takes what any image keeps off the grids of all, so that what "
            "an image keeps depends on the others"
        )
    method = LLaVAPruMerge(
        plus=plus,
        ratio=None if run["adaptive"] else run["ratio_argument"],
        as_released=True,
    )
    index, values = [], []
    for image, kept in enumerate(expected["kept_in_order"].tolist()):
        once, output = list(dict.fromkeys(kept)), expected["output"][image]
        if len(once) < len(kept):
            shown = eager.tokens(method, model)
            assert_close(output, _folded(shown, image, kept), 1e-3, f"values of {name}")
            output = _folded(shown, image, once)
        index.append(torch.tensor(once))
        values.append(output)
    return Run(name, method, index, values, 1e-3)


def _folded(tokens: VisualTokens, image: int, kept: list[int]) -> Tensor:
    """What the release makes of kept patches: one that is kept twice is its own neighbour, counts
    twice among those of others, and the first of the dropped ones is lost.
    """
    x, attention = tokens.x[image], tokens.signal("joint_cls_attention")[image, 0]
    keys = tokens.signal("encoder_keys")[image, 0].transpose(0, 1).flatten(1)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    dropped = sorted({*range(len(x))} - {*kept})[len(kept) - len({*kept}) :]
    values = []
    for place, patch in enumerate(kept):
        others = torch.tensor(kept[:place] + kept[place + 1 :] + dropped)
        near = others[(keys[others] @ keys[patch]).topk(32).indices]
        values.append(x[patch] + (attention[near, None] * x[near]).sum(0))
    return torch.stack([*values, (attention[dropped, None] * x[dropped]).sum(0)])


def _rows(features: Tensor, index: Tensor) -> Tensor:
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))


# -- what the encoder does, by the eager kernel


class _Eager:
    """One pass of the recorded crops: features, and the signals of any layer from whole maps."""

    def __init__(self, model: nn.Module, pixels: Tensor) -> None:
        tower = model.model.vision_tower
        self.heads = tower.config.num_attention_heads
        self.projected: dict[tuple[str, int], Tensor] = {}
        handles = [
            getattr(layer.self_attn, part).register_forward_hook(partial(self._keep, part, number))
            for number, layer in enumerate(tower.encoder.layers)
            for part in ("q_proj", "k_proj")
        ]
        kernel = tower.config._attn_implementation
        tower.set_attn_implementation("eager")
        with torch.no_grad():
            out = tower(pixels, output_hidden_states=True, output_attentions=True)
        tower.set_attn_implementation(kernel)
        for handle in handles:
            handle.remove()
        self.features, self.maps = out.hidden_states[-2][:, 1:], out.attentions

    def _keep(self, part: str, number: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.projected[part, number] = output

    def signal(self, name: str, layer: int) -> Tensor:
        attention = self.maps[layer]
        query, key = (self.projected[part, layer] for part in ("q_proj", "k_proj"))
        if name == "cls_attention":
            return attention[:, :, 0, 1:]
        if name == "received_attention":
            return attention.mean((1, 2))[:, 1:]
        if name == "given_attention":
            return attention.mean(1)[:, 1:, 1:].sum(-1)
        if name == "encoder_keys":
            return key[:, 1:].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        assert name == "joint_cls_attention", name
        return (query @ key.mT / key.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]

    def tokens(self, method: Method, model: nn.Module) -> VisualTokens:
        (step,) = method.steps(find_family(model))
        images, total = self.features.shape[:2]
        side = round(total**0.5)
        return VisualTokens(
            lambda: self.features,
            torch.arange(total).expand(images, -1),
            (side, side),
            tuple(range(images)),
            signals={
                need.name: torch.stack([self.signal(need.name, layer) for layer in need.layers], 1)
                for need in step.needs
            },
        )


def _check_reductions(case: Case) -> None:
    """The method alone, on attention maps that are computed in full."""
    model = build(case)
    eager = _Eager(model, case.arrays["pixel_values"])
    for run in _runs(case, model, eager):
        tokens = eager.tokens(run.method, model)
        if isinstance(run.method, Adaptive):
            parts = run.method.reduce_each(tokens)
        else:
            images = range(len(run.values))
            parts = [(images, run.method.reduce(tokens, len(run.values[0])))]
        for members, reduction in parts:
            made = reduction.apply(eager.features[list(members)])
            for image, index, got in zip(members, reduction.index, made, strict=True):
                known = run.index[image]
                assert_same(index[: len(known)], known, f"kept of image {image}, {run.name}")
                assert_close(got, run.values[image], run.atol, f"values of {run.name}")


def _check_significance(case: Case) -> None:
    """FoPru's two vectors, of which the scores are the one that varies more."""
    model = build(case)
    eager = _Eager(model, case.arrays["pixel_values"])
    total = eager.features.shape[1]
    for run, _ in case.runs():
        method = FoPru(strategy=run["strategy"])
        scores = method.scores(eager.tokens(method, model))[0] / total
        assert_close(scores, case.arrays[run["significance"]], 1e-6, f"scores of {run}")


def _check_model(case: Case) -> None:
    """The whole model: pixels in, and the sequence that the language model reads out."""
    model = build(case)
    eager = _Eager(model, case.arrays["pixel_values"])
    inputs = prompt(case, eager.features.shape[1])
    language = model.model.language_model
    text = language.embed_tokens.weight[TEXT].detach()[None]
    assert (inputs["input_ids"] == IMAGE).any()
    seen: dict = {}

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["hidden"], seen["rotary"] = args[0][0], kwargs["position_embeddings"]

    for run in _runs(case, model, eager):
        with foveate.use(model, run.method) as session, torch.no_grad():
            handle = Watch(language.layers[0], look)
            model(**inputs)
            handle.remove()
        for image, places in enumerate(session.kept):
            kept = places["pre_llm"].tolist()
            assert set(run.index[image].tolist()) <= set(kept), f"kept of {run.name}"
            assert len(kept) == len(run.values[image]), f"count of {run.name}"
        sequence = torch.cat([text, *[torch.cat((crop, text)) for crop in run.values]])
        assert_close(seen["hidden"], sequence, run.atol, f"sequence of {run.name}")
        consecutive = torch.arange(len(sequence))[None]
        rotary = language.rotary_emb(seen["hidden"], consecutive)
        for got, want in zip(seen["rotary"], rotary, strict=True):
            assert_close(got, want, 1e-5, f"positions of {run.name}")
