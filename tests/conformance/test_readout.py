"""On every family the image that ends a prompt keeps its last token, at every stage."""

import pytest
import torch

import foveate
from foveate.methods import FastV, ToMe
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird, Listed

INSIDE = (Listed(layer=1, keep=0.4), ToMe(keep=0.7))
METHODS = (*INSIDE, EveryThird(keep=0.4), FastV(2, keep=3))
SEEING = [name for name in sorted(MEMBERS) if MEMBERS[name]().pixels(1) is not None]
MIXING = {name for name, member in MEMBERS.items() if member.closed or member.mixes}
MIXING |= {  # patches within the encoder, or several of them into one token after it
    "llava_onevision", "llava_onevision-video", "molmo2", "molmo2-o", "perception_lm",
    "video_llava-video",
}  # fmt: skip
CELLS = [(n, m) for n in SEEING for m in METHODS if n not in MIXING or m not in INSIDE]


@pytest.mark.parametrize(("name", "method"), CELLS, ids=lambda it: getattr(it, "slug", it))
@torch.no_grad()
def test_the_last_token_of_the_last_image_stays(name, method):
    member, model = MEMBERS[name](), model_of(name)
    pixels = member.pixels(2)
    first, second = member.counts(model, pixels)
    ids = torch.tensor([[7, 8, *[member.image_id] * first, 11, *[member.image_id] * second]])
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **member.extras(ids, 2)}
    row |= member.batch(pixels, [2])
    with foveate.use(model, method) as session:
        member.run(model, **fresh(row))
        kept = session.kept[-1]
        model.generate(**fresh(row), max_new_tokens=2, min_new_tokens=2, do_sample=False)
        again = session.kept[-1]
    assert all(int(index[-1]) == second - 1 for index in kept.values())
    assert all(torch.equal(index, kept[place]) for place, index in again.items())
