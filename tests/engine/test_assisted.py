"""Assisted decoding in every form: greedy's tokens, or a message about the assistant."""

import copy
from contextlib import ExitStack

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import foveate
from foveate import tiny
from foveate.errors import CacheError, InputError
from foveate.methods import CDPruner, DivPrune, FastV, PyramidDrop, ToMe
from tests.conformance.test_families import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird, Glance
from tests.tinies import prompts, tiny_llava

STEPS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
METHODS = {
    "divprune": DivPrune(keep=9),
    "fastv": FastV(layer=2, keep=9),
    "pyramiddrop": PyramidDrop(layers=(1, 2), keep=(12, 5)),
    "cdpruner": CDPruner(keep=9),
    "tome": ToMe(),
}


@pytest.fixture(scope="module")
def main():
    return tiny_llava()


@pytest.fixture(scope="module")
def second():
    """Another VLM, which often drafts what is not taken; one that drafts well is a copy."""
    return {"other": tiny_llava(seed=3, layers=3), "copy": tiny_llava()}


FORMS = ("lookup", "itself", "other", "copy")


def arguments(form, main, second):
    if form == "lookup":
        return {"prompt_lookup_num_tokens": 3}
    return {"assistant_model": main if form == "itself" else second[form]}


PLACES = [(form, "main") for form in FORMS]
PLACES += [(form, where) for form in ("other", "copy") for where in ("assistant", "both")]


@pytest.mark.parametrize(("form", "where"), PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_assisted_decoding_says_what_greedy_search_says(main, second, method, form, where):
    inputs = prompts([[4, 6]])
    given = arguments(form, main, second)
    with ExitStack() as stack:
        run = None
        if where != "assistant":
            run = stack.enter_context(foveate.use(main, METHODS[method]))
        if where != "main":
            stack.enter_context(foveate.use(second[form], METHODS[method]))
        want = main.generate(**inputs, **STEPS)
        kept = None if run is None else [list(map(len, image.values())) for image in run.kept]
        got = main.generate(**inputs, **STEPS, **given)
        assert torch.equal(got, want)
        if run is not None:  # the record is that of the prompt, not of what the assistant was asked
            assert [list(map(len, image.values())) for image in run.kept] == kept
            assert run.report()["images"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_new_image_of_a_later_turn_is_ranked_by_its_prompt(main, second, method, form):
    """By the last token of the prompt, not by a draft after it."""
    with foveate.use(main, METHODS[method]):
        first = main.generate(**prompts([[4, 6]]), **STEPS, return_dict_in_generate=True)
        more = prompts([[3, 5]], seed=7)
        whole = torch.cat((first.sequences, more["input_ids"]), 1)
        turn = {
            "input_ids": whole[:, first.past_key_values.get_seq_length() :],
            "attention_mask": torch.ones_like(whole), "pixel_values": more["pixel_values"],
        }  # fmt: skip
        answers = [
            main.generate(**turn, **STEPS, **given, past_key_values=copy.deepcopy(cache))
            for cache in [first.past_key_values]
            for given in ({}, arguments(form, main, second))
        ]
    assert torch.equal(*answers)


def test_assistants_with_a_tokenizer_of_their_own():
    model, processor = tiny.load()
    scene = tiny.draw_scene(12)
    inputs = processor(
        images=scene.image, text=f"<image> {scene.questions[0].text}", return_tensors="pt"
    )
    torch.manual_seed(0)
    assistant = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(processor.tokenizer) + 8, hidden_size=32, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=2,
        )
    ).eval()  # fmt: skip
    words = {"tokenizer": processor.tokenizer, "assistant_tokenizer": processor.tokenizer}
    with foveate.use(model, "fastv", keep=0.25) as run:
        want = model.generate(**inputs, **STEPS)
        got = model.generate(**inputs, **STEPS, assistant_model=assistant, **words)
        assert len(run.kept) == 1
    assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_a_choice_at_each_step_is_refused(main, second, form):
    with (
        foveate.use(main, Glance(3)),
        pytest.raises(InputError, match=r"glance.*one token a step"),
    ):
        main.generate(**prompts([[4, 6]]), **STEPS, **arguments(form, main, second))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_models_that_cannot_leave_early_say_so(name):
    """transformers looks for the number of layers on a config that has none."""
    member, model = MEMBERS[name](), model_of(name)
    inputs = member.inputs([[3, 4]])
    with foveate.use(model, EveryThird(6)):
        with pytest.raises(InputError, match="assistant_early_exit"):
            model.generate(**fresh(inputs), **STEPS, assistant_early_exit=2)
        config = copy.deepcopy(model.generation_config)
        config.assistant_early_exit = 2
        with pytest.raises(InputError, match="assistant_early_exit"):
            model.generate(**fresh(inputs), generation_config=config)
        model.generate(**fresh(inputs), **STEPS)


def test_drafts_that_the_prompt_sees_are_refused():
    """A prefix of PaliGemma sees itself whole."""
    member, model = MEMBERS["paligemma"](), model_of("paligemma")
    inputs = member.inputs([[3, 4]])
    with (
        foveate.use(model, EveryThird(6)),
        pytest.raises(InputError, match="assistant would change the answer"),
    ):
        model.generate(**fresh(inputs), **STEPS, assistant_model=model)


def test_windows_hold_no_more_than_they_see():
    """Once no draft was dropped; dropping one is refused, as the window has forgotten what comes
    back. A new image of a later turn is ranked among what the window holds.
    """
    model, more = tiny_llava("mistral", window=20), prompts([[3, 5]], seed=7)
    kept = []
    with torch.no_grad(), foveate.use(model, FastV(layer=2, keep=9)) as run:
        for recording in (False, True):
            cache = DynamicCache(config=model.config.text_config)
            if recording:
                cache.activate_past_recording()
            for given in (prompts([[4, 6]]), {"input_ids": torch.tensor([[7, 8, 9]])}):
                model(**{**given, "attention_mask": None}, past_key_values=cache)
                if recording:
                    cache.crop(0)
                assert [layer.keys.shape[2] for layer in cache.layers[2:]] == [19] * 4
            model(**{**more, "attention_mask": None}, past_key_values=cache)
            kept.append(run.kept[0]["llm:2"])
        assert torch.equal(*kept)
        with pytest.raises(CacheError, match="assisted decoding"):
            cache.crop(-1)
