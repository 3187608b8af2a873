"""What the caller hides in the attention mask is unseen, for every method; nothing else is lost."""

import pytest
import torch

import foveate
from foveate.methods import YOPO, DivPrune, Random
from foveate.testing import models
from tests import full_length
from tests.engine.test_readout import CELLS, LLAVA, MERGING, MROPE, columns_of
from tests.tinies import prompts

HIDDEN = [6, 7, 20, 45, 46]  # visual tokens, and text after the image


def prompt_of(model):
    inputs = prompts([[4, 9]]) if model is LLAVA else models.prompts(model, [(4, 9)])
    if model is MROPE:
        positions, _ = model.model.get_rope_index(
            **{
                n: inputs[n]
                for n in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
            }
        )
        inputs["position_ids"] = positions
    return inputs


def masks(inputs, hidden):
    """The 2-D and the 4-D mask without some columns; in the second each token sees itself."""
    flat = inputs["attention_mask"].clone()
    flat[:, hidden] = 0
    length = flat.shape[1]
    square = torch.ones(length, length).tril().bool() & flat.bool()[:, None]
    return flat, (square | torch.eye(length).bool())[:, None]


@pytest.mark.parametrize(("model", "name"), CELLS)
@torch.no_grad()
def test_every_method_agrees_with_the_full_length_model(model, name):
    method = foveate.get_method(name)(positions="original")
    inputs = prompt_of(model)
    visual, text = columns_of(model, inputs["input_ids"][0], 1), model.model.language_model
    flat, square = masks(inputs, HIDDEN)
    seen = flat[0].bool()
    seen[visual[0]] = False
    with foveate.use(model, method) as run, full_length.watching(text) as given:
        states = model.model(**{**inputs, "attention_mask": flat}).last_hidden_state[0, seen]
        (kept,) = run.kept
        again = model.model(**{**inputs, "attention_mask": square}).last_hidden_state[0, seen]
        assert all(torch.equal(index, kept[place]) for place, index in run.kept[0].items())
    torch.testing.assert_close(states, again, rtol=0, atol=1e-5)
    if name not in MERGING:
        want = full_length.run(text, given[0], visual, [kept], HIDDEN)[seen]
        torch.testing.assert_close(states, want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("implementation", [None, "static"])
@torch.no_grad()
def test_survivors_get_consecutive_positions_among_what_is_seen(implementation):
    """In `generate`, what is hidden takes no position, so removing it frees none."""
    inputs = prompt_of(LLAVA)
    (visual,) = columns_of(LLAVA, inputs["input_ids"][0], 1)
    flat, _ = masks(inputs, HIDDEN)
    text, seen = LLAVA.model.language_model, []
    hook = LLAVA.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0][0, -1]))
    with foveate.use(LLAVA, Random(keep=8)) as run, full_length.watching(text) as given:
        LLAVA.generate(
            **{**inputs, "attention_mask": flat}, max_new_tokens=1,
            cache_implementation=implementation,
        )  # fmt: skip
        kept = run.kept[0]["pre_llm"]
    hook.remove()
    alive = flat[0].bool()
    alive[visual] = False
    alive[visual[kept]] = flat[0, visual[kept]].bool()
    want = text(inputs_embeds=given[0]["inputs_embeds"][:, alive]).last_hidden_state[0, -1]
    torch.testing.assert_close(seen[0], want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("fields", [{}, {"as_released": True}, {"layer": 4}], ids=str)
@torch.no_grad()
def test_layers_computed_in_parts_do_not_see_hidden_tokens(fields):
    inputs = prompt_of(LLAVA)
    flat, square = masks(inputs, HIDDEN)
    seen = flat.bool() & (inputs["input_ids"] != LLAVA.config.image_token_id)
    pixels, states = inputs["pixel_values"], []
    with foveate.use(LLAVA, YOPO(**fields)):
        for mask, noise in ((flat, 0), (square, 0), (flat, 1)):
            features = LLAVA.model.get_image_features(pixels)
            features.pooler_output[0][torch.tensor(HIDDEN[:3]) - 4] += noise
            own = {n: v for n, v in inputs.items() if n != "pixel_values"} | {
                "attention_mask": mask
            }
            out = LLAVA.model(**own, mm_encoder_outputs={"image": features})
            states.append(out.last_hidden_state[seen])
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(states[2], states[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_image_that_is_hidden_leaves_the_text():
    """As for contrastive decoding: the answer is that of the prompt without the image."""
    inputs = prompt_of(LLAVA)
    (visual,) = columns_of(LLAVA, inputs["input_ids"][0], 1)
    flat, _ = masks(inputs, visual)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    want = LLAVA.generate(**{**inputs, "attention_mask": flat}, **options)
    for positions in ("original", "renumbered"):
        with foveate.use(LLAVA, DivPrune(5, positions=positions)):
            got = LLAVA.generate(**{**inputs, "attention_mask": flat}, **options)
        assert torch.equal(got, want)
