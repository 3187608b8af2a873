"""BiFormer: regions, routing, attention by loops, frames, borders, batches, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import LayerShape, get_method
from foveate.errors import FoveateError, UnsupportedModelError
from foveate.measure.account import account
from foveate.methods import BiFormer
from foveate.methods.biformer import blocks, gathered, route
from tests.methods.test_fastvggt import layer_of
from tests.tinies import prompts, tiny_llava
from tests.vision.encoders import ENCODERS, build, images, row_of

GRIDDED = ["vit", "deit", "dinov2", "dinov2-registers", "clip", "siglip"]
SHAPES = {
    "an image": (LayerShape(1 + 36, 1, (6, 6), 1, 8), 3, 2),
    "no special row": (LayerShape(24, 0, (4, 6), 1, 8), 2, 1),
    "cut by the border": (LayerShape(2 + 35, 2, (5, 7), 1, 8), 3, 4),
    "frames": (LayerShape(1 + 3 * 24, 1, (4, 6), 3, 8), 2, 3),
    "a region for each patch": (LayerShape(12, 0, (3, 4), 1, 8), 9, 5),
}


def regions_by_hand(shape, regions):
    """Patches of each region, frame by frame."""
    height, width = shape.grid
    tall, wide = -(-height // regions), -(-width // regions)
    found = {}
    for frame in range(shape.frames):
        for row in range(height):
            for column in range(width):
                key = frame, row // tall, column // wide
                found.setdefault(key, []).append((frame * height + row) * width + column)
    return [found[key] for key in sorted(found)]


def by_hand(layer, regions, topk):
    """(B, N, H, d): each row attends to what it may, one after another."""
    shape, special = layer.shape, layer.special
    groups = [[special + n for n in group] for group in regions_by_hand(shape, regions)]
    result = torch.zeros_like(layer.query.transpose(1, 2))
    for image in range(len(result)):
        query = torch.stack([layer.query[image, :, g].mean(1).flatten() for g in groups])
        key = torch.stack([layer.key[image, :, g].mean(1).flatten() for g in groups])
        seen = {row: list(range(shape.rows)) for row in range(special)}
        for number, group in enumerate(groups):
            scores = (key @ query[number]).tolist()
            best = sorted(range(len(groups)), key=lambda n: -scores[n])[:topk]
            for row in group:
                seen[row] = [*range(special), *(n for b in best for n in groups[b])]
        for row, keys in seen.items():
            for head in range(layer.query.shape[1]):
                scores = layer.key[image, head, keys] @ layer.query[image, head, row]
                weights = (scores * layer.scaling).softmax(0)
                result[image, row, head] = weights @ layer.value[image, head, keys]
    return result


@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_loops(name):
    shape, regions, topk = SHAPES[name]
    layer = layer_of(shape)
    got = BiFormer(regions=regions, topk=topk).attend(None, layer)
    torch.testing.assert_close(got, by_hand(layer, regions, topk), rtol=0, atol=1e-5)
    assert (got - layer.plain()).abs().max() > 0.1, "the test does not bite"


@pytest.mark.parametrize("name", SHAPES)
def test_regions_hold_every_patch_once(name):
    shape, regions, _ = SHAPES[name]
    index = blocks(shape, regions)
    got = [[n for n in region if n >= 0] for region in index.tolist()]
    assert got == regions_by_hand(shape, regions)
    assert all(region for region in got)


def test_a_region_is_routed_by_means_over_all_heads():
    shape = LayerShape(16, 0, (4, 4), 1, 8)
    layer = layer_of(shape)
    index = blocks(shape, 2)
    chosen = route(gathered(layer.query, index), gathered(layer.key, index), index, 3)
    query, key = (
        part[:, :, index].mean(3).transpose(1, 2).flatten(2) for part in (layer.query, layer.key)
    )
    assert torch.equal(chosen, (query @ key.mT).topk(3).indices)


def test_keys_that_heads_share_are_repeated():
    shape = LayerShape(16, 0, (4, 4), 1, 8)
    layer = layer_of(shape)
    shared = layer.key[:, :1]
    repeated = shared.repeat_interleave(2, 1)
    index = blocks(shape, 2)
    query, few, many = (gathered(part, index) for part in (layer.query, shared, repeated))
    assert torch.equal(route(query, few, index, 2), route(query, many, index, 2))


@pytest.mark.parametrize("name", GRIDDED)
def test_all_regions_change_no_bit(name):
    model, inputs = build(ENCODERS, name), images(name=name)
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        with foveate.use(model, BiFormer(regions=3, topk=9)):
            assert torch.equal(model(**inputs).last_hidden_state, want)
        with foveate.use(model, BiFormer(regions=3, topk=2)) as run:
            assert (model(**inputs).last_hidden_state - want).abs().max() > 0.01
    assert all(len(kept) == 36 for image in run.kept for kept in image.values())


@pytest.mark.parametrize("name", ["deit", "siglip"])
def test_batch_equals_rows(name):
    model, inputs = build(ENCODERS, name), images(4, name=name)
    with torch.no_grad(), foveate.use(model, BiFormer(regions=3, topk=2)):
        together = model(**inputs).last_hidden_state
        for row in range(4):
            alone = model(**row_of(inputs, row)).last_hidden_state
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["dinov2-registers", "siglip"])
def test_regions_that_the_border_cuts_in_an_encoder(name, attention):
    """5 x 7 patches: nobody attends to what is not there."""
    model, seen = build(ENCODERS, name, attention), []

    class Watched(BiFormer):
        def attend(self, tokens, layer):
            seen.append((layer, got := super().attend(tokens, layer)))
            return got

    more = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad(), foveate.use(model, Watched(regions=3, topk=2)):
        model(torch.randn(2, 3, 40, 56), **more)
    assert len(seen) == 4
    for layer, got in seen:
        torch.testing.assert_close(got, by_hand(layer, 3, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("regions", [2, 3, 7])
@pytest.mark.parametrize("topk", [1, 2, 4])
@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip"])
@pytest.mark.parametrize("size", [(48, 48), (40, 56)])
def test_predicted_flops_equal_the_ones_torch_counts(name, regions, topk, size):
    model, pixels = build(ENCODERS, name, "eager"), torch.randn(2, 3, *size)
    usual = size == (48, 48) or name.startswith("dino")
    more = {} if usual else {"interpolate_pos_encoding": True}
    counter = FlopCounterMode(display=False)
    method = BiFormer(regions=regions, topk=topk, layers=(0, 2))
    with foveate.use(model, method) as run, torch.no_grad(), counter:
        model(pixels, **more)
    assert account(run.record, run.family, run.methods).total == counter.get_total_flops()


def test_copies_of_keys_take_no_more_than_the_keys():
    """At any time; the release holds as many as regions are chosen."""
    shape, largest = LayerShape(256, 0, (16, 16), 1, 8), []
    layer = layer_of(shape)
    inner = layer.kernel

    def kernel(query, key, value, mask):
        largest.append(key.numel())
        return inner(query, key, value, mask)

    object.__setattr__(layer, "kernel", kernel)
    BiFormer(regions=4, topk=8).attend(None, layer)
    assert len(largest) > 1
    assert max(largest) <= layer.key.numel()


def test_gradients_reach_queries_keys_and_values():
    model, inputs = build(ENCODERS, "vit").train(), images()
    with foveate.use(model, BiFormer(regions=3, topk=2)):
        model(**inputs).last_hidden_state.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "attention" in name and name.endswith("weight"):
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() > 0


def test_reports_say_that_it_needs_training():
    model = tiny_llava()
    with torch.no_grad(), foveate.use(model, BiFormer(regions=3, topk=2)) as run:
        model(**prompts([(3, 6), (5,)]))
    assert "trained with" in str(run.report())


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(UnsupportedModelError, match="may differ from image to image"):
        foveate.use(build(ENCODERS, "siglip2"), BiFormer())
    for wrong in ({"regions": 0}, {"topk": 0}):
        with pytest.raises(FoveateError, match=next(iter(wrong))):
            BiFormer(**wrong)


def test_defaults_and_registration():
    method = get_method("biformer")()
    assert isinstance(method, BiFormer)
    assert (method.regions, method.topk, method.layers, method.removes) == (7, 4, None, False)
