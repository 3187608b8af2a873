"""Where no text follows an image, methods that rank by it go by the prompt's last token."""

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.methods import CDPruner, SparseVLM, TransPrune
from foveate.testing import models
from tests.tinies import PATCHES, prompts, row_of, tiny_llava

LLAVA, MROPE = tiny_llava(layers=12), models.mrope()
ASKING = ("catp", "cdpruner", "dart", "recoverable-compression", "sparsevlm", "transprune")
SAID = "no text follows an image of row"


def said(run):
    return [note for note in run.report()["notes"] if note.startswith(SAID)]


@pytest.mark.parametrize("name", ASKING)
@torch.no_grad()
def test_rows_get_what_they_get_alone_and_the_report_says_so(name):
    rows = ((4, 0), (3, 5), (2, 0, 0), (1, 6, 0), (5,))
    inputs = prompts(rows)  # with the positions that rows have alone
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with foveate.use(LLAVA, foveate.get_method(name)()) as run:
        together = LLAVA(**inputs).logits[:, -1]
        kept, (note,) = run.kept, said(run)
        assert note.startswith(f"{SAID} 0, 2, 3: {name} ")
        images = 0
        for row, pieces in enumerate(rows):
            alone = LLAVA(**row_of(inputs, row)).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=0, atol=3e-5)
            assert bool(said(run)) is (row in (0, 2, 3))
            for places in run.kept if len(pieces) > 1 else ():
                for place, index in places.items():
                    assert torch.equal(index, kept[images][place])
                images += 1
        want = LLAVA(**prompts(((4, 0),))).logits[0, -1]
        out = LLAVA.generate(
            **prompts(((4, 0),)), max_new_tokens=1, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        torch.testing.assert_close(out.logits[0][0], want, rtol=0, atol=3e-5)
        assert said(run)


@pytest.mark.parametrize("method", [SparseVLM(), TransPrune(), CDPruner(keep=6)], ids=str)
@torch.no_grad()
def test_models_with_positions_of_three_axes(method):
    inputs = models.prompts(MROPE, [(4, 0)])
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = inputs[name][:, :-1]
    with foveate.use(MROPE, method) as run:
        assert MROPE(**inputs).logits.isfinite().all()
        assert said(run)


@torch.no_grad()
def test_features_are_compared_with_those_of_the_last_token(monkeypatch):
    inputs, seen, rate = prompts(((4, 0, 0),)), [], CDPruner.scaled_relevance

    def noted(self, tokens):
        seen.append(rate(self, tokens))
        return seen[-1]

    monkeypatch.setattr(CDPruner, "scaled_relevance", noted)
    with foveate.use(LLAVA, CDPruner(keep=6)):
        LLAVA(**inputs)
    features = torch.stack(
        list(LLAVA.model.get_image_features(inputs["pixel_values"]).pooler_output)
    )
    want = F.cosine_similarity(features, features[1, -1].expand_as(features), dim=-1)
    low, high = want.amin(1, keepdim=True), want.amax(1, keepdim=True)
    (got,) = seen
    torch.testing.assert_close(got, (want - low) / (high - low), rtol=0, atol=1e-4)


def test_in_training_images_without_a_question_are_left_alone():
    inputs = prompts(((3, 4),))
    labels = inputs["input_ids"].clone()
    labels[:, : 3 + PATCHES] = -100  # the answer follows the image at once
    with foveate.use(LLAVA, CDPruner(keep=6)) as run:
        LLAVA(**inputs, labels=labels)
        assert len(run.kept[0]["pre_llm"]) == PATCHES
        assert not said(run)
