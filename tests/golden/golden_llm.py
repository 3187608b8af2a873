"""FastV and PyramidDrop: a recorded text model inside a LLaVA that is given image features."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import golden_training
import torch
from golden_case import Case, Check, Watch, assert_close, assert_same
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.core import Scorer
from foveate.methods.fastv import FastV
from foveate.methods.pyramiddrop import PyramidDrop

LOGITS, SCORES, ROTARY = 2e-4, 1e-5, 1e-5  # absolute tolerances
# The recordings of the two methods call some of the same things by different names.
NAMES: dict[str, dict[str, str]] = {
    "fastv": {
        "greedy_tokens_kvcache": "greedy_tokens",
        "greedy_logits_kvcache": "greedy_logits",
        "decode_pos_kvcache": "decode_pos",
    },
    "pyramiddrop": {"stage0_kept": "kept", "decode_pos_in_layer": "decode_pos"},
}


def checks(case: Case) -> dict[str, Check]:
    if "labels" in case.names or case.facts.get("mode") == "training":
        return golden_training.checks(case)
    return offered(Replay(case), "kept")


def offered(replay: Replay, kept: str) -> dict[str, Check]:
    """The checks of what a case has recorded.

    Args:
        replay: the case.
        kept: the array without which selection cannot be checked.
    """
    checks = {  # a case stores the arrays that apply to it
        "selection": (kept, replay.check_selection),
        "prefill": ("prefill_logits", replay.check_prefill),
        "positions": ("pos_in_layer0", replay.check_positions),
        "cache": ("kv_len_per_layer", replay.check_cache),
        "decoding": ("greedy_tokens", replay.check_decoding),
        "decoding-without-cache": (
            "greedy_tokens_nocache",
            replay.check_decoding_without_cache,
        ),
    }
    return {check: run for check, (name, run) in checks.items() if name in replay.arrays}


def model_of(case: Case, rows: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of a recorded text model: the one whose embedding table has some rows."""
    shared = Path(__file__).parents[3] / "shared" / "golden"
    for folder in [*sorted(case.root.glob("_*")), *sorted(shared.glob("_*"))]:
        weights = load_file(folder / "model.safetensors")
        table = weights["model.embed_tokens.weight"]
        if table.shape[1] == rows.shape[1] and (rows[:, None] == table).all(-1).any(1).all():
            return json.loads((folder / "config.json").read_text()), weights
    raise AssertionError(f"no model beside the cases has the embeddings of {case.path}")


def llava_around(
    config: dict[str, Any], weights: dict[str, Tensor]
) -> LlavaForConditionalGeneration:
    """LLaVA around a text model. Its image token is one more row of the embedding table."""
    vocabulary = config["vocab_size"]
    text = AutoConfig.for_model(**config | {"vocab_size": vocabulary + 1})
    assert text.rope_parameters["rope_theta"] == config["rope_theta"]
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=vocabulary,
            tie_word_embeddings=False,
        )
    ).eval()
    inner = {
        name.removeprefix("model."): array
        for name, array in weights.items()
        if name.startswith("model.")
    }
    table = inner["embed_tokens.weight"]
    inner["embed_tokens.weight"] = torch.cat((table, table.new_zeros(1, table.shape[1])))
    model.model.language_model.load_state_dict(inner)
    model.lm_head = torch.nn.Linear(table.shape[1], vocabulary, bias=False)
    model.lm_head.load_state_dict({"weight": weights["lm_head.weight"]})
    # The recordings know no stop token.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


def replay(
    model: LlavaForConditionalGeneration, before: Tensor, features: Tensor, after: Tensor
) -> dict[str, Any]:
    """Inputs of a prompt with one image between two runs of text."""
    image = torch.full((len(features),), model.config.image_token_id)
    ids = torch.cat((before, image, after))[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[features])},
    }


