"""VFlowOpt: recycling on given features, and its drops in a recorded text model."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from golden_case import Case, Check, assert_close, assert_same
from golden_llm import LOGITS, llava_around, replay
from safetensors.torch import load_file
from torch import Tensor

import foveate
from foveate.core import Reduction, Step
from foveate.methods.vflowopt import VFlowOpt
from foveate.ops.cell_merging import cells, merged, pool_size, recycle

MODEL = "_tiny_qwen2"  # on which all cases of the language model were recorded


def checks(case: Case) -> dict[str, Check]:
    found = {"recycling": _check_recycling}
    if "vision_scores" in case.names:
        found = {
            "selection": _check_selection,
            "prefill": _check_prefill,
            "decoding": _check_decoding,
        }
    return {name: partial(check, case) for name, check in found.items()}


def _check_recycling(case: Case) -> None:
    arrays, facts = case.arrays, case.facts
    side, height, width = (
        facts[name] for name in ("base_grid", "tile_height", "tile_width_with_newline")
    )
    grids = [(torch.tensor([0]), side, side), (torch.tensor([1]), height, width)]
    coordinates = torch.cat(
        [torch.cartesian_prod(part, torch.arange(h), torch.arange(w)) for part, h, w in grids]
    )
    pool = pool_size(facts["n"], facts["keep_ratio"], facts["cell"])
    assert pool == facts["reduce_tokens"] + facts["extra_low"]
    scores = arrays["scores"][None]
    into, mass = recycle(scores, cells(coordinates[None], facts["cell"]), pool)
    reduction = merged(into, mass, facts["kept"])
    assert_same(reduction.index[0], arrays["kept_index"], "kept")
    got = reduction.apply(arrays["features"][None])[0]
    assert_close(got, arrays["output_features"], 1e-5, "features")
    assert_close(scores[0, reduction.index[0]], arrays["output_scores"], 1e-6, "scores")


class _Given(VFlowOpt):
    """Scores given from outside, and nothing recycled."""

    scores: Tensor

    def steps(self, model: Any) -> tuple[Step, ...]:
        return Step("pre_llm"), *super().steps(model)[1:]

    def _recycle(self, tokens: Any) -> list[tuple[tuple[int, ...], Reduction]]:
        everything = Reduction(torch.arange(tokens.count)[None])
        return [((0,), replace(everything, label=type(self).scores[None]))]


def _session(case: Case, model: Any) -> Any:
    first, second = case.facts["keep_ratios"]
    given = type("Given", (_Given,), {"scores": case.arrays["vision_scores"]})
    method = given(keep=(1.0, first, first * second), layers=tuple(case.facts["prune_layers"]))
    return foveate.use(model, method)


def _build(case: Case) -> tuple[Any, dict[str, Any]]:
    arrays, folder = case.arrays, case.root / MODEL
    config = json.loads((folder / "config.json").read_text())
    model = llava_around(config, load_file(folder / "model.safetensors"))
    start, length = int(arrays["image_start"]), int(arrays["image_len"])
    features = arrays["inputs_embeds"][0, start : start + length]
    return model, replay(model, arrays["text_ids_before"], features, arrays["text_ids_after"])


def _check_selection(case: Case) -> None:
    (model, inputs), arrays = _build(case), case.arrays
    with _session(case, model) as run:
        cache = model(**inputs, use_cache=True).past_key_values
    slots = [layer.keys.shape[2] for layer in cache.layers]
    assert slots == arrays["len_per_layer"].tolist()
    for stage, layer in enumerate(case.facts["prune_layers"]):
        assert_same(run.kept[0][f"llm:{layer}"], arrays[f"stage{stage}_kept"], f"kept at {layer}")


def _check_prefill(case: Case) -> None:
    """Logits of what is left, with the mask that the release lacks in one layer."""
    (model, inputs), arrays = _build(case), case.arrays
    with _session(case, model) as run:
        logits = model(**inputs).logits[0]
    start, length = int(arrays["image_start"]), int(arrays["image_len"])
    last = list(run.kept[0].values())[-1]
    after = torch.arange(start + length, len(logits))
    alive = torch.cat((torch.arange(start), start + last, after))
    assert_close(logits[alive], arrays["causalfix_prefill_logits"], LOGITS, "logits")
    assert_close(logits[-1], arrays["causalfix_prefill_last_logits"], LOGITS, "last logits")


def _check_decoding(case: Case) -> None:
    (model, inputs), arrays = _build(case), case.arrays
    tokens = arrays["causalfix_greedy_tokens"]
    with _session(case, model):
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=len(tokens), output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert_same(out.sequences[0, -len(tokens) :], tokens, "greedy tokens")
    assert_close(torch.cat(out.logits), arrays["causalfix_greedy_logits"], LOGITS, "logits")
