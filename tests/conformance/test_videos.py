"""Methods over frames of videos, on models that read videos, from pixels."""

import pytest
import torch

import foveate
from foveate.methods.dycoke import DyCoke
from foveate.methods.holitom import HoliTom
from foveate.methods.holitom_inner import HoliTomInner
from foveate.methods.prunevid import PruneVid
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.tolerance import TOLERANCE
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh

READERS = ["llava_next_video-video", "llava_onevision-video", "video_llava-video"]
GENERATE = {
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
readers = pytest.mark.parametrize("name", READERS)


def inputs_of(name, rows=(1,)):
    return batch_of(MEMBERS[name](), model_of(name), rows)


def generate(name, method, inputs):
    model = model_of(name)
    with foveate.use(model, method) as run:
        return model.generate(**fresh(inputs), **GENERATE), run


def test_all_readers_of_videos_are_here():
    assert [n for n in sorted(MEMBERS) if MEMBERS[n]().modality == "video"] == READERS


@readers
def test_dycoke_looks_away_while_decoding_only(name):
    """The prompt is read alike; every token after it sees less, also in a ragged batch."""
    inputs, alone = inputs_of(name, (2, 0, 1))
    method = DyCoke(p=0.9, layer=1)
    got, _ = generate(name, method, inputs)
    want, _ = generate(name, DyCoke(p=0.0), inputs)
    rows = [0, 2]  # with videos
    assert torch.equal(got.logits[0], want.logits[0])
    assert torch.equal(got.logits[1][1], want.logits[1][1])
    assert (got.logits[1] - want.logits[1])[rows].abs().amax(-1).min() > 0.01
    for layer, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert layer.keys.shape == other.keys.shape
    for row, one in enumerate(alone):
        single, _ = generate(name, method, one)
        for step, logits in enumerate(single.logits):
            torch.testing.assert_close(got.logits[step][row], logits[0], rtol=0, atol=TOLERANCE)


@readers
def test_prunevid_is_cut_in_all_layers(name):
    """Merging may find nothing alike in so short a video; the cut always bites."""
    inputs, _ = inputs_of(name)
    out, run = generate(name, PruneVid(), inputs)
    (image,) = run.kept
    first, last = image.values()
    assert 0 <= len(last) < len(first)
    length = inputs["input_ids"].shape[1] - run.record.images[0].total + len(last) + 4
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {length}


@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_holitom_outside_and_inside(positions):
    """Both parts in one session, where the encoder tells what it attends to."""
    name = "llava_next_video-video"
    inputs, _ = inputs_of(name)
    methods = [HoliTom(keep=0.6, positions=positions), HoliTomInner(layers=(2,), keep=0.5)]
    out, run = generate(name, methods, inputs)
    (image,) = run.kept
    outer, inner = image["pre_llm"], image["llm:2"]
    assert len(outer) < run.record.images[0].total
    assert len(inner) == round(len(outer) * 0.5)
    assert set(inner.tolist()) <= set(outer.tolist())
    assert torch.stack(out.logits).isfinite().all()
