"""Answers of foveate on transformers, recorded in a process of its own.

python -m tests.integrations.vllm.reference CHECKPOINT CASES.json ANSWERS.json
"""

import json
import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate.core.saving import from_dict
from tests.integrations.vllm.checkpoints import image


def answer(model, processor, case, tokens=8):
    """Greedy tokens, log-probabilities of the first, and the length of the prompt."""
    images = [image(seed, tuple(case.get("size", (80, 64)))) for seed in case["images"]]
    inputs = processor(text=case["prompt"], images=images or None, return_tensors="pt")
    settings = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}

    def generate():
        return model.generate(**inputs, **settings, output_logits=True)

    if case.get("method"):
        with foveate.use(model, from_dict(case["method"])):
            output = generate()
    else:
        output = generate()
    length = inputs["input_ids"].shape[1]
    return {
        "tokens": output.sequences[0, length:].tolist(),
        "logprobs": output.logits[0][0].float().log_softmax(-1).tolist(),
    }


def main(checkpoint, cases, answers):
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    with open(cases) as file:
        found = [answer(model, processor, case) for case in json.load(file)]
    with open(answers, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
