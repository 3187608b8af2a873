"""Accounts of single rows."""

import pytest
import torch

import foveate
from foveate import tiny
from foveate.integrations.chat import ChatModel
from foveate.measure.account import account, of_row, unpruned


def turn(question, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("method", ["pyramiddrop", "fastv", "divprune", "visionzip"])
def test_a_row_of_a_batch_is_the_record_of_the_row_alone(method):
    model, processor = tiny.load()
    scenes = [tiny.draw_scene(seed) for seed in (3, 4)]
    batch = [
        turn("what color is the star ?", scenes[0].image),
        turn("star ?", scenes[1].image, scenes[0].image),
    ]
    chat = ChatModel(model, processor)

    def record(rows):
        with foveate.use(model, method) as session, torch.inference_mode():
            model(**chat.encode(rows), use_cache=True)
        return session.record, session.family, session.methods

    together, family, methods = record(batch)
    for row, one in enumerate(batch):
        got, want = of_row(together, row), record([one])[0]
        for name in ("rows", "prompt_tokens", "layer_tokens", "cache_slots"):
            assert getattr(got, name) == getattr(want, name)
        assert [i.kept.keys() for i in got.images] == [i.kept.keys() for i in want.images]
        assert torch.equal(got.pixels, want.pixels)
        assert account(got, family, methods).prefill == account(want, family, methods).prefill
        assert unpruned(got).cache_slots == unpruned(want).cache_slots
