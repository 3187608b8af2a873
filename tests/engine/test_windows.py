"""Text models of which every layer sees a window (Mistral): ranking beyond it."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

import foveate
from foveate.methods import FastV, PyramidDrop
from tests import oracle
from tests.engine.test_oracle import BATCHES, check_generation, drops
from tests.tinies import IMAGE, PATCHES, prompts

WINDOW = 24  # of prompts with 36 visual tokens


def windowed(attention: str):
    torch.manual_seed(0)
    text = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, pad_token_id=0,
        sliding_window=WINDOW,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        image_size=48, patch_size=8, initializer_factor=6.0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2,
    )  # fmt: skip
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [[(5, 7)], [(5, 7), (2, 4)]])
def test_tokens_outside_the_window_get_no_attention(attention, rows):
    inputs = prompts(rows)
    maps = windowed("eager")(**inputs, output_attentions=True).attentions
    places = (inputs["input_ids"] == IMAGE).nonzero()[:, 1].view(len(rows), PATCHES)
    want = maps[1].mean(1)[:, -1].gather(1, places)
    assert (want[0] == 0).sum() > 10  # the window cuts the picture
    assert (want[0] > 0).sum() > 10
    with foveate.use(windowed(attention), FastV(layer=2, keep=9)) as run:
        run._model(**inputs)
        kept = [image["llm:2"] for image in run.kept]
    assert [k.tolist() for k in kept] == [sorted(row.topk(9).indices.tolist()) for row in want]


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_generation_equals_the_oracle(positions, rows):
    """A window is one of positions in the prompt, whatever was removed in between."""
    method = PyramidDrop(layers=(2, 4), keep=(8, 4), positions=positions)
    renumber = positions == "renumbered"
    model = windowed("sdpa")
    check_generation(
        model, method, lambda n: oracle.Spec(drops=drops((8, 4), (2, 4), (2, 4), n, renumber)), rows
    )
