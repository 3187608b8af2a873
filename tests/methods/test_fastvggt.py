"""FastVGGT: destinations, merge maps, attention by loops, batches, odd grids, FLOPs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import LayerAttention, LayerShape, get_method
from foveate.errors import BudgetError, FoveateError, LayerError, UnsupportedModelError
from foveate.measure.account import account
from foveate.methods import FastVGGT, ToMe
from foveate.ops import merge_map as ops
from foveate.ops.merge_map import merge_map, one_of_each_cell, strided
from tests.tinies import prompts, tiny_llava
from tests.vision.encoders import ENCODERS, SPECIAL, build, images, row_of

GRIDDED = ["vit", "deit", "dinov2", "dinov2-registers", "clip", "siglip", "dinov3_vit"]
VIDEO = LayerShape(1 + 36, 1, (3, 6), 2, 32)  # frames of tubelets


def layer_of(shape, images=2, heads=2, seed=0):
    """A layer's attention on random states, with SDPA as its kernel."""
    generator = torch.Generator().manual_seed(seed)
    width = shape.width // heads

    def made():
        return torch.randn(images, heads, shape.rows, width, generator=generator)

    query, key, value = made(), made(), made()
    states = torch.randn(images, shape.rows, shape.width, generator=generator)

    def kernel(query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)

    rows = torch.arange(shape.special, shape.rows)[:, None]
    return LayerAttention(query, key, value, None, width**-0.5, rows, states, shape, kernel)


