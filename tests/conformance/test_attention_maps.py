"""Attention maps that come back are of logical size: zeros where nothing was, in all families."""

from contextlib import contextmanager

import pytest
import torch

import foveate
from foveate.families import find_family
from tests.conformance.test_families import case, layers_of, model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.engine.test_attention_maps import alive_in

STEPS = 3
ROWS = [[3, 2, 6], [7, 4], [5]]


@contextmanager
def watched(modules):
    """What the attention modules themselves return: a list of maps for each."""
    found = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda m, args, out, n=n: found[n].append(out[1]))
        for n, module in enumerate(modules)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def placed(physical, queries, keys, like):
    """A row's map (H, P, S) in one like the unpruned model's: its last queries and keys, as told;
    a layer with a window holds the last of its keys only.
    """
    whole = torch.zeros_like(like)
    rows = torch.tensor(queries)
    columns = torch.tensor(keys[-physical.shape[2] :])
    seen = physical[:, physical.shape[1] - len(rows) :, physical.shape[2] - len(columns) :]
    inside = columns >= 0
    assert not seen[..., ~inside].any()
    whole[:, rows[:, None], columns[inside]] = seen[..., inside]
    return whole


CELLS = [(name, "composed") for name in sorted(MEMBERS)]
CELLS += [
    (name, kind)
    for name in ("aya_vision", "gemma3", "llava", "qwen3_vl")
    for kind in ("pyramiddrop", "pre_llm", "forgetful")
]


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_maps_equal_those_of_the_layers_where_tokens_are(name, kind):
    member, model = MEMBERS[name](), model_of(name, "eager")
    method, _ = case(name, kind, 3)
    inputs = member.inputs(ROWS)
    settings = {
        "max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False,
        "output_attentions": True, "return_dict_in_generate": True,
    }  # fmt: skip
    bare = model.generate(**fresh(inputs), **settings).attentions
    layers, keyed = find_family(model).layers, find_family(model).keyed_layers
    with (
        foveate.use(model, method) as run,
        watched([member.attention(layers[number]) for number in keyed]) as physical,
    ):
        got = model.generate(**fresh(inputs), **settings).attentions
    real = inputs["attention_mask"].bool()
    length = real.shape[1]
    for map_number, number in enumerate(keyed):  # recurrent layers have none
        for step in range(STEPS):
            want, of = bare[step][map_number], got[step][map_number]
            assert of.shape == want.shape
            seen = physical[map_number][step]
            start = length + step - want.shape[-1] if step else 0
            # Caches before a layer may have forgotten, once the prompt is read.
            later = layers_of(name)[0][1] if kind == "forgetful" and step else 0
            if physical[map_number][0].shape[2] == length and number >= later:
                assert torch.equal(of, seen)  # nothing was removed so far
                continue
            for row in range(len(ROWS)):
                alive = alive_in(run, inputs["input_ids"], member.image_id, row, max(later, number))
                alive = [n for n in alive if real[row, n]]
                keys = alive + list(range(length, length + step))
                queries = [0] if step else alive
                columns = [n - start for n in keys]
                assert torch.equal(of[row], placed(seen[row], queries, columns, want[row]))
                last = of[row, :, -1]
                torch.testing.assert_close(last.sum(-1), torch.ones(len(last)))
