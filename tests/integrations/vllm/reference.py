"""Answers of foveate on transformers, recorded in a process of its own.

python -m tests.integrations.vllm.reference CHECKPOINT CASES.json ANSWERS.json
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate.core.saving import from_dict
from tests.integrations.vllm.cases import images_of, metadata_of, video_of


def answer(model, processor, case, tokens=8):
    """Greedy tokens, and log-probabilities of the first."""
    media = {"images": images_of(case)} if case["images"] else {}
    if case.get("frames"):
        media["videos"] = [np.stack(video_of(case))]
        if "fps" in case:
            media |= {"video_metadata": [metadata_of(case)], "do_sample_frames": False}
    inputs = processor(text=case["prompt"], return_tensors="pt", **media)
    method = case.get("method")
    with foveate.use(model, from_dict(method)) if method else nullcontext():
        output = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    words = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    return {
        "tokens": tokens.tolist(),
        "words": words.split(),
        "logprobs": output.logits[0][0].float().log_softmax(-1).tolist(),
    }


def main(checkpoint, cases, answers):
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    given = json.loads(Path(cases).read_text())
    found = [answer(model, processor, case) for case in given["cases"]]
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
