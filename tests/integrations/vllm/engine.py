"""Answers of vLLM, recorded in a process of its own.

python -m tests.integrations.vllm.engine CHECKPOINT CASES.json ANSWERS.json

A case that is refused has its `error` instead.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMClientError

from tests.integrations.vllm.cases import arguments_of, images_of, metadata_of, video_of


def prompt_of(case):
    made = {"prompt": case["prompt"], "multi_modal_data": {}}
    if case["images"]:
        made["multi_modal_data"]["image"] = images_of(case)
    if case.get("frames"):
        video = np.stack(video_of(case))
        if "fps" in case:
            video = video, {**metadata_of(case), "do_sample_frames": False}
        made["multi_modal_data"]["video"] = [video]
    if arguments := case.get("arguments", arguments_of(case)):
        made["mm_processor_kwargs"] = arguments
    return made


def main(checkpoint, cases, answers):
    given = json.loads(Path(cases).read_text())
    options = given["options"]
    rounds = options.pop("rounds", 1)
    settings = {
        "dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 1024,
        "enforce_eager": True, "max_logprobs": -1, "limit_mm_per_prompt": {"image": 4, "video": 1},
    }  # fmt: skip
    llm = LLM(checkpoint, **{**settings, **options})
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=-1, ignore_eos=True)
    found = []
    for _ in range(rounds):
        prompts = [prompt_of(case) for case in given["cases"]]
        if any(case.get("refused") for case in given["cases"]):
            found += [alone(llm, prompt, sampling) for prompt in prompts]
        else:
            found += map(record, llm.generate(prompts, sampling, use_tqdm=False))
    Path(answers).write_text(json.dumps(found))


def alone(llm, prompt, sampling):
    try:
        return record(llm.generate([prompt], sampling, use_tqdm=False)[0])
    except VLLMClientError as error:
        return {"error": str(error)}


def record(output):
    first = output.outputs[0].logprobs[0]
    return {
        "prompt": list(output.prompt_token_ids),
        "tokens": list(output.outputs[0].token_ids),
        "logprobs": [first[token].logprob for token in range(len(first))],
    }


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(*sys.argv[1:])
