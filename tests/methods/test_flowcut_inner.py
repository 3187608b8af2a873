"""FlowCut's cut inside the language model, against loops over the model's own projections."""

import math

import pytest
import torch

import foveate
from foveate.errors import LayerError
from foveate.methods.flowcut import FlowCut
from foveate.methods.flowcut_inner import FlowCutInner
from tests.oracle import attend
from tests.tinies import IMAGE, PATCHES, prompts


def softmax(numbers):
    powers = [math.exp(x) for x in numbers]
    return [p / sum(powers) for p in powers]


def flow(model, layer, hidden, ids):
    """Scores of one image's tokens, from a layer's input, with loops."""
    of = model.model.language_model.layers[layer]
    columns = (ids == IMAGE).nonzero()[:, 0].tolist()
    length = len(ids)
    weights, values = attend(of, hidden, torch.arange(length), torch.ones(length).bool())
    heads, width = values.shape[0], values.shape[-1]
    relation, semantic = [0.0] * len(columns), [0.0] * len(columns)
    for h in range(heads):
        row = [float(weights[h, -1, c]) for c in columns]
        alike = softmax([float(values[h, -1] @ values[h, c]) / width**0.5 for c in columns])
        for j in range(len(columns)):
            relation[j] += row[j] / sum(row) / heads
            semantic[j] += alike[j] / heads
    sizes = [float(values[:, c].mean(0).abs().sum()) for c in columns]
    return [(r + s) * size for r, s, size in zip(relation, semantic, sizes, strict=True)]


@pytest.mark.parametrize("layer", [1, 3])
@torch.no_grad()
def test_it_keeps_what_the_projections_rank_highest(any_llava, layer):
    inputs = prompts([[5, 7]])
    ids = inputs["input_ids"][0]
    seen = any_llava(**inputs, output_hidden_states=True).hidden_states[layer - 1][0]
    scores = flow(any_llava, layer - 1, seen, ids)
    with foveate.use(any_llava, FlowCutInner(layers=(layer,), keep=9)) as session:
        any_llava(**inputs)
    ranked = sorted(range(PATCHES), key=lambda i: -scores[i])
    assert session.kept[0][f"llm:{layer}"].tolist() == sorted(ranked[:9])


def test_attention_that_underflows_is_no_nan(make_tokens):
    tokens = make_tokens(
        text_attention=torch.zeros(1, 1, 4, 24),
        value_attention=torch.full((1, 1, 2, 24), 1 / 24),
        llm_values=torch.randn(1, 1, 2, 24, 8),
    )
    assert FlowCutInner().scores(tokens).isfinite().all()


def test_it_follows_the_cut_inside_the_encoder(any_llava):
    inputs = prompts([[5, 7]])
    both = [FlowCut(keep=12), FlowCutInner(layers=(2,), keep=5)]
    with torch.no_grad(), foveate.use(any_llava, both) as session:
        any_llava(**inputs)
    assert [len(index) for index in session.kept[0].values()][-2:] == [12, 5]
    with pytest.raises(LayerError, match="begin at 1"):
        FlowCutInner(layers=(0,))
