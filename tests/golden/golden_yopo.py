"""YOPO: a recorded text model inside a LLaVA that is given image features."""

import json
from functools import partial
from typing import Any

import torch
from golden_case import Case, Check, assert_close, assert_same
from golden_llm import LOGITS, llava_around, replay
from safetensors.torch import load_file

import foveate
from foveate.methods.yopo import YOPO

MODEL = "_tiny_llama"  # on which all cases were recorded


def checks(case: Case) -> dict[str, Check]:
    return {
        "prefill": partial(_check_prefill, case),
        "states": partial(_check_states, case),
        "decoding": partial(_check_decoding, case),
    }


def _model(case: Case) -> Any:
    folder = case.root / MODEL
    config = json.loads((folder / "config.json").read_text())
    return llava_around(config, load_file(folder / "model.safetensors"))


def _method(case: Case, as_released: bool = True) -> YOPO:
    facts = case.facts
    return YOPO(
        window=facts["attncut_w"],
        layer=facts["layercut_num"],
        heads=tuple(map(tuple, case.arrays["head_mask"].bool().tolist())),
        ffn_factor=facts["mlpcut_ratio"],
        as_released=as_released,
    )


def _inputs(case: Case, model: Any) -> dict[str, Any]:
    arrays = case.arrays
    before, after = arrays["text_ids_before"], arrays["text_ids_after"]
    return replay(model, before, arrays["image_embeds"], after)


def _check_prefill(case: Case) -> None:
    model, expected = _model(case), case.arrays["text_logits_prefill"]
    inputs = _inputs(case, model)
    with foveate.use(model, _method(case)):
        logits = model(**inputs).logits[0]
    assert_close(logits[-len(expected) :], expected, LOGITS, "logits of the text after the image")
    assert_close(logits[-1], case.arrays["prefill_last_logits"], LOGITS, "last logits")
    with foveate.use(model, _method(case, as_released=False)):
        other = model(**_inputs(case, model)).logits[0, -1]
    assert (other - logits[-1]).abs().max() > 10 * LOGITS, "lost probability changes nothing"


def _check_states(case: Case) -> None:
    """What enters each layer at some visual tokens, and what the last norm makes of them."""
    model, arrays = _model(case), case.arrays
    with foveate.use(model, _method(case)):
        states = model(**_inputs(case, model), output_hidden_states=True).hidden_states
    got = torch.stack([state[0, arrays["probe_positions"]] for state in states])
    assert_close(got, arrays["probe_hidden_states"], LOGITS, "states")


def _check_decoding(case: Case) -> None:
    """Greedy tokens and their logits, with a cache."""
    model, tokens = _model(case), case.arrays["greedy_tokens"]
    with foveate.use(model, _method(case)):
        out = model.generate(
            **_inputs(case, model), do_sample=False, max_new_tokens=len(tokens),
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    assert_same(out.sequences[0, -len(tokens) :], tokens, "greedy tokens")
    assert_close(torch.cat(out.logits), case.arrays["greedy_logits"], LOGITS, "greedy logits")