class Replay:
    """A case, run again through foveate.

    Args:
        case: recorded inputs and outputs.
    """

    def __init__(self, case: Case) -> None:
        self.case = case

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        """The recorded arrays, by one name for both methods."""
        names = NAMES.get(self.case.slug, {})
        return {names.get(name, name): array for name, array in self.case.arrays.items()}

    # -- what is run -------------------------------------------------------------------------

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        """Place -> recorded survivors, as positions in the image."""
        arrays, facts = self.case.arrays, self.case.facts
        if self.case.slug == "fastv":
            return {f"llm:{facts['fastv_k']}": arrays["kept"]}
        return {
            f"llm:{layer}": arrays[f"stage{stage}_kept"]
            for stage, layer in enumerate(facts["layer_list"])
        }

    @property
    def alive(self) -> Tensor:
        """Columns of the image in which survivors stand at the end."""
        return list(self.kept.values())[-1]

    @cached_property
    def scores(self) -> list[Tensor]:
        """Recorded scores of each step."""
        arrays = self.case.arrays
        if self.case.slug == "fastv":
            return [arrays["scores"]]
        return [arrays[f"stage{stage}_scores"] for stage in range(len(self.kept))]

    def method(self, seen: list[Tensor]) -> Scorer:
        """The method under the case's hyper-parameters; its scores are appended to `seen`."""
        facts = self.case.facts
        kind = FastV if self.case.slug == "fastv" else PyramidDrop

        def scores(self: Scorer, tokens: Any) -> Tensor:
            seen.append(kind.scores(self, tokens))
            return seen[-1]

        observed = type(kind.__name__, (kind,), {"scores": scores})
        if kind is FastV:
            return observed(layer=facts["fastv_k"], keep=1 - facts["fastv_r"])
        ratios = facts["image_token_ratio_list"]
        return observed(layers=tuple(facts["layer_list"]), keep=tuple(ratios))

    @cached_property
    def text(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Config and weights of the recorded text model."""
        arrays = self.case.arrays
        start, length = int(arrays["image_start"]), int(arrays["image_len"])
        prompt = arrays["inputs_embeds"][0]
        return model_of(self.case, torch.cat((prompt[:start], prompt[start + length :])))

    @cached_property
    def model(self) -> LlavaForConditionalGeneration:
        """LLaVA around the text model."""
        return llava_around(*self.text)

    def inputs(self) -> dict[str, Any]:
        arrays = self.case.arrays
        start, length = int(arrays["image_start"]), int(arrays["image_len"])
        features = arrays["inputs_embeds"][0, start : start + length]
        return replay(self.model, arrays["text_ids_before"], features, arrays["text_ids_after"])

    def generate(self, tokens: int, **options: Any) -> Any:
        return self.model.generate(
            **self.inputs(),
            do_sample=False,
            max_new_tokens=tokens,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    # -- what is checked ---------------------------------------------------------------------

    def check_selection(self) -> None:
        """Scores and survivors of every step, in place and number."""
        seen: list[Tensor] = []
        with foveate.use(self.model, self.method(seen)) as run:
            self.model(**self.inputs())
        (image,) = run.kept
        assert list(image) == list(self.kept)
        for place, expected in self.kept.items():
            assert_same(image[place], expected, f"kept at {place}")
        assert len(seen) == len(self.scores)
        for place, got, expected in zip(self.kept, seen, self.scores, strict=True):
            assert_close(got[0], expected, SCORES, f"scores at {place}")

    def check_prefill(self) -> None:
        """Logits of all positions that are alive at the end."""
        arrays = self.arrays
        start, length = int(arrays["image_start"]), int(arrays["image_len"])
        with foveate.use(self.model, self.method([])):
            logits = self.model(**self.inputs()).logits[0]
        assert len(logits) == arrays["inputs_embeds"].shape[1]
        last = self.alive
        after = torch.arange(start + length, len(logits))
        alive = torch.cat((torch.arange(start), start + last, after))
        assert_close(logits[alive], arrays["prefill_logits"], LOGITS, "logits")
        assert_close(logits[-1], arrays["prefill_last_logits"], LOGITS, "last logits")

    def check_cache(self) -> None:
        """Slots of every layer's cache after the prompt."""
        with foveate.use(self.model, self.method([])):
            cache = self.model(**self.inputs(), use_cache=True).past_key_values
        slots = [layer.keys.shape[-2] for layer in cache.layers]
        assert slots == self.case.arrays["kv_len_per_layer"].tolist()

    def check_positions(self) -> None:
        """Positions that enter every layer, in the prompt and in each decoding step."""
        arrays = self.case.arrays
        layers = self.model.model.language_model.layers
        decoded = self.arrays.get("decode_pos", torch.empty(0, len(layers)))
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        with foveate.use(self.model, self.method([])):
            handles = [
                Watch(
                    layer,
                    lambda module, args, kwargs, into=into: into.append(
                        kwargs["position_embeddings"]
                    ),
                )
                for layer, into in zip(layers, seen, strict=True)
            ]
            self.generate(len(decoded) + 1)
            for handle in handles:
                handle.remove()
        for i, forwards in enumerate(seen):
            assert len(forwards) == len(decoded) + 1
            expected = [arrays[f"pos_in_layer{i}"], *decoded[:, i : i + 1]]
            for step, (rotary, positions) in enumerate(zip(forwards, expected, strict=True)):
                self._check_rotary(rotary, positions, f"positions of layer {i}, step {step}")

    def _check_rotary(self, got: tuple[Tensor, Tensor], positions: Tensor, what: str) -> None:
        rotary = self.model.model.language_model.rotary_emb
        expected = rotary(torch.empty(1, dtype=torch.float32), position_ids=positions[None])
        for got_part, expected_part in zip(got, expected, strict=True):
            assert got_part.shape == expected_part.shape, what
            assert_close(got_part, expected_part, ROTARY, what)

    def check_decoding(self) -> None:
        """Greedy tokens and their logits, with a cache."""
        with foveate.use(self.model, self.method([])):
            self._check_greedy("")

    def check_decoding_without_cache(self) -> None:
        """The same without a cache: survivors are chosen anew at each token."""
        with foveate.use(self.model, self.method([])) as run:
            steps: list[Tensor] = []
            handle = self.model.register_forward_hook(
                lambda *_: steps.append(next(iter(run.kept[0].values())))
            )
            self._check_greedy("_nocache", use_cache=False)
            handle.remove()
        assert_same(steps[0], self.case.arrays["kept"], "kept of the prompt")
        for step, expected in enumerate(self.case.arrays["kept_nocache_steps"], start=1):
            assert_same(steps[step], expected, f"kept of rerun {step}")

    def _check_greedy(self, suffix: str, **options: Any) -> None:
        tokens = self.arrays[f"greedy_tokens{suffix}"]
        out = self.generate(len(tokens), **options)
        assert_same(out.sequences[0, -len(tokens) :], tokens, "greedy tokens")
        logits = torch.cat(out.logits)
        assert_close(logits, self.arrays[f"greedy_logits{suffix}"], LOGITS, "greedy logits")
