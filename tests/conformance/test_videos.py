"""Methods over frames of videos, on models that read videos, from pixels."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import foveate
from foveate.core import Need
from foveate.families import find_family
from foveate.methods.dycoke import DyCoke
from foveate.methods.holitom import HoliTom
from foveate.methods.holitom_inner import HoliTomInner
from foveate.methods.prunevid import PruneVid
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.tolerance import TOLERANCE
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird

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


class Reads(EveryThird):
    """Notes the attention that tokens receive in encoder layer 1."""

    seen: ClassVar[list] = []

    def steps(self, model):
        need = Need("received_attention", (1,))
        return tuple(replace(step, needs=(need,)) for step in super().steps(model))

    def reduce(self, tokens, count):
        self.seen.append(tokens.signal("received_attention")[:, 0])
        return super().reduce(tokens, count)


@torch.no_grad()
def test_signals_of_onevisions_frames_are_interpolated_as_they_are(monkeypatch):
    """A token of 2 x 2 patches has their mean; the newline after the frames has none."""
    name = "llava_onevision-video"
    inputs, _ = inputs_of(name)
    model, maps = model_of(name), []
    tower = model.model.vision_tower
    attention = tower.encoder.layers[1].self_attn
    hook = attention.register_forward_hook(lambda module, args, out: maps.append(out[1].mean(1)))
    pixels = {n: v for n, v in inputs.items() if n.startswith("pixel")}
    with monkeypatch.context() as patch:
        patch.setattr(tower.config, "_attn_implementation", "eager")
        model.model.get_video_features(**fresh(pixels))
    hook.remove()
    with foveate.use(model, Reads(4)):
        model.model(**fresh(inputs))
    (shown,) = Reads.seen.pop()
    received = maps[0].mean(1)  # (3, 16): over queries
    want = received.view(3, 2, 2, 2, 2).mean((2, 4)).flatten()
    torch.testing.assert_close(shown[:-1], want, rtol=0, atol=1e-7)
    assert shown[-1] == -torch.inf


def test_signals_of_frames_with_an_odd_side_are_interpolated_too(monkeypatch):
    """As with 27 patches to 14: a token lies between patches, and has their weighted mean."""
    model = model_of("llava_onevision-video")
    family, vision = find_family(model), model.config.vision_config
    monkeypatch.setattr(vision, "image_size", 5 * vision.patch_size)
    rows = torch.rand(2, 1, 25, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values_videos": torch.zeros(1, 2, 3, 1, 1)}
    (got,) = family.per_token("video", rows, given, -1.0)
    weights = torch.zeros(3, 5)
    for token in range(3):
        place = (token + 0.5) * 5 / 3 - 0.5
        low = int(place)
        weights[token, low : low + 2] += torch.tensor([low + 1 - place, place - low])
    want = torch.einsum("ai,bj,nij->nab", weights, weights, rows.view(2, 5, 5)).flatten()
    torch.testing.assert_close(got[0, :-1], want)
    assert got[0, -1] == -1.0
