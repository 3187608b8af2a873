"""Where a prompt ends in its image, what the next token is read from is never removed."""

from typing import ClassVar

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import foveate
from foveate.errors import InputError
from foveate.methods import ClsDrop, DivPrune, FastV, PyramidDrop, ToDRE, ToMe, VisionZip
from foveate.testing import models
from foveate.training.prepare import session_of
from tests import full_length
from tests.methods_for_tests import ONE_BY_ONE, EveryThird, Forgetful, readers_methods
from tests.tinies import IMAGE, PATCHES, prompts, row_of, tiny_llava

LLAVA, MROPE = tiny_llava(layers=12), models.mrope()
MERGING = {"sparsevlm", "holitom-inner", "lvlm-csp", "yopo"}  # inside the LLM
METHODS = [name for name in readers_methods() if name != "lrs-vqa"]
NEED_CLIP = {  # its class token, or its layers; Qwen2-VL's encoder has neither
    "cls-drop", "fastervlm", "flowcut", "llava-prumerge", "recoverable-compression", "vflowopt",
    "vtc-cls",
}  # fmt: skip
CELLS = [pytest.param(LLAVA, name, id=f"llava-{name}") for name in METHODS]
REMOVING = [name for name in METHODS if foveate.get_method(name).removes]
CELLS += [
    pytest.param(MROPE, n, id=f"qwen2_vl-{n}")
    for n in REMOVING
    if n not in NEED_CLIP and n not in ONE_BY_ONE
]


class Noted(FastV):
    """FastV, whose scores can be read."""

    seen: ClassVar[list] = []

    def scores(self, tokens):
        self.seen.append(super().scores(tokens))
        return self.seen[-1]


def ending_in_image(model, rows=((4, 0),), side="left"):
    """Prompts, of which rows with an empty last piece end in their image."""
    if model is LLAVA:
        return prompts(rows, side=side)
    inputs = models.prompts(model, rows)
    if len(rows) == 1 and not rows[0][-1]:  # without the end-of-vision token
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = inputs[name][:, :-1]
    return inputs


def columns_of(model, ids, images):
    return (ids == model.config.image_token_id).nonzero()[:, 0].chunk(images)


@pytest.mark.parametrize(("model", "name"), CELLS)
@torch.no_grad()
def test_what_the_next_token_is_read_from_stays(model, name):
    method = foveate.get_method(name)(positions="original")
    inputs = ending_in_image(model)
    visual, text = columns_of(model, inputs["input_ids"][0], 1), model.model.language_model
    with foveate.use(model, method) as run, full_length.watching(text) as seen:
        state = model.model(**inputs).last_hidden_state[0, -1]
        (kept,) = run.kept
    assert all(int(index[-1]) == len(visual[0]) - 1 for index in kept.values())
    if name not in MERGING:
        want = full_length.run(text, seen[0], visual, [kept])[-1]
        torch.testing.assert_close(state, want, rtol=0, atol=3e-5)


