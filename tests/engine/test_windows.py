"""Text models of which every layer sees a window (Mistral): ranking beyond it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import foveate
from foveate.methods import FastV, PyramidDrop
from tests import oracle
from tests.engine.test_oracle import BATCHES, check_generation, drops
from tests.methods_for_tests import Glance
from tests.tinies import IMAGE, PATCHES, prompts, tiny_llava


@dataclass(frozen=True)
class Noting(FastV):
    """FastV that notes its scores."""

    noted: ClassVar[list] = []

    def scores(self, tokens):
        self.noted.append(super().scores(tokens))
        return self.noted[-1]


def noted(model, inputs, cached=0):
    """What the last tokens pay to each visual token in layer 1, (B, V), by foveate."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache(config=model.config.text_config)
    Noting.noted.clear()
    with foveate.use(model, Noting(layer=2, keep=9)):
        if cached:
            before = {"input_ids": ids[:, :cached], "attention_mask": mask[:, :cached]}
            model(**before, past_key_values=cache)
        model(**inputs | {"input_ids": ids[:, cached:]}, past_key_values=cache)
    (scores,) = Noting.noted
    return scores


def paid(inputs, window):
    """The same by maps of the whole sequence."""
    model = tiny_llava("mistral", "eager", window=window)
    maps = model(**inputs, output_attentions=True).attentions[1]
    rows = len(inputs["input_ids"])
    places = (inputs["input_ids"] == IMAGE).nonzero()[:, 1].view(rows, PATCHES)
    return maps.mean(1)[:, -1].gather(1, places)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [[(5, 7)], [(5, 7), (2, 4)]])
def test_tokens_outside_the_window_get_no_attention(attention, rows):
    inputs = prompts(rows)
    want = paid(inputs, 24)
    assert (want == 0).any(1).all()  # it cuts the images
    got = noted(tiny_llava("mistral", attention, window=24), inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [[(60, 3)], [(60, 3), (59, 7)]])
@pytest.mark.parametrize("window", [48, 60, 80, 98])
def test_a_later_turn_looks_back_into_the_cache_as_far_as_the_window(rows, window):
    """The cache holds as much of the first turn as a window, or all of it."""
    inputs = prompts(rows)
    want = paid(inputs, window)
    assert (want > 0).all()
    got = noted(tiny_llava("mistral", window=window), inputs, cached=58)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_generation_equals_the_oracle(positions, rows):
    """A window is one of positions in the prompt, whatever was removed in between."""
    method = PyramidDrop(layers=(2, 4), keep=(8, 4), positions=positions)
    renumber = positions == "renumbered"
    check_generation(
        tiny_llava("mistral", window=24),
        method,
        lambda n: oracle.Spec(drops=drops((8, 4), (2, 4), (2, 4), n, renumber)),
        rows,
    )


@dataclass(frozen=True)
class Watching(Glance):
    """Glance that notes the attention it is told."""

    noted: ClassVar[list] = []

    def choose(self, attention, real, before):
        self.noted.append(attention)
        return super().choose(attention, real, before)


@pytest.mark.parametrize("rows", [[(5, 7)], [(5, 7), (2, 4)]])
def test_a_decoding_step_is_told_no_attention_to_tokens_outside_the_window(rows):
    """The cache has lost them, and no other token's attention stands in for theirs."""
    inputs, length = prompts(rows), prompts(rows)["input_ids"].shape[1]
    Watching.noted.clear()
    model = tiny_llava("mistral", window=24)
    with foveate.use(model, Watching(layer=3)):
        ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    longer = inputs | {"input_ids": ids}
    longer["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    maps = tiny_llava("mistral", "eager", window=24)(**longer, output_attentions=True).attentions[2]
    places = (ids == IMAGE).nonzero()[:, 1].view(len(rows), 1, PATCHES)
    assert len(Watching.noted) == 3
    for step, got in enumerate(Watching.noted):
        want = maps[:, :, length + step].gather(2, places.expand(-1, maps.shape[1], -1))
        assert (want == 0).any(2).all()
        assert (want > 0).any(2).all()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
