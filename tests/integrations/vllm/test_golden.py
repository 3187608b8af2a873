"""vLLM answers as foveate on transformers does, with the same weights.

Each engine runs in a process of its own. All cases of an engine are in one batch, so that methods
and budgets are mixed in it.
"""

import os

import pytest

from tests.integrations.vllm.cases import AFTER, case, video

pytestmark = pytest.mark.vllm
BLIND = ("divprune", "uniform", "random", "downsample")  # read nothing but features
TOWER = ("visionzip", "fopru", "hiprune")
CLASS = ("fastervlm", "vtc-cls")


def batch(methods, *, after=AFTER):
    """All methods at two sizes and budgets, the question's method, and several images."""
    cases = [case(), case(images=[1], size=(40, 120))]
    for method in methods:
        cases += [case(method, 0.25), case(method, 0.4, images=[2], size=(56, 120))]
    cases += [case("cdpruner", 10, question=after), case("divprune", 1.0)]
    cases += [
        case("visionzip", 12, images=[0, 2]),
        case("divprune", 0.25, images=[3, 0], size=(120, 56)),
    ]
    return cases


BATCHES = {
    "llava": batch(BLIND + TOWER + CLASS),
    "llava-older": batch(CLASS),
    "llava-siglip": batch(BLIND + TOWER),
    "llava-next": batch(BLIND + TOWER + CLASS),
    "llava-onevision": batch(BLIND + TOWER),
    "internvl": batch(BLIND + TOWER + CLASS, after=f"</img> {AFTER}"),
    "internvl-norms": batch(TOWER + CLASS, after=f"</img> {AFTER}"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_answers_are_those_of_transformers(answers, name):
    """Greedy tokens are equal, and log-probabilities of the first."""
    check(answers(name, BATCHES[name]), answers(name, BATCHES[name], by="reference"))


@pytest.mark.parametrize("name", ["llava-onevision", "internvl"])
def test_videos_are_reduced_as_on_transformers(answers, name):
    """OneVision's is one image of all frames; each frame of InternVL's is an image."""
    cases = [video(), video("divprune", 0.25), video("fopru", 0.3), video("visionzip", 0.4)]
    check(answers(name, cases), answers(name, cases, by="reference"))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"rounds": 2}, id="cached"),
        pytest.param(
            {"rounds": 2, "enable_prefix_caching": False, "mm_processor_cache_gb": 0},
            id="uncached",
        ),
        pytest.param({"max_num_batched_tokens": 16, "max_num_seqs": 8}, id="chunked"),
    ],
)
def test_caches_and_chunks_change_nothing(answers, options):
    """One image under many budgets, twice: no budget is served what another has cached."""
    cases = [case()] + [case("fastervlm", keep) for keep in (0.25, 0.5, 0.75, 20)]
    cases += [case("divprune", 0.25), case("fastervlm", 0.25, images=[0, 0])]
    want = answers("llava", cases, by="reference")
    check(answers("llava", cases, **options), want * options.get("rounds", 1))


def test_nothing_asked_is_stock(answers, environment):
    """Without foveate's fields, prompts and answers are those of vLLM without the plugin."""
    cases = [case(), case(images=[1, 2])]
    stock = answers("llava-older", cases, environment={**environment, "VLLM_PLUGINS": ""})
    ours = answers("llava-older", cases)
    assert ours == stock


def test_the_servers_default_holds_unless_a_request_says_otherwise(answers):
    """A default applies to requests that name no method; a method of `None` turns it off."""
    default = {"foveate_method": "divprune", "foveate_keep": 0.25}
    cases = [
        case(),
        {**case(), "arguments": {"foveate_keep": 0.5}},
        {**case(), "arguments": {"foveate_method": None}},
        {**case(), "arguments": {"foveate_method": "uniform"}},
    ]
    got = answers("llava", cases, mm_processor_kwargs=default)
    wanted = [case("divprune", 0.25), case("divprune", 0.5), case(), case("uniform")]
    check(got, answers("llava", wanted, by="reference"))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("mode", ["weights", "data"])
def test_two_ranks_keep_the_same_tokens(answers, environment, mode):
    """Under tensor parallelism each rank holds half of the heads, or all of them."""
    cases = BATCHES["llava"][:20]
    environment = {
        **environment,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    options = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "mm_encoder_tp_mode": mode,
    }
    got = answers("llava", cases, environment=environment, **options)
    check(got, answers("llava", cases, by="reference"))


def check(got, want):
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)
