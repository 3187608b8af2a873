"""Questions that share an image and do not see each other, by a 4-D mask of blocks."""

import pytest
import torch

import foveate
from foveate.engine.extensions.labels import IGNORED
from foveate.methods import PyramidDrop
from tests.tinies import IMAGE, PATCHES, prompts, tiny_llava

METHOD = PyramidDrop(layers=(2, 4), keep=(0.5, 0.2))
QUESTIONS = ([5, 9, 31], [17, 4, 8, 22])
PREFIX = [1] + [IMAGE] * PATCHES


def packed(questions, asks):
    """One row: the image, then every question in a block of its own; some have labels."""
    ids, places, blocks, labels = (
        [*PREFIX], list(range(len(PREFIX))), [0] * len(PREFIX), [IGNORED] * len(PREFIX)
    )  # fmt: skip
    for number, words in enumerate(questions):
        ids += words
        places += range(len(PREFIX), len(PREFIX) + len(words))
        blocks += [number + 1] * len(words)
        labels += [IGNORED] * (len(words) - 1) + [words[-1] if number in asks else IGNORED]
    block = torch.tensor(blocks)
    sees = ((block[:, None] == block) | (block == 0)) & torch.ones(len(ids), len(ids)).tril().bool()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([places]),
        "attention_mask": mask[None, None],
        "labels": torch.tensor([labels]),
        "pixel_values": prompts([(1, 1)])["pixel_values"],
    }


def train(attention, questions, asks):
    """Logits of a prepared model, what it kept, and its loss."""
    model = tiny_llava(attention=attention).train()
    foveate.prepare(model, METHOD)
    out = model(**packed(questions, asks), use_cache=False)
    return out, foveate.training.prepare.session_of(model).kept[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_only_questions_with_labels_ask(attention):
    """What stands in another block changes neither choices nor answers."""
    want, kept = train(attention, QUESTIONS[:1], {0})
    got, chosen = train(attention, QUESTIONS, {0})
    assert chosen.keys() == kept.keys() == {"llm:2", "llm:4"}
    assert all(torch.equal(chosen[place], kept[place]) for place in kept)
    end = len(PREFIX) + len(QUESTIONS[0])
    torch.testing.assert_close(got.logits[:, :end], want.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_block_asks(attention):
    """With two that ask, the order of the blocks does not matter."""
    one, kept = train(attention, QUESTIONS, {0, 1})
    two, again = train(attention, QUESTIONS[::-1], {0, 1})
    _, first = train(attention, QUESTIONS, {0})
    assert all(torch.equal(again[place], kept[place]) for place in kept)
    assert any(not torch.equal(first[place], kept[place]) for place in kept)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-6, atol=0)
