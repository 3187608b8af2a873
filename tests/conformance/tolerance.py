"""How far states may be from an oracle.

Layers with a running state compute a prompt in chunks and a new token step by step, which differ in
rounding; other padding makes other chunks. There, twice the distance between the two is allowed, as
the bare model itself shows it in some prompts. What kernels of attention differ in grows in the
state as well: there, sessions meet the oracle with its own kernel. (In double precision all
distances are below 1e-12.)
"""

import functools

import torch

from foveate.families import find_family
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh

TOLERANCE = 5e-5
ROWS = [[5, 7], [4], [2, 3, 9]]
STEPS = 8
SEEDS = range(3)


@functools.cache
def tolerance_of(name, model):
    """The bound for a zoo member's model."""
    if not amplifies(model):
        return TOLERANCE
    return max(TOLERANCE, 2 * max(own_distance(MEMBERS[name](), model, seed) for seed in SEEDS))


def own_distance(member, model, seed):
    """Distance of the states of generated tokens to those of the same tokens at once."""
    inputs, own = member.inputs(ROWS, seed), 0.0
    states, out = states_of(member, model, inputs, STEPS + 1)
    for row in range(len(ROWS)):
        more = out[row : row + 1, inputs["input_ids"].shape[1] : -1]
        whole = member.continued(member.row(inputs, row), more)
        with torch.no_grad():
            want = member.run(model, **whole).last_hidden_state[0, -STEPS - 1 :]
        own = max(own, (want - states[row]).abs().max().item())
    return own


def kernel_of(model):
    """The attention kernel with which a session on a model meets the oracle, which is eager."""
    return "eager" if amplifies(model) else "sdpa"


def amplifies(model):
    """Whether rounding grows within a model."""
    return bool(find_family(model).recurrent_layers)


def states_of(member, model, inputs, tokens):
    """(B, tokens, D) last states of a prompt and of the tokens generated after it, and these."""
    states = []
    head = member.head(model)
    handle = head.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    try:
        out = model.generate(
            **fresh(inputs), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    finally:
        handle.remove()
    return torch.cat([state[:, -1:] for state in states], 1), out