def by_hand(layer, into, ratio, protect):
    """(B, N, H, d) as the method card has it: one image, one head and one row after another."""
    result = torch.zeros_like(layer.query.transpose(1, 2))
    rows = layer.shape.rows
    count = int(rows * protect)
    protected = [n * (rows // count) for n in range(count)] if count else []
    for image, states in enumerate(layer.states):
        unit = (states / states.norm(dim=-1, keepdim=True)).bfloat16()
        best = {}
        for row in set(range(rows)) - set(into):
            scores = [float(unit[row] @ unit[target]) for target in into]
            best[row] = max(scores), into[scores.index(max(scores))]
        order = sorted(best, key=lambda row: (-best[row][0], row))
        order = [row for row in order if row not in protected]
        goes = order[: min(int(rows * ratio), len(best))]
        groups = [[row] for row in order if row not in goes]
        groups += [[t] + [row for row in goes if best[row][1] == t] for t in into]
        groups += [[row] for row in protected]
        for head in range(layer.query.shape[1]):
            query, key, value = (
                torch.stack([part[image, head, group].mean(0) for group in groups])
                for part in (layer.query, layer.key, layer.value)
            )
            mixed = (query @ key.T * layer.scaling).softmax(-1) @ value
            for group, row in zip(groups, mixed, strict=True):  # the copy of a row comes last
                result[image, group, head] = row
    return result


SHAPES = {
    "an image": LayerShape(1 + 36, 1, (6, 6), 1, 8),
    "no special row": LayerShape(24, 0, (4, 6), 1, 8),
    "odd sides": LayerShape(2 + 35, 2, (5, 7), 1, 8),
    "frames": LayerShape(1 + 3 * 24, 1, (4, 6), 3, 8),
    "odd frames": LayerShape(4 * 15, 0, (3, 5), 4, 8),
}


@pytest.mark.parametrize(("ratio", "protect"), [(0.9, 0.1), (0.5, 0.0), (0.3, 0.2), (1.0, 0.0)])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_loops(name, ratio, protect):
    shape = SHAPES[name]
    method, layer = FastVGGT(ratio=ratio, protect=protect), layer_of(shape)
    into = method.destinations(shape).tolist()
    got = method.attend(None, layer)
    torch.testing.assert_close(got, by_hand(layer, into, ratio, protect), rtol=0, atol=1e-5)
    assert (got - layer.plain()).abs().max() > 0.1, "the test does not bite"


@pytest.mark.parametrize("name", SHAPES)
def test_each_cell_has_one_destination_on_the_grid(name):
    shape = SHAPES[name]
    into = FastVGGT().destinations(shape)
    height, width = shape.grid
    assert into.tolist() == sorted(set(into.tolist()))
    assert into[: shape.special].tolist() == list(range(shape.special))
    inside = into[shape.special :] - shape.special
    cells = math.ceil(height / 2) * math.ceil(width / 2)
    for frame in range(shape.frames):
        own = [n - frame * height * width for n in inside.tolist()]
        own = [n for n in own if 0 <= n < height * width]
        if shape.frames > 1 and frame == 0:
            assert own == list(range(height * width))
            continue
        assert len({(n // width // 2, n % width // 2) for n in own}) == len(own) == cells


def test_frames_differ_layers_do_not_and_a_seed_decides():
    shape = LayerShape(4 * 64, 0, (8, 8), 4, 8)
    into = FastVGGT().destinations(shape)
    second, third = (
        {n - f * 64 for n in into.tolist() if f * 64 <= n < (f + 1) * 64} for f in (1, 2)
    )
    assert second != third
    assert torch.equal(into, FastVGGT().destinations(shape))
    assert not torch.equal(into, FastVGGT(seed=7).destinations(shape))


def test_the_released_pattern_is_sheared_where_a_side_is_odd():
    """As the card has it: of the default grid 106 of 252 cells do not hold one, and the last 30
    patches none."""
    shape = LayerShape(2 * 37 * 28, 0, (28, 37), 2, 8)
    into = FastVGGT(as_released=True).destinations(shape)
    second = into[into >= 37 * 28] - 37 * 28
    assert len(second) == 14 * 18
    assert int(second.max()) < 28 * 37 - 28
    held = torch.zeros(14, 18)
    for n in second.tolist():
        if n % 37 < 36:
            held[n // 37 // 2, n % 37 // 2] += 1
    assert 60 < int((held != 1).sum()) < 160
    even = LayerShape(2 * 48, 0, (6, 8), 2, 8)
    assert torch.equal(FastVGGT(as_released=True).destinations(even), FastVGGT().destinations(even))


def test_chosen_patches_are_counted_row_by_row_within_a_cell():
    chosen = torch.tensor([[[0, 1], [2, 3]]])
    assert one_of_each_cell((4, 4), 2, chosen)[0].tolist() == [0, 3, 12, 15]
    assert one_of_each_cell((3, 3), 2, chosen)[0].tolist() == [0, 2, 6, 8]
    assert one_of_each_cell((5, 5), 2, chosen, sheared=True)[0].tolist() == [0, 3, 12, 15]


def test_protected_rows_lie_at_equal_distances():
    assert strided(87, 0.1).tolist() == [10 * n for n in range(8)]
    assert strided(9, 0.1).tolist() == []
    assert strided(20, 1.0).tolist() == list(range(20))


def test_a_protected_destination_counts_twice():
    states = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    merged = merge_map(states, torch.tensor([0, 3]), 6, torch.tensor([0]))
    assert merged.merged == 2
    assert merged.slot[0, 0] == 0
    assert merged.back[0, 0] == 2
    assert merged.merge(states[:, None]).shape == (1, 1, 3, 4)


def test_without_cells_only_the_first_frame_is_merged_into():
    shape = SHAPES["frames"]
    assert FastVGGT(cell=None).destinations(shape).tolist() == list(range(1 + 24))


def test_merging_states_before_their_projections_is_the_same():
    """Which is why ToMe for diffusion, which merges those, needs no method of its own."""
    shape = LayerShape(64, 0, (8, 8), 1, 8)
    layer = layer_of(shape)
    merged = merge_map(layer.states, FastVGGT().destinations(shape), 32, torch.arange(0))
    project = torch.nn.Linear(8, 8)
    before = project(merged.merge(layer.states[:, None]))
    after = merged.merge(project(layer.states)[:, None])
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_of_many_rows_in_half_precision_are_rounded_once(dtype):
    """On a GPU their sum would stand still besides."""
    merged = merge_map(torch.ones(1, 1000, 4), torch.tensor([0]), 999, torch.tensor([7]))
    x = torch.rand(1, 2, 1000, 8, generator=torch.Generator().manual_seed(0)).add(1).to(dtype)
    assert torch.equal(merged.merge(x), merged.merge(x.double()).to(dtype))


def test_similarities_in_chunks_are_the_same(monkeypatch):
    layer = layer_of(SHAPES["frames"])
    want = FastVGGT().attend(None, layer)
    monkeypatch.setattr(ops, "CHUNK", 7)
    assert torch.equal(FastVGGT().attend(None, layer), want)


# -- in encoders


@pytest.mark.parametrize("name", [*GRIDDED, "vivit"])
def test_an_encoder_attends_as_its_layers_by_hand(name):
    """The states of each layer, by those before it and the loops above."""
    model, inputs = build(ENCODERS, name), images(2, name=name)
    seen = []

    class Watched(FastVGGT):
        def attend(self, tokens, layer):
            seen.append((layer, got := super().attend(tokens, layer)))
            return got

    with torch.no_grad(), foveate.use(model, Watched(ratio=0.6)) as run:
        model(**inputs)
    assert len(seen) == 4
    for layer, got in seen:
        special = SPECIAL.get(name, 0)
        image = LayerShape(special + 36, special, (6, 6), 1, 32)
        assert layer.shape == (VIDEO if name == "vivit" else image)
        into = FastVGGT().destinations(layer.shape).tolist()
        torch.testing.assert_close(got, by_hand(layer, into, 0.6, 0.1), rtol=0, atol=1e-4)
    assert all(len(kept) == 36 for image in run.kept for kept in image.values())


def test_the_metric_is_the_normed_input():
    model, inputs, seen = build(ENCODERS, "vit"), images(2), []

    class Watched(FastVGGT):
        def attend(self, tokens, layer):
            seen.append(layer.states)
            return super().attend(tokens, layer)

    with torch.no_grad(), foveate.use(model, Watched(layers=(2,))):
        states = model(**inputs, output_hidden_states=True).hidden_states[2]
    assert torch.equal(seen[0], model.layers[2].layernorm_before(states))


@pytest.mark.parametrize("name", GRIDDED)
def test_merging_nothing_changes_no_bit(name):
    model, inputs = build(ENCODERS, name), images(name=name)
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        with foveate.use(model, FastVGGT(ratio=0.0)):
            assert torch.equal(model(**inputs).last_hidden_state, want)
        with foveate.use(model, FastVGGT()):
            assert (model(**inputs).last_hidden_state - want).abs().max() > 0.01


@pytest.mark.parametrize("name", ["deit", "siglip"])
def test_batch_equals_rows(name):
    model, inputs = build(ENCODERS, name), images(4, name=name)
    with torch.no_grad(), foveate.use(model, FastVGGT()):
        together = model(**inputs).last_hidden_state
        for row in range(4):
            alone = model(**row_of(inputs, row)).last_hidden_state
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=2e-5)


METHODS = [
    FastVGGT(), FastVGGT(layers=(1, 3)), FastVGGT(ratio=0.5, protect=0.0), FastVGGT(ratio=0.0),
    FastVGGT(cell=3, protect=0.3), FastVGGT(as_released=True, cell=4), FastVGGT(cell=None),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip"])
@pytest.mark.parametrize("size", [(48, 48), (48, 80), (40, 56)])
def test_predicted_flops_equal_the_ones_torch_counts(name, method, size):
    model = build(ENCODERS, name, "eager")
    pixels = torch.randn(2, 3, *size)
    usual = size == (48, 48) or name.startswith("dino")
    more = {} if usual else {"interpolate_pos_encoding": True}
    counter = FlopCounterMode(display=False)
    with foveate.use(model, method) as run, torch.no_grad(), counter:
        model(pixels, **more)
    assert account(run.record, run.family, run.methods).total == counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_predicted_flops_of_a_video(method):
    """Of which the first frame stays what it is."""
    model, counter = build(ENCODERS, "vivit", "eager"), FlopCounterMode(display=False)
    with foveate.use(model, method) as run, torch.no_grad(), counter:
        model(**images(2, name="vivit"))
    assert account(run.record, run.family, run.methods).total == counter.get_total_flops()


def test_it_saves_work_on_many_tokens_and_the_report_says_so():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=480, patch_size=8,
    )  # fmt: skip
    model = ViTModel(config).eval()
    with torch.no_grad(), foveate.use(model, FastVGGT()) as run:
        model(torch.randn(1, 3, 480, 480))
    work = run.report()["flops"]
    assert work["after"] < 0.5 * work["before"]
    assert run.report()["images"][0]["tokens"] == 3600


def test_gradients_reach_queries_keys_and_values():
    model, inputs = build(ENCODERS, "vit").train(), images()
    with foveate.use(model, FastVGGT()):
        model(**inputs).last_hidden_state.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "attention" in name and name.endswith("weight"):
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() > 0


def test_a_tower_of_a_language_model_merges():
    model, inputs = tiny_llava(), prompts([(3, 6), (5,)])
    with torch.no_grad():
        plain = model(**inputs).logits
        with foveate.use(model, FastVGGT()) as run:
            assert not torch.equal(model(**inputs).logits, plain)
    assert [step.layer for step in FastVGGT().steps(run.family)] == [0, 1, 2]


# -- refusals


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(UnsupportedModelError, match="may differ from image to image"):
        foveate.use(build(ENCODERS, "siglip2"), FastVGGT())
    with pytest.raises(LayerError, match="reads whole grids of visual tokens, but tome removes"):
        foveate.use(build(ENCODERS, "vit"), [ToMe(r=(3,)), FastVGGT(layers=(2,))])
    with pytest.raises(BudgetError, match="removes no tokens"):
        FastVGGT(keep=0.5)
    with pytest.raises(LayerError, match="ascending"):
        FastVGGT(layers=(2, 1))
    for wrong in ({"ratio": 1.5}, {"cell": 0}, {"cell": 2**32}, {"protect": -0.1}, {"seed": -1}):
        with pytest.raises(FoveateError, match=next(iter(wrong))):
            FastVGGT(**wrong)


def test_tokens_may_be_removed_after_it():
    model = build(ENCODERS, "vit")
    with (
        torch.no_grad(),
        foveate.use(model, [FastVGGT(layers=(0, 1)), ToMe(r=(0, 0, 4, 4))]) as run,
    ):
        model(**images())
    assert list(run.report()["images"][0]["after"].values())[-1] == 28


def test_defaults_and_registration():
    method = get_method("fastvggt")()
    assert isinstance(method, FastVGGT)
    assert (method.ratio, method.cell, method.protect, method.seed) == (0.9, 2, 0.1, 33)
    assert (method.keep, method.layers, method.removes) == (None, None, False)
