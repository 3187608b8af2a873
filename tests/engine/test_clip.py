"""Methods that ask CLIP: every row of a batch by its own question."""

import threading

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.core import Need, Step, VisualTokens
from foveate.errors import InputError, LayerError, UnsupportedModelError
from foveate.methods import CDPruner, DivPrune, RecoverableCompression
from tests.engine.test_signals import ROWS
from tests.methods_for_tests import EveryThird
from tests.tinies import PATCHES, prompts, row_of, tiny_clip

ASKED = ["a red door", "how many", "nothing to see", "what is this long question about"]
METHOD = CDPruner(keep=9, relevance="clip")


@pytest.fixture(scope="module")
def clip():
    return foveate.ClipText(*tiny_clip())


def signals_by_hand(model, pixels, questions):
    """What the method is shown of each image, from the models' own outputs."""
    whole, tokenizer = tiny_clip()
    tower = model.model.vision_tower
    states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    patches = whole.visual_projection(whole.vision_model.post_layernorm(states))
    text = []
    for question in questions:
        ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        parts = [[52, *ids[i : i + 10], 53] for i in range(0, len(ids), 10)]
        found = [whole.get_text_features(torch.tensor([part])).pooler_output for part in parts]
        text.append(F.normalize(torch.cat(found), dim=-1).mean(0, keepdim=True))
    return states, F.normalize(patches, dim=-1), torch.stack(text)


def kept_by_hand(model, pixels, questions):
    """Survivors, image by image: negated cosine to the text, then the method's own choice."""
    states, patches, text = signals_by_hand(model, pixels, questions)
    x = model.model.multi_modal_projector(states)
    kept = []
    for image in range(len(x)):
        index = torch.arange(PATCHES)[None]
        # The cosine of a mean of unit rows to a patch, without the mean's length.
        relevance = -(patches[image] @ text[image].T)[None, :, 0]
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        one = x[image : image + 1]
        tokens = VisualTokens(lambda one=one: one, index, (6, 6), (0,))
        chosen = type("Given", (CDPruner,), {"scaled_relevance": lambda *_, r=relevance: r})
        kept.append(chosen(keep=9).reduce(tokens, 9).index[0].tolist())
    return kept


def kept_of(run):
    return [image["pre_llm"].tolist() for image in run.kept]


@torch.no_grad()
def test_each_row_is_asked_its_own_question(llava, clip):
    inputs = prompts(ROWS)  # rows of two images, one, none and one
    rows = [0, 0, 1, 3]
    with foveate.use(llava, METHOD, clip=clip(ASKED)) as run:
        llava(**inputs)
        together = kept_of(run)
    questions = [ASKED[row] for row in rows]
    assert together == kept_by_hand(llava, inputs["pixel_values"], questions)
    others = kept_by_hand(llava, inputs["pixel_values"], [ASKED[2]] * 4)
    assert all(a != b for a, b in zip(together, others, strict=True)), "the test does not bite"


@torch.no_grad()
@pytest.mark.parametrize("method", [METHOD, RecoverableCompression(relevance="clip")])
def test_a_row_gets_what_it_gets_alone(llava, clip, method):
    inputs = prompts(ROWS)
    with foveate.use(llava, method, clip=clip(ASKED)) as run:
        together = llava(**inputs).logits[:, -1]
        kept = kept_of(run)
    places = {0: [0, 1], 1: [2], 2: [], 3: [3]}
    for row, images in places.items():
        with foveate.use(llava, method, clip=clip(ASKED[row])) as run:
            alone = llava(**row_of(inputs, row)).logits[0, -1]
            assert kept_of(run) == [kept[image] for image in images]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=3e-5)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_asks_the_question_of_the_row(llava, clip, beams):
    inputs = prompts([[3, 4], [6, 2]])
    with foveate.use(llava, METHOD, clip=clip(ASKED[:2])) as run:
        llava.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=beams)
        kept = kept_of(run)
    wanted = kept_by_hand(llava, inputs["pixel_values"], ASKED[:2])
    assert kept == [image for image in wanted for _ in range(beams)]


@torch.no_grad()
def test_the_next_prompt_may_ask_something_else(llava, clip):
    inputs = prompts([[3, 4]])
    handle = foveate.apply(llava, METHOD, clip=clip(ASKED[0]))
    try:
        for question in (ASKED[0], ASKED[1], ASKED[3]):
            handle.clip = clip(question)
            llava(**inputs)
            assert kept_of(handle) == kept_by_hand(llava, inputs["pixel_values"], [question])
    finally:
        handle.remove()


@torch.no_grad()
def test_threads_ask_their_own_questions(llava, clip):
    inputs = prompts([[3, 4]])
    wanted = {q: kept_by_hand(llava, inputs["pixel_values"], [q]) for q in ASKED[:3]}
    found, barrier = {}, threading.Barrier(2)

    def ask(question):
        run.clip = clip(question)
        barrier.wait()
        with torch.no_grad():
            llava(**inputs)
        found[question] = kept_of(run)

    with foveate.use(llava, METHOD, clip=clip(ASKED[0])) as run:
        threads = [threading.Thread(target=ask, args=(question,)) for question in ASKED[1:3]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        llava(**inputs)
        found[ASKED[0]] = kept_of(run)
    assert found == wanted
    assert len(set(map(str, wanted.values()))) == 3, "the test does not bite"


def test_what_is_missing_is_named(llava, clip):
    with pytest.raises(InputError, match=r"cdpruner compares .* clip = foveate\.ClipText"):
        foveate.use(llava, "cdpruner", relevance="clip")
    with pytest.raises(InputError, match="divprune does not ask it"):
        foveate.use(llava, DivPrune(), clip=clip("a"))
    with (
        foveate.use(llava, METHOD, clip=clip(["a", "b", "c"])),
        pytest.raises(InputError, match=r"3 questions, .* 1 rows"),
    ):
        llava(**prompts([[3, 4]]))
    wide = foveate.ClipText(*tiny_clip(width=48))
    with (
        foveate.use(llava, METHOD, clip=wide("a")),
        pytest.raises(UnsupportedModelError, match=r"width 48, .* width 32"),
    ):
        llava(**prompts([[3, 4]]))


@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        (Step("pre_llm", 0, (Need("clip_patches", (1,)),)), InputError, "needs the CLIP"),
        (Step("vision", 2, (Need("clip_patches", (1,)),)), LayerError, "only pre_llm steps"),
    ],
)
def test_patches_in_clips_space_are_refused_where_nothing_is_asked(llava, step, error, match):
    """They were asserted on at the first image."""

    class Nearest(EveryThird):
        def steps(self, model):
            return (step,)

    with pytest.raises(error, match=match):
        foveate.use(llava, Nearest())


def test_a_method_that_asks_clip_is_still_json():
    assert METHOD.to_dict() == {
        "method": "cdpruner", "keep": 9, "relevance": "clip", "negate": None, "positions": None,
        "as_released": False,
    }  # fmt: skip
