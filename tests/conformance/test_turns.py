"""What goes on from a pruned cache, in every family: a second turn, and beams that change rows."""

import pytest
import torch

import foveate
from tests.conformance import oracle
from tests.conformance.test_families import case, model_of
from tests.conformance.tolerance import tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.oracle import Spec

STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.mark.parametrize("kind", ["pyramiddrop", "pre_llm"])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_second_turn_equals_the_oracle(name, kind):
    """Several text tokens at once after pruned layers, and answers after them."""
    member, model = MEMBERS[name](), model_of(name)
    first = member.inputs([[5, 7]])
    method, spec = case(name, kind, 1)
    question = torch.tensor([[11, 12, 13, 14, 15]])
    states = []
    with torch.no_grad(), foveate.use(model, method):
        answer = model.generate(**fresh(first), **STEPS, return_dict_in_generate=True)
        said = answer.sequences[:, first["input_ids"].shape[1] :]
        second = member.continued(fresh(first), torch.cat((said, question), 1))
        second.pop("mm_encoder_outputs", None)
        head = member.head(model)
        hook = head.register_forward_pre_hook(lambda m, args: states.append(args[0]))
        out = model.generate(**second, **STEPS, past_key_values=answer.past_key_values)
        hook.remove()
    prompt, length = first["input_ids"].shape[1], second["input_ids"].shape[1]
    whole = member.continued(fresh(first), out[:, prompt:-1])
    eager = model_of(name, "eager")
    want, _ = oracle.run(member, eager, fresh(whole), spec, prompt)
    plain, _ = oracle.run(member, eager, fresh(whole), Spec(), prompt)
    got = torch.cat([state[0, -1:] for state in states])
    distance = (want[length - 1 :] - got).abs().max().item()
    bite = (plain[length - 1 :] - got).abs().max().item()
    print(f"{name} {kind}: distance {distance:.1e}, bite {bite:.2f}")
    assert distance <= tolerance_of(name, model)
    assert bite > 0.02, "the test does not bite"


def scored(member, model, states, inputs):
    """Logits that the model's own head makes of (T, D) last hidden states."""

    def replace(module, args, output):
        output.last_hidden_state = states[None]
        return output

    hook = member.below_head(model).register_forward_hook(replace)
    logits = model(**fresh(inputs), use_cache=False).logits[0]
    hook.remove()
    return logits


@pytest.mark.parametrize("kind", ["pyramiddrop", "pre_llm"])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_scores_of_beams_equal_the_oracle(name, kind):
    """A row with an image, one of text, and a longer one: each best beam's sum of log-probs."""
    member, model, eager = MEMBERS[name](), model_of(name), model_of(name, "eager")
    rows = [[5, 7], [4], [2, 12]]
    inputs = member.inputs(rows)
    method, _ = case(name, kind, 1)
    with torch.no_grad(), foveate.use(model, method):
        out = model.generate(
            **fresh(inputs), max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False,
            output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
        )  # fmt: skip
    for row, pieces in enumerate(rows):
        alone = member.row(inputs, row)
        prompt = alone["input_ids"].shape[1]
        said = out.sequences[row : row + 1, inputs["input_ids"].shape[1] :]
        whole = member.continued(alone, said)
        _, spec = case(name, kind, len(pieces) - 1)
        with torch.no_grad():
            states, _ = oracle.run(member, eager, fresh(whole), spec, prompt)
            logits = scored(member, model, states, whole)[prompt - 1 : -1].log_softmax(-1)
        want = logits.gather(1, said[0, :, None]).sum()
        torch.testing.assert_close(
            out.sequences_scores[row], want, rtol=0, atol=tolerance_of(name, model)
        )
