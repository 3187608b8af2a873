"""Llama 4: chunks of original positions, the temperature of attention, and the late projector."""

import pytest
import torch

import foveate
from foveate.calibration.search import last_state
from foveate.errors import InputError
from foveate.families import find_family
from foveate.methods import PyramidDrop
from foveate.record.tiles import Tiling
from foveate.signals.latent_view import view_of
from tests.conformance import oracle
from tests.conformance.tolerance import states_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh, loud
from tests.methods_for_tests import EveryThird
from tests.oracle import Spec

TOLERANCE = 5e-5


class Tempered(MEMBERS["llama4"]):
    """Attention that sharpens every 32 tokens, by much."""

    def config(self):
        config = super().config()
        config.text_config.floor_scale, config.text_config.attn_scale = 32, 3.0
        return config


def test_answers_that_grow_into_another_temperature_equal_the_oracle():
    """The prompt has 28 tokens, 16 of an image; of the twelve after it some are sharper."""
    member = Tempered()
    model, inputs = member.build(), member.inputs([[5, 7]])
    with foveate.use(model, EveryThird(4)):
        states, out = states_of(member, model, inputs, 12)
    whole = member.continued(inputs, out[:, 28:-1])
    spec = Spec(kept=[torch.arange(0, 12, 3)])
    want, _ = oracle.run(member, member.build("eager"), whole, spec, 28)
    assert (want[27:] - states[0]).abs().max() <= TOLERANCE
    model.language_model.config.attn_temperature_tuning = False
    for layer in model.language_model.model.layers:
        layer.self_attn.attn_temperature_tuning = False
    whole = member.continued(inputs, out[:, 28:-1])
    assert (member.run(model, **whole).last_hidden_state[0, 33:] - want[33:]).abs().max() > 0.02


@pytest.mark.parametrize("method", [EveryThird(4), PyramidDrop((3,), 4)], ids=str)
def test_prompts_in_which_places_would_count_are_refused(method):
    member = Tempered()
    model, (short, long) = member.build(), (member.inputs([[n, 7]]) for n in (8, 9))
    with torch.no_grad(), foveate.use(model, method):
        model(**short)
        with pytest.raises(InputError, match=r"from position 31 on.*has 32 tokens"):
            model(**long)
        model(input_ids=torch.randint(3, 80, (1, 60)))  # nothing is removed


@torch.no_grad()
def test_chunks_are_those_of_original_positions():
    """Chunks of tokens that are left would be others."""
    member = MEMBERS["llama4"]()
    model, inputs = member.build(), member.inputs([[5, 40]])
    spec = Spec(kept=[torch.arange(0, 12, 3)])
    want, _ = oracle.run(member, member.build("eager"), fresh(inputs), spec, 61)
    with foveate.use(model, EveryThird(4)):
        got = member.run(model, **fresh(inputs)).last_hidden_state[0, 21:]
    assert (want[21:] - got).abs().max() <= TOLERANCE
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = model.multi_modal_projector(member.stack(inputs)[0])
    embeds = torch.cat((embeds[:, :5], features[None, 0:12:3], embeds[:, 21:]), 1)
    shorter = member.text(model)(inputs_embeds=embeds).last_hidden_state[0, 9:]
    assert (shorter - got).abs().max() > 0.02


@torch.no_grad()
def test_prefill_in_chunks_equals_the_whole():
    member = MEMBERS["llama4"]()
    model, pixels = loud(member.build()), member.pixels(1)
    ids = torch.tensor([[5, 7, *[member.image_id] * 16, 8, 9, 10, 11]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with foveate.use(model, EveryThird(4)):
        want = model.generate(input_ids=ids, **fresh(pixels), **options)
        got = model.generate(input_ids=ids, **fresh(pixels), **options, prefill_chunk_size=6)
    assert torch.equal(got, want)


def test_marks_become_no_gradients():
    """Features are marked after the last projector."""
    member = MEMBERS["llama4"]()
    model, inputs = member.build().train(), member.inputs([[4, 6]])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 80, -100)
    with foveate.use(model, EveryThird(4)):
        model(**inputs).loss.backward()
    gradient = model.multi_modal_projector.linear_1.weight.grad
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


@torch.no_grad()
def test_states_of_all_layers_come_back_at_full_length():
    member = MEMBERS["llama4"]()
    model, inputs = member.build(), member.inputs([[5, 7]])
    with foveate.use(model, PyramidDrop((3,), 4)):
        output = model(**inputs, output_hidden_states=True)
    assert [states.shape[1] for states in output.hidden_states] == [28] * 7


OPEN, CLOSE, COLUMN, ROW, WHOLE = 80, 81, 82, 83, 84


def written(grids):
    """Ids as the processor writes them, and spans, of images with so many rows and columns."""
    ids, spans = [5], []

    def tile():
        spans.append((len(ids), len(ids) + 2))
        ids.extend([90, 90])

    for rows, columns in grids:
        ids.append(OPEN)
        for _ in range(rows):
            for column in range(columns):
                tile()
                ids.append(COLUMN if column < columns - 1 else ROW)
        ids.append(WHOLE)
        tile()
        ids.append(CLOSE)
    return ids, spans


@pytest.mark.parametrize(
    "grids", [[(0, 0)], [(2, 3), (0, 0), (1, 4)], [(3, 1), (1, 2)], [(2, 2), (0, 0), (0, 0)]],
    ids=str,
)  # fmt: skip
def test_separators_say_how_tiles_are_arranged(grids):
    """Also of images that follow one another without text."""
    member = MEMBERS["llama4"]()
    config = member.config()
    config.boi_token_index = OPEN
    family = find_family(member.kind.from_config(config))
    want = [Tiling(r * c + 1, (r, c) if r else None) for r, c in grids]
    assert family.tilings(*written(grids)) == want


@torch.no_grad()
def test_keys_of_layers_that_rotate_are_those_of_the_cache():
    """Pairs of neighbours are turned, and then normed; others are neither."""
    member = MEMBERS["llama4"]()
    model, inputs = member.build(), member.inputs([[5, 7]])
    given = oracle.Recorded(member, model, fresh(inputs))
    held = model(**fresh(inputs), use_cache=True).past_key_values.layers
    family = find_family(model)
    for number, layer in enumerate(family.layers):
        rotary = given.kwargs[number]["position_embeddings"] if family.rotates(number) else None
        view = view_of(layer, given.inputs[number], rotary)
        keys = held[number].keys
        torch.testing.assert_close(view.keys[:, :, -keys.shape[2] :], keys, rtol=0, atol=1e-6)
        closeness = view.closeness(torch.tensor([[3, 9]]))
        assert torch.allclose(closeness[0, [0, 1], [3, 9]], torch.ones(2))
        assert bool((closeness < 0.9).any()) == family.rotates(number)


@torch.no_grad()
def test_calibration_reads_the_states_that_the_head_reads():
    member = MEMBERS["llama4"]()
    model, inputs = member.build(), member.inputs([[5, 7], [4]])
    want = member.run(model, **fresh(inputs)).last_hidden_state[:, -1]
    torch.testing.assert_close(last_state(find_family(model), fresh(inputs)), want)
