"""Several samples in one row, without labels: each gets what it gets alone."""

import pytest
import torch

import foveate
from foveate.methods import FastV, PyramidDrop
from tests.engine.test_oracle import TOLERANCE
from tests.tinies import IMAGE, prompts, row_of, tiny_llava

ROWS = [[5, 7], [4], [2, 3, 9]]
METHODS = [
    "fastv", "pyramiddrop", "feather", "flowcut-inner", "dart", "sparsevlm", "cdpruner", "uniform",
]  # fmt: skip


def packed(rows):
    """The rows after one another, told apart by their positions."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": torch.cat(ids, 1),
        "position_ids": torch.cat([torch.arange(i.shape[1]) for i in ids])[None],
        "pixel_values": torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row]),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_each_sample_gets_what_it_gets_alone(method, attention):
    """The last token of each sample ranks its images; others do not see them."""
    model = tiny_llava("llama-gqa", attention)
    inputs = prompts(ROWS)
    rows = [row_of(inputs, row) for row in range(len(ROWS))]
    with torch.no_grad(), foveate.use(model, method) as run:
        logits = model(**packed(rows), use_cache=False).logits[0]
        kept = iter(run.kept)
        for row in rows:
            length = row["input_ids"].shape[1]
            want = model(**row, use_cache=False).logits[0]
            for image in run.kept:
                other = next(kept)
                assert all(torch.equal(image[place], other[place]) for place in image)
            assert (logits[:length] - want).abs().max() <= TOLERANCE
            logits = logits[length:]


@pytest.mark.parametrize("given", [True, False])
def test_with_a_cache_a_jump_in_positions_parts_nothing(given):
    """Without a flash kernel the model then sees one sample, whose last token ranks all images."""
    model, eager = tiny_llava(), tiny_llava(attention="eager")
    inputs = prompts(ROWS)
    both = packed([row_of(inputs, row) for row in (0, 2)])
    with torch.no_grad():
        maps = eager(**both, output_attentions=True).attentions
        with foveate.use(model, [PyramidDrop((1,), 12), FastV(layer=3, keep=0.5)]) as run:
            model(**both, **({"use_cache": True} if given else {}))
    visual = (both["input_ids"][0] == IMAGE).nonzero()[:, 0].split(36)
    for image, columns in zip(run.kept, visual, strict=True):
        want = maps[1][0].mean(0)[-1, columns].topk(12).indices.sort().values
        assert torch.equal(image["llm:1"], want)
        assert len(image["llm:3"]) == 6
