"""Layers that compute less of visual tokens equal a plain layer in which that is masked."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from foveate.core import PartialCompute
from foveate.engine.extensions.partial.prefill import Images, Split, run_layer, why_unsupported
from foveate.families import find_family
from tests.masked_layer import masked
from tests.tinies import tiny_llava

GRID = (11, 7)
SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "attn_implementation": "sdpa",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_layer(kind="llama"):
    torch.manual_seed(0)
    config, cls = (
        (LlamaConfig(**SIZES), LlamaDecoderLayer)
        if kind == "llama"
        else (Qwen3Config(**SIZES, head_dim=8), Qwen3DecoderLayer)
    )
    layer = cls(config, 0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return layer, LlamaRotaryEmbedding(config)


@dataclasses.dataclass
class Batch:
    """A row with two images, and a left-padded row with one."""

    hidden: torch.Tensor
    position: torch.Tensor
    split: Split
    images: list


def make_batch(frames=1, holes=False):
    places = torch.arange(GRID[0] * GRID[1] * frames)
    if holes:
        places = torch.randperm(len(places))[: len(places) - 17].sort().values
    count = len(places)
    length = 8 + 2 * count
    first, second = torch.arange(3, 3 + count), torch.arange(5 + count, 5 + 2 * count)
    pad = length - (4 + count + 2)
    third = torch.arange(pad + 4, pad + 4 + count)
    position = torch.stack((torch.arange(length), torch.arange(length) - pad)).clamp(min=-1)
    visual = torch.zeros(2, length, dtype=torch.bool)
    visual[0, first], visual[0, second], visual[1, third] = True, True, True
    rows, columns = torch.tensor([[0], [0], [1]]), torch.stack((first, second, third))
    index = places.expand(3, -1) if holes else None
    split = Split.of([Images(rows, columns, index, frames, GRID)], position, position, visual)
    images = [[(first, places), (second, places)], [(third, places)]]
    return Batch(torch.randn(2, length, 32), position, split, images)


WORKS = {
    "window": PartialCompute(0, 3),
    "itself-alone": PartialCompute(0, 1),
    "everything-near": PartialCompute(0, 99),
    "mlp": PartialCompute(0, 5, mlp_divisor=2.5),
    "heads": PartialCompute(0, 5, heads=(True, False, False, True), mlp_divisor=2),
    "group-of-heads": PartialCompute(0, 5, heads=(True, True, False, False)),
    "no-head": PartialCompute(0, 5, heads=(False,) * 4),
    "lost-mass": PartialCompute(0, 5, heads=(True, False, False, True), renormalize=False),
    "unseen": PartialCompute(
        0, 5, heads=(False, True, True, True), reads_visual=False, renormalize=False
    ),
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
@torch.no_grad()
def test_it_equals_the_masked_layer(work, frames, holes, kind):
    layer, rotary = make_layer(kind)
    batch = make_batch(frames, holes)
    turned = rotary(batch.hidden, batch.position.clamp(min=0))
    got = run_layer(layer, work, batch.split, batch.hidden, turned, None, None)
    plain = layer(batch.hidden, position_embeddings=turned, attention_mask=None)
    for row, images in enumerate(batch.images):
        real = batch.position[row] >= 0
        cos, sin = (part[row] for part in turned)
        want = masked(layer, batch.hidden[row], (cos, sin), images, work, real, GRID)
        torch.testing.assert_close(
            got[row, real], want[real], rtol=0, atol=5e-6
        )  # norms are float32
        if row == 0:
            assert (plain[row] - want).abs().max() > 1e-2, "the test does not bite"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@torch.no_grad()
def test_a_given_mask_counts(dtype):
    """Masks of transformers, boolean or additive, say what text sees."""
    layer, rotary = make_layer()
    batch = make_batch()
    length = batch.position.shape[1]
    hidden, position = batch.hidden[:1], batch.position[:1]
    rows = torch.ones(length, length, dtype=torch.bool).tril()
    rows[:, 1] = False
    mask = rows[None, None]
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    part = batch.split.images[0]
    one = dataclasses.replace(part, rows=part.rows[:2], columns=part.columns[:2])
    visual = batch.split.visual[:1]
    split = Split.of([one], position, position, visual)
    turned = rotary(hidden, position)
    got = run_layer(layer, WORKS["heads"], split, hidden, turned, mask, None)[0]
    free = run_layer(layer, WORKS["heads"], split, hidden, turned, None, None)[0]
    text = ~visual[0]
    changed = (got - free).abs().amax(1) > 1e-6
    assert changed[text][2:].all()
    assert not changed[:2].any()


def test_gradients_reach_the_weights_that_work():
    """Also where a window reaches beyond the image, or places are empty."""
    layer, rotary = make_layer()
    batch = make_batch(holes=True)
    turned = rotary(batch.hidden, batch.position.clamp(min=0))
    work = PartialCompute(0, 5, heads=(True, True, False, False), mlp_divisor=2)
    batch.hidden.requires_grad_()
    run_layer(layer, work, batch.split, batch.hidden, turned, None, None).sum().backward()
    assert batch.hidden.grad.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_other_layers_stay_whole():
    family = find_family(tiny_llava())
    assert why_unsupported(family, PartialCompute(0, 5)) is None
    assert (
        why_unsupported(family, PartialCompute(0, 5, heads=(True,) * 3))
        == "the mask has 3 heads, and layer 0 has 4"
    )
    family.attention_layers = (1, 2)
    assert "only a window of the sequence" in why_unsupported(family, PartialCompute(0, 5))
    mlp = family.layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    assert "mlp.up_proj is a Sequential" in why_unsupported(family, PartialCompute(1, 5))
    family.layers[2] = torch.nn.Identity()
    assert "not made like those of Llama" in why_unsupported(family, PartialCompute(2, 5))
    family.planar = False
    assert "no single grid" in why_unsupported(family, PartialCompute(2, 5))
