"""DART: the released choice on given states, and a recorded text model inside a LLaVA around it."""

from functools import partial
from typing import Any

import torch
from golden_case import Case, Check, assert_close, assert_same
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.core import Step, VisualTokens
from foveate.methods.dart import DART

STATES = 1e-4  # absolute tolerance


def checks(case: Case) -> dict[str, Check]:
    found = {"model": partial(_check_model, case)}
    if any("keys_before" in name for name in case.names):
        found["selection"] = partial(_check_selection, case)
    return found


def _method(run: dict[str, Any]) -> DART:
    return DART(
        layer=run["pruned_layer_index"],
        keep=run["max_num_trunction"] or 1 - run["reduction_ratio"],
        image_pivots=run["pivot_image_token"],
        text_pivots=run["pivot_text_token"],
        as_released=True,
    )


def _check_selection(case: Case) -> None:
    for run, expected in case.runs():
        start, total = run["image_start"], run["image_length"]
        keys = expected["keys_before_pruned_layer"][:, None]
        states = expected["normed_hidden_before_pruned_layer"][:, None]
        places = torch.arange(states.shape[2])[None]
        image, text = slice(start, start + total), slice(start + total, None)
        signals = {
            "llm_keys": keys[..., image, :],
            "question_keys": keys[..., text, :],
            "normed_states": states[..., image, :],
            "question_normed_states": states[..., text, :],
            "question_mask": torch.ones_like(places[:, text], dtype=torch.bool),
            "prompt_positions": places[:, image],
            "question_positions": places[:, text],
        }
        method = _method(run)
        kept = method.count(total, total, Step("llm", method.layer or 0), 0)
        assert kept == run["kept"], run
        tokens = VisualTokens(torch.Tensor, torch.arange(total)[None], (1, total), (0,), signals)
        found = method.reduce(tokens, kept).index[0]
        assert_same(found, expected["kept_image_positions"], f"kept of {run}")


def _build(case: Case, run: dict[str, Any]) -> tuple[LlavaForConditionalGeneration, Tensor]:
    """LLaVA around the recorded text model, and a prompt whose text tokens have their own ids."""
    prompt = case.arrays["inputs_embeds"][0]
    start, total = run["image_start"], run["image_length"]
    rows = torch.cat((prompt[:start], prompt[start + total :]))
    image = len(rows)
    config = {**case.facts["llm_config"], "vocab_size": image + 1}
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(**config)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=image)
    ).eval()
    prefix = "llm."
    weights = {
        name.removeprefix(prefix): array
        for name, array in case.arrays.items()
        if name.startswith(prefix)
    }
    weights["embed_tokens.weight"] = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    model.model.language_model.load_state_dict(weights)
    text_ids = torch.arange(image)
    ids = torch.cat((text_ids[:start], torch.full((total,), image), text_ids[start:]))
    return model.requires_grad_(False), ids[None]


def _check_model(case: Case) -> None:
    """The whole text model: survivors, and the states of all that is left at the end."""
    for run, expected in case.runs():
        model, ids = _build(case, run)
        start, total = run["image_start"], run["image_length"]
        features = case.arrays["inputs_embeds"][0, start : start + total]
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
        with foveate.use(model, _method(run)) as session:
            out = model.model(input_ids=ids, mm_encoder_outputs=encoded)
        ((kept,),) = [list(places.values()) for places in session.kept]
        assert_same(kept, expected["kept_image_positions"], f"kept of {run}")
        before, after = torch.arange(start), torch.arange(start + total, ids.shape[1])
        alive = torch.cat((before, start + kept, after))
        assert_same(alive, expected["kept_positions"], f"positions of {run}")
        states = out.last_hidden_state[:, alive]
        assert_close(states, expected["last_hidden_state"], STATES, f"states of {run}")
