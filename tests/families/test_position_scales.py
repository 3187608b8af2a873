"""Ministral 3 scales queries by their position ids: where they rank, and where renumbered."""

import functools

import pytest
import torch
from transformers import Ministral3Config

import foveate
from foveate.methods import FastV, PyramidDrop
from tests.conformance import oracle
from tests.conformance.tolerance import TOLERANCE, states_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.llava import TEXT
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 32.0,
    "beta_slow": 1.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.7,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
THIRD = torch.arange(0, 16, 3)
CASES = {
    "fastv": (FastV(2, 4), Spec(drops=[Drop(2, 1, [4])])),
    "fastv, renumbered": (
        FastV(2, 4, positions="renumbered"),
        Spec(drops=[Drop(2, 1, [4], True)]),
    ),
    "pyramiddrop": (PyramidDrop((1,), 8, "original"), Spec(drops=[Drop(1, 1, [8])])),
    "pre_llm": (EveryThird(6), Spec(kept=[THIRD])),
    "pre_llm, renumbered": (EveryThird(6, "renumbered"), Spec(kept=[THIRD], renumber=True)),
}


class Ministral3(MEMBERS["mistral3"]):
    """The scale grows with every eight positions."""

    def config(self):
        made = super().config()
        made.text_config = Ministral3Config(**TEXT, head_dim=16, rope_parameters=ROPE)
        return made


@functools.cache
def model_of(attention):
    return Ministral3().build(attention)


@pytest.mark.parametrize("rows", [[[5, 7]], [[5, 7], [4]]], ids=["one", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decoding_equal_the_oracle(case, rows):
    member, (method, spec) = Ministral3(), CASES[case]
    inputs = member.inputs(rows)
    with foveate.use(model_of("sdpa"), method) as run:
        states, out = states_of(member, model_of("sdpa"), inputs, 9)
    alone = member.row(inputs, 0)
    prompt = alone["input_ids"].shape[1]
    more = out[:1, inputs["input_ids"].shape[1] : -1]
    eager, whole = model_of("eager"), member.continued(alone, more)
    want, history = oracle.run(member, eager, whole, spec, prompt)
    plain, _ = oracle.run(member, eager, member.continued(alone, more), Spec(), prompt)
    assert torch.equal(list(run.kept[0].values())[-1], history[-1][0])
    torch.testing.assert_close(states[0], want[prompt - 1 :], rtol=0, atol=TOLERANCE)
    assert (states[0] - plain[prompt - 1 :]).abs().max() > 0.1
