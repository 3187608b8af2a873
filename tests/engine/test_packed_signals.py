"""Signals of encoders whose images lie in one sequence equal those of whole attention maps."""

import sys
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch

import foveate
from foveate.core import Keep, Need, Scorer, Step
from foveate.engine.inputs import bound
from foveate.families import find_family
from foveate.signals.packed import by_segments, received_sums
from tests.conformance.zoo.member import MEMBERS, fresh

NAMES = (
    "received_attention", "given_attention", "global_attention", "encoder_keys", "encoder_features",
)  # fmt: skip
ABOVE = 1.0
FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm_ocr", "kimi_k25", "paddleocr_vl",
    "mistral3", "qwen2_5_omni_thinker", "cosmos3_edge", "exaone4_5", "video_llama_3",
    "ernie4_5_vl_moe", "minicpm_ocr", "minicpmv4_6",
    "dots3_note", "minimax_m3_vl", "muse_glimmer",
)  # fmt: skip


@dataclass(frozen=True)
class Spy(Scorer):
    """Keeps the first tokens, and notes what it is shown."""

    keep: Keep = 0.5
    positions: str | None = None
    seen: list = field(default_factory=list)
    slug, stage, needs, paper = "spy", "pre_llm", (), ""

    def steps(self, model):
        layers = tuple(range(model.vision_layers))
        return (Step("pre_llm", needs=tuple(Need(name, layers, ABOVE) for name in NAMES)),)

    def scores(self, tokens):
        self.seen.append(tokens)
        return -tokens.index.float()


def two_dimensional(states):
    return states[0] if states.dim() == 3 else states


def whole_map(attention, hidden, told, lengths):
    """(N, N) attention of a layer, mean over heads, from (N, D) normed states; (N, D) keys; and (N)
    the segment of each row.
    """
    heads = attention.num_heads
    if hasattr(attention, "qkv"):
        groups = attention.num_key_value_groups
        made = attention.qkv(hidden).unflatten(-1, (heads + 2 * heads // groups, -1))
        query, key = made[:, :heads].flatten(1), made[:, heads : heads + heads // groups]
        key = key[:, torch.arange(heads) // groups].flatten(1)
    else:
        names = ("q", "k") if hasattr(attention, "q") else ("q_proj", "k_proj")
        query, key = (getattr(attention, name)(hidden) for name in names)
    q, k = (part.unflatten(-1, (heads, -1)) for part in (query, key))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    key = k.flatten(1)
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    module = sys.modules[type(attention).__module__]
    if "position_embeddings" in told:
        cos, sin = (two_dimensional(part) for part in told["position_embeddings"])
        width = cos.shape[-1]  # less than a head in some
        q, k = (
            torch.cat((x * cos + module.rotate_half(x) * sin, plain), -1)
            for x, plain in (part.tensor_split([width], -1) for part in (q, k))
        )
    bounds = told["cu_seqlens"].diff().tolist() if "cu_seqlens" in told else lengths
    segment = torch.repeat_interleave(torch.arange(len(bounds)), torch.tensor(bounds))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    logits = logits.masked_fill(segment[:, None] != segment, -torch.inf)
    return logits.softmax(-1).mean(0), key, segment


def from_global(attention, segment):
    """(N) attention that rows receive from those rows of their segment that receive more of it than
    `ABOVE` times its mean, by a loop.
    """
    found = torch.zeros(len(attention))
    for number in segment.unique():
        rows = (segment == number).nonzero()[:, 0]
        own = attention[rows][:, rows]
        votes = own.sum(0) > ABOVE * own.sum(0).mean()
        assert 0 < votes.sum() < len(rows), "the test does not bite"
        found[rows] = own[votes].mean(0)
    return found


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_signals_are_those_of_whole_maps(name):
    member = MEMBERS[name]()
    model = member.build()
    encoder = find_family(model).encoder
    entered, left, spy = {}, {}, Spy()

    def enter(number):
        return lambda module, args, kwargs: entered.update(
            {number: (two_dimensional(args[0] if args else kwargs["hidden_states"]), kwargs)}
        )

    def leave(number):
        return lambda module, args, output: left.update(
            {number: two_dimensional(output if isinstance(output, torch.Tensor) else output[0])}
        )

    told = {}
    handles = [
        encoder.tower.register_forward_pre_hook(
            lambda module, args, kwargs: told.update(bound(module.forward, args, kwargs)),
            with_kwargs=True,
        )
    ]
    for number, layer in enumerate(encoder.layers):
        attention = encoder.attention(layer)
        handles.append(attention.register_forward_pre_hook(enter(number), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave(number)))
    with foveate.use(model, spy):
        model.model.get_image_features(**fresh(member.pixels(3)), return_dict=True)
    for handle in handles:
        handle.remove()
    made = told, find_family(model).side("image")
    pictures = encoder.packed(*made)
    by_layer = [pictures] * len(encoder.layers)
    if encoder.later is not None:
        first, later = encoder.later
        by_layer[first:] = [later(*made)] * (len(by_layer) - first)
    lengths = [picture.rows.numel() for picture in pictures]
    assert sum(tokens.index.shape[0] for tokens in spy.seen) == 3
    for tokens in spy.seen:
        for i, image in enumerate(images_of(tokens, pictures)):
            for number in range(len(encoder.layers)):
                picture = by_layer[number][image]
                attention, key, segment = whole_map(
                    encoder.attention(encoder.layers[number]), *entered[number], lengths
                )
                received = attention.sum(0)[picture.rows].mean(1) / picture.rows.numel()
                close(tokens.signal("received_attention")[i, number], received)
                close(
                    tokens.signal("global_attention")[i, number],
                    from_global(attention, segment)[picture.rows].mean(1),
                )
                close(tokens.signal("given_attention")[i, number], torch.ones_like(received))
                keys = tokens.signal("encoder_keys")[i, number].transpose(0, 1).flatten(1)
                close(keys, key[picture.rows].mean(1))
                states = tokens.signal("encoder_features")[i, number]
                close(states, left[number][picture.rows].mean(1))


def images_of(tokens, pictures):
    """Numbers of the images of a group: those of its size, in order of appearance."""
    total = tokens.index.shape[1]
    return [n for n, p in enumerate(pictures) if len(p.rows) == total and p.grid == tokens.grid]


def close(got, want):
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", [[0, 5, 5, 12, 17], [0, 17], [0, 5, 10, 15, 17]])
@pytest.mark.parametrize("biased", [False, True])
def test_segments_do_not_see_each_other(bounds, biased):
    query, key = torch.randn(17, 8), torch.randn(17, 8)
    bias = torch.randn(17) if biased else None
    sums = by_segments(received_sums, query, key, torch.tensor(bounds), 2, bias)
    for start, end in pairwise(bounds):
        for column in range(start, end):
            total = 0.0
            for head in (slice(0, 4), slice(4, 8)):
                logits = query[start:end, head] @ key[start:end, head].T / 2
                if bias is not None:
                    logits = logits + bias[start:end]
                total += float(logits.softmax(-1)[:, column - start].sum()) / 2
            assert sums[column].item() == pytest.approx(total, rel=1e-4)
