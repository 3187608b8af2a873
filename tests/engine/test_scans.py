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
    """What a gated delta net makes of (T, D) tokens, (T, D), and its state (H, k, v) after them."""
    mixed = convolved(mixer.conv1d, mixer.in_proj_qkv(hidden), alive)
    query, key, value = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], -1)
    heads = mixer.num_v_heads
    query, key = (
        F.normalize(x.unflatten(-1, (-1, mixer.head_k_dim)), dim=-1, eps=1e-6).repeat_interleave(
            heads // mixer.num_k_heads, 1
        )
        for x in (query, key)
    )
    value = value.unflatten(-1, (heads, -1))
    fade = mixer.A_log.exp() * F.softplus(mixer.in_proj_a(hidden) + mixer.dt_bias)
    write = mixer.in_proj_b(hidden).sigmoid() * alive[:, None]
    if at_removed == CARRIES:
        fade = fade * alive[:, None]
    state, read = torch.zeros(heads, mixer.head_k_dim, mixer.head_v_dim), torch.zeros_like(value)
    for step in range(len(hidden)):
        state = state * (-fade[step])[:, None, None].exp()
        known = torch.einsum("hkv,hk->hv", state, key[step])
        change = (value[step] - known) * write[step][:, None]
        state = state + torch.einsum("hk,hv->hkv", key[step], change)
        read[step] = torch.einsum("hkv,hk->hv", state, query[step]) / mixer.head_k_dim**0.5
    gate = mixer.in_proj_z(hidden).view(-1, mixer.head_v_dim)
    made = mixer.norm(read.view(-1, mixer.head_v_dim), gate).view(len(hidden), -1)
    return mixer.out_proj(made), state


def mamba2(mixer, hidden, alive, at_removed=CARRIES):
    """What a Mamba-2 layer makes of (T, D) tokens, (T, D), and its state (H, p, n) after them."""
    parts = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    gate, mixed, time = mixer.in_proj(hidden).split(parts, -1)
    mixed, size = convolved(mixer.conv1d, mixed, alive), mixer.n_groups * mixer.ssm_state_size
    value, write, read = mixed.split([mixer.intermediate_size, size, size], -1)
    value = value.unflatten(-1, (mixer.num_heads, -1))
    write, read = (
        x.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(
            mixer.num_heads // mixer.n_groups, 1
        )
        for x in (write, read)
    )
    time = F.softplus(time + mixer.dt_bias).clamp(min=mixer.time_step_limit[0])
    fade = time * mixer.A_log.exp()
    if at_removed == CARRIES:
        fade = fade * alive[:, None]
    state = torch.zeros(mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
    made = torch.zeros_like(value)
    for step in range(len(hidden)):
        given = torch.einsum("hp,hn->hpn", value[step], write[step]) * time[step][:, None, None]
        state = state * (-fade[step])[:, None, None].exp() + given * alive[step]
        seen = torch.einsum("hpn,hn->hp", state, read[step])
        made[step] = seen + mixer.D[:, None] * value[step]
    return mixer.out_proj(mixer.norm(made.flatten(1), gate)), state


SCANS = {"qwen3_5": delta_net, "nemotron_h_omni": mamba2}


def watched(model, family):
    """What recurrent layers are given and what they make of it, by layer, once the model has run;
    and what undoes it.
    """
    seen, handles = {}, []
    for number in family.recurrent_layers:

        def look(module, args, kwargs, output, number=number):
            given = (args[0] if args else kwargs["hidden_states"])[0].clone()
            made = output[0] if isinstance(output, tuple) else output
            seen[number] = given, made.reshape(given.shape).clone()

        mixer = mixer_of(family.layers[number])
        handles.append(mixer.register_forward_hook(look, with_kwargs=True))
    return seen, handles


@pytest.mark.parametrize("name", SCANS)
@torch.no_grad()
def test_layers_are_a_scan_over_all_places_which_carries_its_state(name):
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
        (given, made), size = seen[number], float(state.abs().max())
        hidden, mixer = whole[number][0].clone(), mixer_of(family.layers[number])
        assert len(given) == there.sum()
        hidden[there] = given
        want, end = SCANS[name](mixer, hidden, there)
        torch.testing.assert_close(state, end, rtol=0, atol=1e-4 * size)
        torch.testing.assert_close(made, want[there], rtol=0, atol=2e-5 * float(made.abs().max()))
        if number in later:
            for other in (
                SCANS[name](mixer, hidden, there, FADES),
                SCANS[name](mixer, hidden, torch.ones_like(alive)),
            ):
                assert (state - other[1]).abs().max() > 1e-2 * size, "the test does not bite"
                off = (made - other[0][there]).abs().max()
                assert off > 3e-4 * float(made.abs().max()), "the test does not bite"


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