FEW = {
    "pre_llm": DivPrune(5, positions="original"),
    "llm": PyramidDrop((3, 8), (12, 4), "original"),
    "none left": ToDRE(keep=4, positions="original"),
    "vision": ClsDrop(layers=(1,), keep=0.2),
    "merging": ToMe(keep=0.4),
    "merging first": VisionZip(keep=6),
    "forgetful": Forgetful(4, 5),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", FEW.values(), ids=FEW)
@torch.no_grad()
def test_rows_of_a_batch_get_what_they_get_alone(method, side):
    rows = ((4, 0), (3, 5), (2, 1, 0), (6,))
    inputs = prompts(rows, side=side)
    with foveate.use(LLAVA, method) as run:
        together = LLAVA.model(**inputs).last_hidden_state
        kept = run.kept
        images = 0
        for row, pieces in enumerate(rows):
            real = inputs["attention_mask"][row].bool()
            alone = LLAVA.model(**row_of(inputs, row)).last_hidden_state[0, -1]
            torch.testing.assert_close(together[row][real][-1], alone, rtol=0, atol=3e-5)
            for number, places in enumerate(run.kept if len(pieces) > 1 else ()):
                ends = number == len(pieces) - 2 and not pieces[-1]
                for place, index in places.items():
                    assert torch.equal(index, kept[images][place])
                    assert not ends or int(index[-1]) == PATCHES - 1
                images += 1


@pytest.mark.parametrize("model", [LLAVA, MROPE], ids=["llava", "qwen2_vl"])
@pytest.mark.parametrize("method", [*FEW.values()][:3], ids=[*FEW][:3])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str
)
@torch.no_grad()
def test_generation_reads_the_same_token(model, method, options, monkeypatch):
    def draft(self, ids, *args, **kwargs):  # what stands in a prompt are image tokens
        return torch.cat((ids, ids.new_tensor([[11, 12]])), 1), None

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", draft)
    inputs = ending_in_image(model)
    with foveate.use(model, method) as run:
        want = model(**inputs).logits[0, -1]
        kept = run.kept[0]
        out = model.generate(
            **inputs, **options, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        for places in run.kept:
            assert all(torch.equal(index, kept[place]) for place, index in places.items())
    torch.testing.assert_close(out.logits[0][0], want, rtol=0, atol=3e-5)


@torch.no_grad()
def test_counts_stay_and_the_lowest_of_the_ranking_makes_room():
    inputs = prompts(((4, 0),))
    with foveate.use(LLAVA, FastV(layer=2, keep=5)) as run:
        LLAVA(**inputs)
        five = run.kept[0]["llm:2"].tolist()
    with foveate.use(LLAVA, Noted(keep=5)):
        LLAVA(**inputs)
    best = Noted.seen[0][0, :-1].topk(4).indices.sort().values.tolist()
    assert five == [*best, PATCHES - 1]


@torch.no_grad()
def test_budgets_of_each_request_stay():
    inputs = prompts(((4, 0), (3, 0)))
    with foveate.use(LLAVA, DivPrune(foveate.per_request([3, 7]), positions="original")) as run:
        LLAVA(**inputs)
        counts = [len(image["pre_llm"]) for image in run.kept]
        LLAVA.generate(**inputs, max_new_tokens=2)
        assert counts == [len(image["pre_llm"]) for image in run.kept] == [3, 7]
        assert all(int(image["pre_llm"][-1]) == PATCHES - 1 for image in run.kept)


@torch.no_grad()
def test_with_labels_the_token_before_each_answer_stays():
    """In evaluation; in training the loss is that of the shorter sequence."""
    model = tiny_llava(layers=4)
    inputs = prompts(((3, 4, 2),))
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == IMAGE, -100)
    labels[:, :3] = labels[:, -1:] = -100
    foveate.prepare(model, EveryThird(keep=4))
    session = session_of(model)
    loss = model(**inputs, labels=labels).loss
    kept = session.kept
    session.remove()
    assert [int(image["pre_llm"][-1]) for image in kept] == [PATCHES - 1] * 2
    visual = columns_of(model, ids[0], 2)
    alive = torch.ones(ids.shape[1], dtype=torch.bool)
    for columns, image in zip(visual, kept, strict=True):
        alive[columns] = False
        alive[columns[image["pre_llm"]]] = True
    length = ids.shape[1]
    mask = torch.ones(length, length).tril().bool() & alive | torch.eye(length).bool()
    want = model(**{**inputs, "attention_mask": mask[None, None]}, labels=labels).loss
    torch.testing.assert_close(loss, want, rtol=0, atol=3e-5)


@torch.no_grad()
def test_features_made_before_the_prompt_was_known_are_refused():
    inputs = prompts(((4, 0),))
    pixels = inputs.pop("pixel_values")
    with foveate.use(LLAVA, EveryThird(keep=4)):
        early = LLAVA.model.get_image_features(pixels)
        with pytest.raises(InputError, match="ends in its image"):
            LLAVA(**inputs, mm_encoder_outputs={"image": early})
        LLAVA(**prompts(((4, 0),)))
