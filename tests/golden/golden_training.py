"""PyramidDrop in training: recorded choices, losses and gradients.

A recorded text model stands inside a LLaVA, which is given embeddings and image features.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import golden_llm
import torch
from golden_case import Case, Check, assert_close, assert_same
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.methods.pyramiddrop import PyramidDrop

SCORES, LOGITS, LOSS, GRADIENTS = 1e-5, 2e-4, 1e-6, 1e-6  # absolute tolerances


def checks(case: Case) -> dict[str, Check]:
    replay = Training(case)
    return {
        "training-selection": replay.check_selection,
        "training-logits": replay.check_logits,
        "training-loss": replay.check_loss,
        "training-gradients": replay.check_gradients,
    }


class Training:
    """A recorded training step, run again through foveate.

    Args:
        case: recorded inputs and outputs.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.arrays = case.arrays
        self.stages = len(case.facts["layer_list"])

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(row, start, end) of each image."""
        where = zip(
            self.arrays["image_start"].tolist(), self.arrays["image_len"].tolist(), strict=True
        )
        return [(row, start, start + n) for row, (start, n) in enumerate(where) if n]

    @cached_property
    def visual(self) -> Tensor:
        """(B, T) image tokens."""
        visual = torch.zeros_like(self.arrays["labels"], dtype=torch.bool)
        for row, start, end in self.spans:
            visual[row, start:end] = True
        return visual

    @cached_property
    def model(self) -> LlavaForConditionalGeneration:
        real = self.arrays["attention_mask"].bool()
        text = self.arrays["inputs_embeds"][real & ~self.visual]
        model = golden_llm.llava_around(*golden_llm.model_of(self.case, text)).train()
        model.config.text_config.vocab_size = model.lm_head.out_features  # without the image token
        layers = model.model.language_model.layers
        for layer in (layers[0], layers[-1]):
            layer.self_attn.q_proj.requires_grad_(True)
        return model

    @cached_property
    def step(self) -> dict[str, Any]:
        """One forward and backward."""
        facts, seen = self.case.facts, []

        def scores(self: PyramidDrop, tokens: Any) -> Tensor:
            seen.append((tokens.rows, PyramidDrop.scores(self, tokens)))
            return seen[-1][1]

        observed = type("PyramidDrop", (PyramidDrop,), {"scores": scores})
        method = observed(
            layers=tuple(facts["layer_list"]), keep=tuple(facts["image_token_ratio_list"])
        )
        leaf = self.arrays["inputs_embeds"].clone().requires_grad_()
        table = self.model.get_input_embeddings().weight
        real = self.arrays["attention_mask"].bool()
        embeds = leaf.where(real[..., None], table[1])  # zeros stand for images
        embeds = embeds.where(~self.visual[..., None], table[self.model.config.image_token_id])
        features = [leaf[row, start:end] for row, start, end in self.spans]
        with foveate.use(self.model, method) as run:
            out = self.model(
                inputs_embeds=embeds,
                attention_mask=self.arrays["attention_mask"],
                labels=self.arrays["labels"],
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
                use_cache=False,
            )
            out.loss.backward()
        return {"kept": run.kept, "seen": seen, "out": out, "leaf": leaf}

    def check_selection(self) -> None:
        """Scores and survivors of every image at every stage."""
        found: dict[tuple[int, int], Tensor] = {}
        for rows, scores in self.step["seen"]:
            for row, score in zip(rows, scores, strict=True):
                stage = sum((row, s) in found for s in range(self.stages))
                found[row, stage] = score
        assert len(found) == self.stages * len(self.spans)
        for (row, *_), kept in zip(self.spans, self.step["kept"], strict=True):
            for stage, survivors in enumerate(kept.values()):
                name = f"row{row}_stage{stage}"
                assert_same(survivors, self.arrays[f"{name}_kept"], f"{name} kept")
                assert_close(found[row, stage], self.arrays[f"{name}_scores"], SCORES, name)

    def check_logits(self) -> None:
        """Logits of everything that is alive at the end."""
        alive = self.arrays["attention_mask"].bool() & ~self.visual
        for row, start, _ in self.spans:
            alive[row, start + self.arrays[f"row{row}_stage{self.stages - 1}_kept"]] = True
        recorded = self.arrays["final_logits"][self.arrays["final_attention_mask"].bool()]
        assert_close(self.step["out"].logits[alive], recorded, LOGITS, "logits")

    def check_loss(self) -> None:
        """The loss over shortened labels."""
        assert_close(self.step["out"].loss, self.arrays["loss"], LOSS, "loss")

    def check_gradients(self) -> None:
        """Gradients of embeddings, image features and weights."""
        layers = self.model.model.language_model.layers
        leaf = self.step["leaf"]
        got = {
            "inputs_embeds": leaf.grad,
            "q_proj_layer0": layers[0].self_attn.q_proj.weight.grad,
            "q_proj_last_layer": layers[-1].self_attn.q_proj.weight.grad,
        }
        for name, gradient in got.items():
            expected = self.arrays[f"grad_{name}"]
            scale = float(expected.abs().max())
            assert_close(gradient, expected, GRADIENTS * max(scale, 1.0), name)
