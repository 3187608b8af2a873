"""Audio beside images: it stays in the prompt as it is, and images are shortened as without it."""

import pytest
import torch

import foveate
from foveate.methods import PyramidDrop
from tests.conformance import oracle
from tests.conformance.test_pixels import TOLERANCE, model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.omni import END, START
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

NAMES = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
CASES = {
    "pre_llm": (EveryThird(4), Spec(kept=[torch.arange(0, 12, 3)])),
    "llm": (PyramidDrop((3,), 4, "original"), Spec(drops=[Drop(3, 3, [4])])),
    "nothing": (EveryThird(1.0), Spec()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_audio_beside_an_image_equals_the_oracle(name, case):
    member, model, (method, spec) = MEMBERS[name](), model_of(name), CASES[case]
    sound, heard = member.audio()
    pixels = member.pixels(1)
    (count,) = member.counts(model, pixels)
    ids = [5, 7, *heard, 11, START, *[member.image_id] * count, END, 20, 31, 8]
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **sound, **pixels}
    with torch.no_grad():
        plain = model.model(**fresh(inputs)).last_hidden_state[0, -1]
        with foveate.use(model, method) as run:
            got = model.model(**fresh(inputs)).last_hidden_state[0, -1]
            left = run.record.layer_tokens[-1]
            out = model.generate(**fresh(inputs), max_new_tokens=3, do_sample=False)
    want, _ = oracle.run(
        member, model_of(name, "eager"), fresh(inputs), spec, ids.shape[1], [count]
    )
    torch.testing.assert_close(got, want[-1], rtol=0, atol=TOLERANCE)
    assert torch.equal(got, plain) == (case == "nothing")
    assert left == [ids.shape[1] - (0 if case == "nothing" else count - 4)]
    assert out.shape[1] == ids.shape[1] + 3
