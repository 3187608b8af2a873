"""Prompts that run beside the one of `generate` do not take its place in record and report."""

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

import foveate
from foveate.methods import DivPrune, FastV, PyramidDrop, ToMe
from tests.tinies import prompts, tiny_llava

STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
METHODS = [
    DivPrune(keep=9),
    FastV(layer=2, keep=9),
    PyramidDrop(layers=(1, 3), keep=(12, 5)),
    ToMe(),
]
NEGATIVE = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


class Beside(LogitsProcessor):
    """Contrast with what the model says to another prompt, continued by the same tokens."""

    def __init__(self, model, prompt, cached=True, generate=False):
        self.model, self.prompt, self.cached, self.generate = model, dict(prompt), cached, generate
        self.cache, self.calls = None, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.generate:
            self.model.generate(**self.prompt, max_new_tokens=2)
            return scores
        if self.calls > 1:
            last, mask = input_ids[:, -1:], self.prompt["attention_mask"]
            mask = torch.cat((mask, torch.ones_like(last)), 1)
            ids = torch.cat((self.prompt["input_ids"], last), 1)
            self.prompt |= {"input_ids": ids, "attention_mask": mask}
        given = self.prompt
        if self.cached and self.calls > 1:
            given = {
                "input_ids": given["input_ids"][:, -1:], "attention_mask": given["attention_mask"],
                "past_key_values": self.cache,
            }  # fmt: skip
        out = self.model(**given, use_cache=self.cached)
        self.cache = out.past_key_values
        return scores - 0.3 * out.logits[:, -1]


def told(run):
    """What a session says of its last prompt, without what was decoded after it."""
    report = dict(run.report())
    return report, [{e: index.tolist() for e, index in kept.items()} for kept in run.kept]


def plain(model, method, inputs, **settings):
    with foveate.use(model, method) as run:
        model.generate(**inputs, **STEPS, **settings)
        return told(run)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("negative", ["text", "token", "none"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_guidance_leaves_the_record_of_its_prompt(model, method, negative, cached):
    inputs = prompts([[4, 6]])
    settings = {"guidance_scale": 1.5, "use_cache": cached}
    if negative != "none":
        ids = NEGATIVE if negative == "text" else NEGATIVE[:, :1]
        settings |= {
            "negative_prompt_ids": ids, "negative_prompt_attention_mask": torch.ones_like(ids),
        }  # fmt: skip
    with foveate.use(model, method) as run:
        guided = model.generate(**inputs, **STEPS, **settings)
        got = told(run)
        (drawing,) = run.show(Image.new("RGB", (48, 48)))
    assert drawing.width > 2 * 48
    assert got[0]["images"]
    assert "no image in the prompt" not in str(got[0]["notes"])
    if cached:
        assert got == plain(model, method, inputs)
    else:  # the prompt comes again, and its last coming is told
        longest = {"input_ids": guided[:, :-1], "attention_mask": torch.ones_like(guided[:, :-1])}
        with torch.no_grad(), foveate.use(model, method) as run:
            model(**{**inputs, **longest}, use_cache=False)
        assert got[1] == told(run)[1]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("beside", ["distorted", "longer", "text"])
def test_contrast_leaves_the_record_of_its_prompt(model, beside, cached):
    inputs = prompts([[4, 6], [3, 2]])
    other = {
        "distorted": {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])},
        "longer": prompts([[9, 9, 2], [3, 2]], seed=3),
        "text": prompts([[7], [4]]),
    }[beside]
    method = FastV(layer=2, keep=9)
    settings = {"use_cache": cached}
    contrast = Beside(model, other, cached)
    with torch.no_grad(), foveate.use(model, method) as run:
        model.generate(
            **inputs, **STEPS, **settings, logits_processor=LogitsProcessorList([contrast])
        )
        report, kept = told(run)
    assert contrast.calls == 3
    assert [image["row"] for image in report["images"]] == [0, 1]
    if cached:
        assert (report, kept) == plain(model, method, inputs)
    else:
        assert report["prompt_tokens"] == [4 + 36 + 6 + 2, 3 + 36 + 2 + 2]


def test_a_call_within_a_call_leaves_the_record(model):
    inputs, method = prompts([[4, 6]]), DivPrune(keep=9)
    inner = Beside(model, prompts([[3], [2, 4]]), generate=True)
    with foveate.use(model, method) as run:
        out = model.generate(**inputs, **STEPS, logits_processor=LogitsProcessorList([inner]))
        got = told(run)
        assert torch.equal(out, model.generate(**inputs, **STEPS))
    assert got == plain(model, method, inputs)


def test_every_call_of_its_own_makes_its_own_record(model):
    inputs = prompts([[4, 6]])
    with torch.no_grad(), foveate.use(model, DivPrune(keep=9)) as run:
        model.generate(**inputs, **STEPS)
        assert len(run.kept) == 1
        model.generate(**prompts([[6]]), **STEPS)
        assert run.kept == []
        assert "no image in the prompt" in run.report()["notes"][0]
        model.generate(**prompts([[6, 3, 2]]), **STEPS)
        assert len(run.kept) == 2
        model(**prompts([[6]]))
        assert run.kept == []
        model.generate(**inputs, **STEPS)
        with pytest.raises(ValueError, match="broken"):
            model.generate(**prompts([[6]]), **STEPS, logits_processor=[broken])
        assert run.kept == []
        model(**inputs)
        assert len(run.kept) == 1


def broken(input_ids, scores):
    raise ValueError("broken")


def test_guided_answers_of_all_tokens_are_those_without_a_session(model):
    inputs = prompts([[4, 6]])
    settings = {"guidance_scale": 1.5, "negative_prompt_ids": NEGATIVE, **STEPS}
    want = model.generate(**inputs, **settings)
    with foveate.use(model, DivPrune(keep=1.0)):
        assert torch.equal(model.generate(**inputs, **settings), want)
