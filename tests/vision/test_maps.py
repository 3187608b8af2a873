"""Attention maps of encoders come back at full length: zeros where a patch is gone."""

import pytest
import torch

import foveate
from foveate.families import find_family
from foveate.methods import ClsDrop, FlowCut, ToMe
from tests.conformance.test_families import model_of
from tests.conformance.zoo import MEMBERS
from tests.methods_for_tests import Listed
from tests.tinies import prompts, tiny_llava
from tests.vision import oracle
from tests.vision.encoders import ENCODERS, build, images
from tests.vision.test_encoders import CASES, PAIRS, oracle_of


def map_of(full, weights):
    """(H, N, N) of what is alive: attention to a group is that to all its rows."""
    made = torch.zeros_like(weights)
    for query in full.groups:
        for key, stand in zip(full.groups, full.stands, strict=True):
            row = full.stands[full.groups.index(query)]
            made[:, row, stand] = weights[:, query[0], key].sum(-1)
    return made


FEW = [pair for pair in PAIRS if pair[0] in ("deit", "siglip2") or pair[1] in ("tome", "before")]


@pytest.mark.parametrize(("name", "case"), FEW)
def test_maps_equal_those_of_the_full_length_oracle(name, case, monkeypatch):
    model, inputs = build(ENCODERS, name, "eager"), images(2, name=name)
    method, steps, _ = CASES[case]
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True, output_attentions=True)
        with foveate.use(model, method):
            got = model(**inputs, output_attentions=True).attentions
    wanted, attend = [], oracle.Full.attend

    def note(full, layer):
        found = attend(full, layer)
        wanted.append(map_of(full, found[0]))
        return found

    monkeypatch.setattr(oracle.Full, "attend", note)
    oracle_of(model, name, inputs, plain.hidden_states[0], steps)
    layers = len(got)
    assert len(wanted) == 2 * layers
    for number, of in enumerate(got):
        assert of.shape == plain.attentions[number].shape
        for image in range(2):
            want = wanted[image * layers + number]
            torch.testing.assert_close(of[image], want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_keeping_everything_changes_no_map(name):
    model, inputs = build(ENCODERS, name, "eager"), images(name=name)
    with torch.no_grad():
        want = model(**inputs, output_attentions=True).attentions
        with foveate.use(model, ToMe(keep=1.0)):
            got = model(**inputs, output_attentions=True).attentions
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava", ClsDrop(layers=(1,), keep=6)),
        ("llava", ToMe(r=2)),
        ("llava-siglip", Listed(1, 6)),
        ("llava-pixtral", Listed(1, 6)),
        ("qwen2_vl", Listed(1, 3)),
        ("internvl", Listed(1, 3)),
    ],
)
def test_towers_of_models_hand_out_what_they_do_without_a_session(name, method):
    """Maps where the tower makes them; else what its attention makes, a row for each patch."""
    member, model = MEMBERS[name](), model_of(name, "eager")
    tower = find_family(model).encoder.tower
    found = []
    hook = tower.register_forward_hook(lambda module, args, out: found.append(out))
    inputs = {**member.pixels(2), "output_attentions": True}
    try:
        with torch.no_grad():
            bare = model.model.get_image_features(**inputs)
            with foveate.use(model, method):
                got = model.model.get_image_features(**inputs)
    finally:
        hook.remove()
    assert (got.get("attentions") is None) == (bare.get("attentions") is None)
    for mine, theirs in zip(got.attentions or (), bare.attentions or (), strict=True):
        assert mine.shape == theirs.shape
        if mine.dim() == 4:
            sums = mine.sum(-1)
            assert bool(((sums - 1).abs().lt(1e-4) | (sums == 0)).all())
    if got.get("attentions") and got.attentions[-1].dim() == 4:
        last = got.attentions[-1]
        assert bool((last == 0).all(1).all(1).any()), "a removed patch has a column of zeros"
        assert torch.equal((last == 0).all(1).all(1), (last == 0).all(1).all(2))


def test_images_with_different_numbers_of_patches_have_maps_of_their_own():
    """Rows that only fill up are nobody's."""
    model = tiny_llava(attention="eager", layers=1)
    pixels = prompts([[4, 5, 3], [6, 2]])["pixel_values"]
    with torch.no_grad(), foveate.use(model, FlowCut(keep=5, every=1)) as run:
        maps = model.model.get_image_features(pixels, output_attentions=True).attentions
        model(**prompts([[4, 5, 3], [6, 2]]))
    assert len({len(kept["vision:1"]) for kept in run.kept}) > 1
    for image, kept in enumerate(run.kept):
        for layer in (1, 2):
            seen = maps[layer][image].sum((0, 1)).nonzero()[:, 0].tolist()
            assert seen == [0, *(kept[f"vision:{layer}"] + 1).tolist()]


def test_images_that_are_padded_to_one_length_have_maps_of_their_own():
    """Of three images with other grids, only rows of what survives have attention."""
    member, model = MEMBERS["lfm2_vl"](), model_of("lfm2_vl", "eager")
    pixels = member.pixels(3)
    with torch.no_grad(), foveate.use(model, Listed(1, 0.5)):
        got = model.model.get_image_features(**pixels, output_attentions=True)
    for image, (height, width) in enumerate(pixels["spatial_shapes"].tolist()):
        alive = ~got.pooler_output[image][:, 0].isnan()
        assert alive.sum() == len(alive) // 2
        cells = alive.view(height // 2, 1, width // 2, 1).expand(-1, 2, -1, 2).flatten()
        kept = cells.nonzero()[:, 0].tolist()
        assert got.attentions[0].shape[-1] == 64
        for layer in (1, 2):
            of = got.attentions[layer][image].mean(0)
            assert of.shape == (64, 64)
            assert of.sum(0).nonzero()[:, 0].tolist() == kept
            assert of.sum(1).nonzero()[:, 0].tolist() == kept
            torch.testing.assert_close(of[kept].sum(1), torch.ones(len(kept)))
