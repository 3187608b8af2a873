"""Nemotron-H Omni: videos at placeholders of images, and layers of one module each."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.core.tokens import Shape
from foveate.engine.cache_argument import CACHE
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.methods import FastV, PyramidDrop
from foveate.signals.latent_view import view_of
from tests.conformance import oracle
from tests.conformance.tolerance import tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

NAME = "nemotron_h_omni"


@pytest.fixture(scope="module")
def model():
    return MEMBERS[NAME]().build()


def clip(member, width, listed=True):
    """A prompt with two pairs of frames of 12 tokens each, text before each, and their features."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 12, width, generator=generator)
    ids = [5, 6, *[member.image_id] * 12, 7, 8, *[member.image_id] * 12, 9, 10, 11]
    pooled = list(features) if listed else features
    ids = torch.tensor([ids])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"video": BaseModelOutputWithPooling(pooler_output=pooled)},
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pre_llm", "fastv"])
def test_frames_of_a_video_equal_the_oracle(model, kind):
    """As the model takes features of videos that are handed in: one for each pair of frames."""
    member = MEMBERS[NAME]()
    inputs = clip(member, 64)
    method, spec = EveryThird(4), Spec(kept=[torch.arange(0, 12, 3)] * 2)
    if kind == "fastv":
        method, spec = FastV(2, 3), Spec(drops=[Drop(2, 1, [3, 3])])
    with foveate.use(model, method) as run:
        got = member.run(model, **fresh(inputs)).last_hidden_state[0, -3:]
        kept = [list(image.values()) for image in run.kept]
    length = inputs["input_ids"].shape[1]
    eager = member.build("eager")
    want, history = oracle.run(member, eager, fresh(inputs), spec, length, [12, 12])
    assert len(kept) == 2
    for image, places in enumerate(kept):
        for place, index in zip(places, history, strict=True):
            assert torch.equal(place, index[image])
    assert (want[-3:] - got).abs().max() <= tolerance_of(NAME, model)


@torch.no_grad()
def test_a_tower_sees_pairs_of_frames_in_their_grid(model):
    frames = torch.randn(3, 3, 16, 24)  # of 4 x 6 patches; the third makes a pair with itself
    with foveate.use(model, EveryThird(2)):
        output = model.get_video_features(frames)
    each = [Shape(6, (2, 3))] * 2 if CACHE == "past_key_values" else [Shape(12, (2, 3), 2)]
    assert output.encoded.shapes == each  # from transformers 5.24 on, a video is one
    assert [int((~rows[:, 0].isnan()).sum()) for rows in output.pooler_output] == [2] * len(each)


@torch.no_grad()
def test_a_model_that_prunes_videos_itself_is_refused_with_videos():
    member = MEMBERS[NAME]()
    model, inputs = member.build(), member.inputs([[5, 7]])
    model.video_pruning_rate = 0.5
    with foveate.use(model, EveryThird(4)):
        model(**inputs)
        with pytest.raises(InputError, match=r"video_pruning_rate is 0\.5"):
            model(**clip(member, 64))
        with pytest.raises(InputError, match=r"video_pruning_rate is 0\.5"):
            model.get_video_features(torch.randn(2, 3, 16, 24))


@torch.no_grad()
def test_views_of_layers_are_what_the_cache_holds(model):
    member = MEMBERS[NAME]()
    inputs = member.inputs([[5, 7]])
    given = oracle.Recorded(member, model, fresh(inputs))
    held = model(**fresh(inputs), use_cache=True).past_key_values.layers
    for number in find_family(model).keyed_layers:
        view = view_of(find_family(model).layers[number], given.inputs[number], None)
        torch.testing.assert_close(view.keys, held[number].keys, rtol=0, atol=1e-6)
        torch.testing.assert_close(view.values, held[number].values, rtol=0, atol=1e-6)


def test_layers_are_told_apart(model):
    family = find_family(model)
    assert family.attention_layers == family.keyed_layers == (1, 4)
    assert family.recurrent_layers == {0, 3}
    assert family.keyless_layers == {0, 2, 3, 5}
    with pytest.raises(foveate.FoveateError, match="layer 2, which mixes no tokens"):
        foveate.use(model, FastV(3))
    with pytest.raises(foveate.FoveateError, match="layer 3, which keeps a running state"):
        foveate.use(model, FastV(4))
    with pytest.raises(UnsupportedModelError, match="are one or the other"):
        foveate.use(model, "transprune")


@torch.no_grad()
def test_padding_does_not_come_between_a_state_and_new_images(model):
    """Rows that keep different numbers of tokens after a cache are refused."""
    member = MEMBERS[NAME]()
    first, second = member.inputs([[4, 6], [4, 6]]), member.inputs([[2, 3, 9], [5, 25]])
    with foveate.use(model, PyramidDrop((1,), 4)):
        cache = model(**first, use_cache=True).past_key_values
        with pytest.raises(InputError, match="recurrent layers"):
            model(**{**second, "attention_mask": None}, past_key_values=cache)
