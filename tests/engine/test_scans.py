"""Layers with a running state carry it over removed tokens, as an aligned scan does.

Zhan et al., "Exploring Token Pruning in Vision State Space Models" (ToP-ViM), arXiv:2409.18962: a
scan keeps one step for each place, and at that of a pruned token the state of the step before is
carried over. Scans here are such, one step after another, over all places of the prompt. We could
not verify whether theirs fades at such a step; here it does not.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foveate
from foveate.families import find_family
from foveate.families.decoder_layer import mixer_of
from foveate.methods import FastV
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh

FADES, CARRIES = "fades", "carries"


def convolved(conv, mixed, alive):
    """(T, C) short convolution over the tokens that are there; zeros elsewhere."""
    there = mixed[alive].T[None]
    made = F.silu(conv(there)[..., : there.shape[-1]])[0].T
    return torch.zeros_like(mixed).masked_scatter(alive[:, None], made)


def delta_net(mixer, hidden, alive, at_removed=CARRIES):
    """(H, k, v) the state of a gated delta net after (T, D) tokens."""
    mixed = convolved(mixer.conv1d, mixer.in_proj_qkv(hidden), alive)
    _, key, value = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], -1)
    heads = mixer.num_v_heads
    key = F.normalize(key.unflatten(-1, (-1, mixer.head_k_dim)), dim=-1, eps=1e-6)
    key = key.repeat_interleave(heads // mixer.num_k_heads, 1)
    value = value.unflatten(-1, (heads, -1))
    fade = mixer.A_log.exp() * F.softplus(mixer.in_proj_a(hidden) + mixer.dt_bias)
    write = mixer.in_proj_b(hidden).sigmoid() * alive[:, None]
    if at_removed == CARRIES:
        fade = fade * alive[:, None]
    state = torch.zeros(heads, mixer.head_k_dim, mixer.head_v_dim)
    for step in range(len(hidden)):
        state = state * (-fade[step])[:, None, None].exp()
        known = torch.einsum("hkv,hk->hv", state, key[step])
        change = (value[step] - known) * write[step][:, None]
        state = state + torch.einsum("hk,hv->hkv", key[step], change)
    return state


def mamba2(mixer, hidden, alive, at_removed=CARRIES):
    """(H, p, n) the state of a Mamba-2 layer after (T, D) tokens."""
    parts = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    _, mixed, time = mixer.in_proj(hidden).split(parts, -1)
    mixed, size = convolved(mixer.conv1d, mixed, alive), mixer.n_groups * mixer.ssm_state_size
    value, write, _ = mixed.split([mixer.intermediate_size, size, size], -1)
    value = value.unflatten(-1, (mixer.num_heads, -1))
    write = write.unflatten(-1, (mixer.n_groups, -1))
    write = write.repeat_interleave(mixer.num_heads // mixer.n_groups, 1)
    time = F.softplus(time + mixer.dt_bias).clamp(min=mixer.time_step_limit[0])
    fade = time * mixer.A_log.exp()
    if at_removed == CARRIES:
        fade = fade * alive[:, None]
    state = torch.zeros(mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
    for step in range(len(hidden)):
        given = torch.einsum("hp,hn->hpn", value[step], write[step]) * time[step][:, None, None]
        state = state * (-fade[step])[:, None, None].exp() + given * alive[step]
    return state


SCANS = {"qwen3_5": delta_net, "nemotron_h_omni": mamba2}


def watched(model, family):
    """What the recurrent layers are given, by layer, once the model has run; and what undoes it."""
    seen, handles = {}, []
    for number in family.recurrent_layers:

        def look(module, args, kwargs, number=number):
            seen[number] = (args[0] if args else kwargs["hidden_states"])[0].clone()

        mixer = mixer_of(family.layers[number])
        handles.append(mixer.register_forward_pre_hook(look, with_kwargs=True))
    return seen, handles


@pytest.mark.parametrize("name", SCANS)
@torch.no_grad()
def test_the_state_is_that_of_a_scan_over_all_places_which_carries_it(name):
    """Whatever a removed token held: here, what it has in a run without a method."""
    member = MEMBERS[name]()
    model, inputs = member.build(), member.inputs([[5, 2]])
    family = find_family(model)
    for number in family.recurrent_layers:
        mixer_of(family.layers[number]).A_log.fill_(-2)  # or they forget the image in a few tokens
    seen, handles = watched(model, family)
    try:
        model(**fresh(inputs))
        whole = dict(seen)
        with foveate.use(model, FastV(layer=2, keep=6)) as run:
            cache = model(**fresh(inputs), use_cache=True).past_key_values
            states = {n: cache.layers[n].recurrent_states[0][0].clone() for n in seen}
            kept = [next(iter(image.values())) for image in run.kept]
    finally:
        for handle in handles:
            handle.remove()
    (columns,) = (inputs["input_ids"] == member.image_id).nonzero()[:, 1].split(member.visual)
    alive = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    alive[columns] = False
    alive[columns[kept[0]]] = True
    assert (~alive).sum() == member.visual - 6
    later = [number for number in seen if number >= 2]
    assert later
    for number, state in states.items():
        there = alive if number >= 2 else torch.ones_like(alive)
        size = float(state.abs().max())
        hidden, mixer = whole[number].clone(), mixer_of(family.layers[number])
        assert len(seen[number]) == there.sum()
        hidden[there] = seen[number]
        want = SCANS[name](mixer, hidden, there)
        torch.testing.assert_close(state, want, rtol=0, atol=1e-4 * size)
        if number in later:
            for other in (
                SCANS[name](mixer, hidden, there, FADES),
                SCANS[name](mixer, hidden, torch.ones_like(alive)),
            ):
                assert (state - other).abs().max() > 1e-2 * size, "the test does not bite"


class Scan(nn.Module):
    """A selective scan of (T, E) tokens in one direction."""

    def __init__(self, width, state=4):
        super().__init__()
        self.time, self.parts = nn.Linear(width, width), nn.Linear(width, 2 * state)
        self.rates = nn.Parameter(torch.rand(width, state) + 0.5)

    def forward(self, x, alive):
        time = F.softplus(self.time(x))
        write, read = self.parts(x).chunk(2, -1)
        state, made = torch.zeros_like(self.rates), torch.zeros_like(x)
        for step in alive.nonzero()[:, 0]:  # elsewhere the state is carried, and nothing is made
            state = state * (-time[step][:, None] * self.rates).exp()
            state = state + (time[step] * x[step])[:, None] * write[step]
            made[step] = state @ read[step]
        return made


@torch.no_grad()
def test_both_scans_of_a_vision_layer_are_those_of_the_tokens_that_are_left():
    """Scores are sums of what a scan makes, negative parts left out; those of the way back are
    turned around (the released code leaves them in reverse, and so keeps mirrored places).
    """
    torch.manual_seed(0)
    x, forth, back = torch.randn(17, 6), Scan(6), Scan(6)
    every = torch.ones(17, dtype=torch.bool)
    scores = back(x.flip(0), every).flip(0).clamp(min=0).sum(-1)
    kept = scores.topk(9).indices.sort().values
    alive = torch.zeros(17, dtype=torch.bool).index_fill(0, kept, True)
    other = torch.where(alive[:, None], x, torch.randn(17, 6))
    aligned = forth(other, alive) + back(other.flip(0), alive.flip(0)).flip(0)
    short, there = x[kept], torch.ones(9, dtype=torch.bool)
    want = forth(short, there) + back(short.flip(0), there).flip(0)
    torch.testing.assert_close(aligned[kept], want)
    assert (aligned[~alive] == 0).all()
    mirrored = back(x.flip(0), every).clamp(min=0).sum(-1).topk(9).indices.sort().values
    assert torch.equal(mirrored, (16 - kept).flip(0))
    assert not torch.equal(mirrored, kept)
