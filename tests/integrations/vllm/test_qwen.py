"""vLLM answers as foveate on transformers does, on models with positions in time, height and width.

Videos are short enough for transformers 5 and vLLM to agree on the text after them: vLLM goes on
after the last position of a video, transformers 5 after its height or width.
"""

import json

import pytest

from tests.integrations.vllm.cases import case
from tests.integrations.vllm.test_golden import check

pytestmark = pytest.mark.vllm
IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
ONE, AFTER = f"w1 w2 {IMAGE} w3 w4 w5", "<|vision_end|> w3 w4 w5"
MODELS = ("qwen2.5-vl", "qwen3-vl")
METHODS = ("divprune", "uniform", "random", "downsample", "visionzip", "fopru", "hiprune")


def one(method=None, keep=None, image=0, size=(168, 112), **more):
    return case(method, keep, images=[image], prompt=ONE, size=size, **more)


def two(method=None, keep=None, **more):
    prompt = f"w1 {IMAGE} w2 {IMAGE} w9"
    return case(method, keep, images=[1, 2], prompt=prompt, size=(112, 224), **more)


def clip(method=None, keep=None, **more):
    made = case(method, keep, images=[], prompt=f"w1 {VIDEO} w2", size=(168, 112), **more)
    return {**made, "frames": list(range(6)), "fps": 2.0}


def both(method=None, keep=None, **more):
    prompt = f"w1 {VIDEO} w2 {IMAGE} w7 w8"
    made = case(method, keep, images=[3], prompt=prompt, size=(168, 168), **more)
    return {**made, "frames": list(range(6)), "fps": 2.0}


def batch():
    cases = [one(), two(), clip(), both(), one("divprune", 1.0)]
    for method in METHODS:
        cases += [two(method, 0.4), both(method, 0.25)]
    cases += [one("divprune", 0.1), one("divprune", 3), clip("visionzip", 0.3)]
    return [*cases, one("cdpruner", 10, question=AFTER)]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_transformers(answers, name):
    """Methods, budgets, images and videos are mixed in one batch."""
    check(answers(name, batch()), answers(name, batch(), by="reference"))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"rounds": 2}, id="cached"),
        pytest.param({"rounds": 2, "enable_prefix_caching": False}, id="uncached"),
        pytest.param({"max_num_batched_tokens": 16, "max_num_seqs": 8}, id="chunked"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_caches_and_chunks_change_nothing(answers, name, options):
    """Positions are right where an image is served from a cache, or prefilled in parts."""
    cases = [one(), both()] + [one("visionzip", keep) for keep in (0.25, 0.5, 20)]
    cases += [both("divprune", 0.4), both("visionzip", 0.4), clip("uniform", 0.5)]
    if "max_num_batched_tokens" in options:  # vLLM encodes an item in one step
        options = {**options, "max_num_batched_tokens": 64}
    want = answers(name, cases, by="reference")
    check(answers(name, cases, **options), want * options.get("rounds", 1))


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_keep_the_same_tokens(answers, environment, name):
    """Under tensor parallelism each rank holds half of the heads."""
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment = {**environment, **threads}
    cases = [one(), one("visionzip", 0.3), both("fopru", 0.25), both("divprune", 0.25)]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    got = answers(name, cases, environment=environment, **options)
    check(got, answers(name, cases, by="reference"))


def test_nothing_asked_is_stock(answers, environment):
    """Without foveate's fields, prompts and answers are those of vLLM without the plugin."""
    cases = [one(), both()]
    for name in MODELS:
        stock = answers(name, cases, environment={**environment, "VLLM_PLUGINS": ""})
        assert json.dumps(answers(name, cases)) == json.dumps(stock)
