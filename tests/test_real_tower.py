"""What survives on a real tower: the measures, on masks and towers made by hand."""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from foveate.core import Reduction, list_methods
from foveate.errors import FoveateError
from foveate.methods import VTCCLS, ClsDrop, DivPrune, PixelPrune, ToC3D, ToMe, VisionZip
from tests.test_benchmarks import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    for folder in ("benchmarks", "scripts"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


@pytest.fixture
def survival():
    return importlib.import_module("_survival")


@pytest.fixture
def towers():
    return importlib.import_module("_tower")


@pytest.fixture
def methods():
    return importlib.import_module("_tower_methods")


@pytest.fixture
def vectors():
    return importlib.import_module("_embeddings")


MASK = torch.tensor(
    [
        [7, 7, 0, 0],
        [7, 7, 0, 9],
        [7, 0, 5, 5],
        [0, 0, 5, 5],
    ]
)
"""2 x 2 cells: 7 has four pixels in the first and one in the third; 9 one in the second."""


def test_area_and_lost_objects_of_known_cells(survival):
    objects = survival.objects_of(MASK, [7, 9, 5], cell=2, least=1, small=5)
    assert objects.areas.tolist() == [[4, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 4]]
    assert objects.small.tolist() == [False, True, True]
    left = objects.left(torch.tensor([True, True, False, False]))
    assert left["area"] == (pytest.approx(5 / 10), 1.0)
    assert left["small"] == (pytest.approx(1 / 5), 1.0)
    assert (left["lost"], left["small lost"]) == ((1.0, 3.0), (1.0, 2.0))
    only_a_corner = objects.left(torch.tensor([False, False, True, False]))
    assert only_a_corner["lost"] == (2.0, 3.0)


def test_slivers_do_not_count_and_photographs_without_objects_weigh_nothing(survival):
    assert len(survival.objects_of(MASK, [7, 9], cell=2, least=2, small=5).areas) == 1
    empty = survival.objects_of(MASK, [3], cell=2, least=1, small=5)
    assert set(empty.left(torch.ones(4, dtype=torch.bool)).values()) == {(0.0, 0.0)}


def test_a_merged_token_counts_where_its_sources_lie(survival):
    """First 4 is dropped and 1 goes into 0; then, in the order 3, 2, 0, the last into the first."""
    made = survival.Sources(5)
    first = Reduction.mean(torch.tensor([[3, 2, 0]]), torch.tensor([[2, 2, 1, 0, -1]]))
    made.reduce(torch.arange(5)[None], first)
    assert made.kept.tolist() == [True, False, True, True, False]
    assert made.sources.tolist() == [True, True, True, True, False]
    second = Reduction.mean(torch.tensor([[0]]), torch.tensor([[0, -1, 0]]))
    made.reduce(torch.tensor([[3, 2, 0]]), second)
    assert made.kept.tolist() == [False, False, False, True, False]
    assert made.sources.tolist() == [True, True, False, True, False]


def test_each_image_of_a_batch_is_followed_and_padding_is_nobody(survival):
    reduction = Reduction(
        torch.tensor([[0, 1], [2, 3]]), valid=torch.tensor([[True, True], [True, False]])
    )
    for row, kept in enumerate(([True, True, False, False], [False, False, True, False])):
        made = survival.Sources(4)
        made.reduce(torch.arange(4)[None], reduction, row)
        assert made.kept.tolist() == made.sources.tolist() == kept


def test_means_are_ratios_and_differences_are_paired(survival):
    one = survival.Means.of([(1.0, 2.0), (0.0, 0.0), (3.0, 3.0)])
    assert one.value == pytest.approx(4 / 5)
    said = one.to_dict()
    assert said["low"] < said["mean"] < said["high"]
    low, high = (survival.Means.of([(n, 2.0), (9 * n, 2.0)] * 9) for n in (1.0, 1.1))
    assert low.to_dict()["high"] > high.to_dict()["low"]  # alone they overlap
    assert high.minus(low)["low"] > 0
    assert one.minus(one) == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert survival.mean_of([(1.0, 2.0), (0.0, 2.0)]) == (0.5, 2.0)


def test_the_interval_of_a_mean_is_about_two_standard_errors(survival):
    values = torch.linspace(0, 1, 53)
    said = survival.Means.of([(float(v), 1.0) for v in values]).to_dict()
    half = 1.96 * float(values.std()) / 53**0.5
    assert (said["high"] - said["low"]) / 2 == pytest.approx(half, rel=0.1)


def test_neighbours_stay_where_an_embedding_hardly_moves(vectors):
    angles = torch.tensor([0.0, 0.1, 0.3, 1.0, 1.2, 2.0, 2.1])
    whole = torch.stack((angles.cos(), angles.sin()), 1)
    unmoved = vectors.agreement(whole, whole)
    assert all(value == pytest.approx(1.0) for pairs in unmoved.values() for value, _ in pairs)
    angles[0] = 1.15
    found = vectors.agreement(torch.stack((angles.cos(), angles.sin()), 1), whole)
    assert found["nearest"] == [(0.0, 1.0), *[(1.0, 1.0)] * 6]
    assert found["cosine"][0][0] == pytest.approx(float(torch.tensor(1.15).cos()))
    assert [value for value, _ in found["indexed"]] == [0, 0, 1, 0, 0, 1, 1]  # 0 is beside 4
    assert found["five"][0][0] == pytest.approx(4 / 5)  # 1 to 5 before, 4, 3, 2, 5, 6 now


@pytest.fixture(scope="module")
def tower():
    """A random tower of 4 x 4 patches."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        image_size=32, patch_size=8, projection_dim=16, initializer_range=0.2,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def test_one_encoding_answers_for_cls_drop_at_every_layer(towers, tower):
    """What it keeps is what a session of its own keeps, for each image of a batch."""
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    asked = {(str(layer), 0.25): VTCCLS(keep=4, layers=(layer,)) for layer in range(4)}
    asked |= {("merges", 0.25): VisionZip(keep=4), ("after", 0.25): DivPrune(keep=4)}
    found = towers.choices(towers.llava(tower), pixels, asked)
    kept = set()
    for layer in range(4):
        for image in range(3):
            method = ClsDrop((layer,), 0.25)
            _, alone = towers.encoded(tower, pixels[image : image + 1], method)
            assert torch.equal(found[str(layer), 0.25][image].kept, alone.kept)
            kept.add(tuple(alone.kept.tolist()))
    assert len(kept) > 4
    assert all(int(made.kept.sum()) == 4 for images in found.values() for made in images)
    assert all(bool(made.sources.all()) for made in found["merges", 0.25])


def test_merging_in_the_tower_drops_no_source_and_changes_the_embedding(towers, tower):
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    whole, everything = towers.encoded(tower, pixels, None)
    merged, made = towers.encoded(tower, pixels, ToMe(keep=0.5))
    assert bool(everything.kept.all())
    assert int(made.kept.sum()) == 8
    assert bool(made.sources.all())
    assert 0 < float(whole @ merged) < 0.9999


def test_methods_are_measured_or_there_is_a_reason(methods):
    """None is forgotten: the list follows the registry."""
    out = [slug for slugs in methods.left_out().values() for slug in slugs]
    stages = {stage: methods.measured(stage) for stage in ("vision", "pre_llm", "llm")}
    computed = methods.measured("vision", removes=False)
    assert sorted([*out, *computed, *stages["vision"], *stages["pre_llm"]]) == list_methods()
    assert stages["llm"] == methods.measured("pre_llm", removes=False) == []
    made = {make().slug for make in methods.inside(0.25, 1.0).values()}
    assert {"cls-drop", *made} == set(stages["vision"])
    after = {slug for slug, _ in methods.after() if not slug.startswith("cls-drop")}
    assert after == set(stages["pre_llm"]) - {"random"}
    reasons = {slug: why for why, slugs in methods.left_out().items() for slug in slugs}
    assert "the frames" in reasons["evs"]
    assert "the frames" in reasons["hot"]
    assert reasons["cdpruner"].startswith("reads the question")
    assert "trained" in reasons["stvit"]


def test_a_threshold_meets_a_budget_on_average(methods):
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3)) / 4
    pixels += torch.arange(4.0).view(4, 1, 1, 1) * torch.linspace(0, 1, 64).view(1, 1, 1, 64)
    equal = methods.threshold(pixels, 0.5)
    cells = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3)
    kept = importlib.import_module("foveate.methods.pixelprune").anchored(cells, equal)
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert kept.flatten(1).sum(1).unique().numel() > 1  # each image its own number


def test_a_smaller_image_has_as_many_patches_as_downsample_tokens(towers, tower):
    pixels = torch.rand(2, 3, 32, 32)
    assert towers.batch_of(pixels, ("tome", 0.25), 8) is pixels
    smaller = towers.batch_of(pixels, ("smaller image", 0.5), 8)
    assert smaller.shape == (2, 3, 16, 24)
    assert torch.allclose(smaller.mean((2, 3)), pixels.mean((2, 3)), atol=0.02)
    embedding = towers.embeddings_of(tower, smaller, None)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2))


def test_a_method_that_removes_nothing_leaves_all_cells(towers, tower):
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    whole, _ = towers.encoded(tower, pixels, None)
    changed, made = towers.encoded(tower, pixels, ToC3D(scored=(1,), share=0.5))
    assert bool(made.sources.all())
    assert float(whole @ changed) < 0.9999


def test_pixelprune_tells_what_it_keeps(towers, tower):
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., 8:16, 8:16] = 1
    _, made = towers.encoded(tower, pixels, PixelPrune())
    kept = made.kept.unflatten(0, (4, 4))
    assert bool(kept[0, 0])
    assert bool(kept[1, 1])
    assert 2 <= int(kept.sum()) < 8


def test_a_probe_reads_classes_and_rows_are_paired(vectors):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    centres = torch.eye(3, 8)[labels]
    features = torch.nn.functional.normalize(
        centres + 0.1 * torch.randn(60, 8, generator=generator), dim=1
    )
    weight, bias = vectors.probe(features, labels)

    def right(x):
        return torch.nn.functional.linear(x, weight, bias).argmax(1) == labels

    assert bool(right(features).all())
    tight, loose = (vectors.fit(features, labels, decay)[0].norm() for decay in (10.0, 1e-5))
    assert tight < 0.1 < 10 < loose
    moved = features.roll(1, 0)  # every image looks like one of the next class
    half = torch.where(torch.arange(60)[:, None] < 30, moved, features)
    found = vectors.rows(
        {
            ("all tokens", 1.0): [features],
            ("cls-drop, layer 3", 0.5): [half],
            ("random, layer 3", 0.5): [half, moved],
        },
        right,
    )
    by_name = {row["method"]: row for row in found}
    assert by_name["all tokens"]["accuracy"]["mean"] == 1
    assert by_name["cls-drop, layer 3"]["over all"]["mean"] == pytest.approx(-0.5)
    assert by_name["random, layer 3"]["accuracy"]["mean"] == pytest.approx(0.25)
    over = by_name["cls-drop, layer 3"]["over random"]["accuracy"]
    assert over["mean"] == pytest.approx(0.25)  # 0 or a half for each image, so it is sure
    assert 0.15 < over["low"] < over["high"] < 0.35
    assert "over random" not in by_name["random, layer 3"]
    assert vectors.rows({}) == []


def test_the_probe_goes_on_where_its_time_ended(tmp_path, monkeypatch):
    """Two classes that differ in colour, a random tower, two batches, one of them in time."""
    probes, real = (importlib.import_module(name) for name in ("_probe", "real_tower"))
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2,
        image_size=224, patch_size=16, projection_dim=8, initializer_range=0.2,
    )  # fmt: skip
    tower = CLIPVisionModelWithProjection(config).eval()
    for part, count in (("train", 5), ("test", 4)):
        for kind, colour in (("hat", (200, 20, 20)), ("shoe", (20, 20, 200))):
            (tmp_path / part / kind).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(0, 40, (40, 30, 3))
                image = Image.fromarray((noise + colour).astype(np.uint8))
                image.save(tmp_path / part / kind / f"{number}{kind}.jpg")
    monkeypatch.setattr(probes, "BATCH", 6)
    monkeypatch.setattr(probes, "KEEPS", (0.25,))
    monkeypatch.setattr(importlib.import_module("_tower"), "KEEPS", (0.25,))
    monkeypatch.setattr(probes, "EACH", 4)
    run = real.Run(tmp_path / "run", float("inf"))
    names = []

    def two_parts(name, make):
        names.append(name)
        return None if name == "clothes-6" else run.piece(name, make)

    first = probes.probed(tower, tmp_path, two_parts)
    sizes = [first[key] for key in ("photographs", "of", "trained on", "classes")]
    assert sizes == [6, 8, 8, 2]
    assert "clothes-6" in names
    found = probes.probed(tower, tmp_path, run.piece)
    assert found["photographs"] == 8
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["all tokens"]["accuracy"]["mean"] == 1
    assert rows["smaller image"]["cosine"]["mean"] < 0.9999
    assert {"toc3d", "pixelprune", "cls-drop, layer 9", "random, layer 1"} < set(rows)
    assert found["bfloat16"]["cosine"]["all tokens"]["least"] > 0.98
    ended = real.Run(tmp_path / "other", 0.0)
    assert probes.probed(tower, tmp_path, ended.piece) == {}
    with pytest.raises(FoveateError, match=r"there is no train/CLASS/\*\.jpg in"):
        probes.photographs(tmp_path / "run", "train")


def test_drops_share_the_layers_before_and_equal_whole_runs(monkeypatch, towers, methods, tower):
    monkeypatch.setattr(towers, "PROBED", (1, 2))
    monkeypatch.setattr(towers, "KEEPS", (0.5, 0.25))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    made = towers.dropped(tower, pixels, (4, 5))
    assert len(made) == 8
    for layer in (1, 2):
        for keep in (0.5, 0.25):
            alone = towers.embeddings_of(tower, pixels, ClsDrop((layer,), keep))
            assert torch.allclose(made[f"cls-drop, layer {layer}", keep][0], alone, atol=1e-6)
            drawn = made[f"random, layer {layer}", keep]
            control = methods.RandomDrop((layer,), keep, seed=5)
            control = towers.embeddings_of(tower, pixels, control)
            assert torch.allclose(drawn[1], control, atol=1e-6)
            assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)
            assert not torch.allclose(drawn[1], alone, atol=1e-3)


def test_rows_of_a_result_are_lines():
    real = importlib.import_module("real_tower")
    result = {
        "a": {"rows": [{"x": 1, "of": {"y": [2]}}, {"x": 3}]},
        "b": [],
        "rows": [{"z": "row 0"}],
    }
    text = real.written(result)
    assert json.loads(text) == result
    assert '\n   {"x": 1, "of": {"y": [2]}},\n' in text


def test_masks_are_cropped_as_photographs_are(towers, tmp_path):
    folder = tmp_path / "coco-cc"
    for part in ("images", "panoptic"):
        (folder / part).mkdir(parents=True)
    mask = np.zeros((64, 96, 3), np.uint8)
    mask[:, :16] = (1, 0, 0)  # outside of the square in the middle
    mask[:32, 48:80] = (2, 1, 0)
    Image.fromarray(mask).save(folder / "panoptic" / "a.png")
    Image.fromarray(mask).save(folder / "images" / "a.jpg")
    segments = [{"id": n, "isthing": 1, "iscrowd": 0} for n in (1, 258)]
    listed = [{"file": "a.jpg", "panoptic": "a.png", "segments": segments}]
    (folder / "annotations.json").write_text(json.dumps(listed))
    (photo,) = towers.photographs(tmp_path)
    assert photo.pixels.shape == (1, 3, 224, 224)
    (cells,) = photo.objects.areas.unflatten(1, (14, 14))
    assert bool((cells[:7, 7:] == 256).all())
    assert float(cells.sum()) == 112 * 112


def test_what_is_missing_is_told(towers, tmp_path):
    with pytest.raises(FoveateError, match=r"there is no tower in .*real_parts\.py --out"):
        towers.load(tmp_path)
    with pytest.raises(FoveateError, match=r"there is no coco-cc/annotations\.json"):
        next(towers.photographs(tmp_path))


def _number(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number, value):
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    value = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(value)) + value


def _tensor(name, kind, shape, raw):
    dims = b"".join(_field(1, size) for size in shape)
    return _field(5, dims + _field(2, kind) + _field(8, name) + _field(9, raw))


def test_weights_of_a_quantised_graph_get_their_names_and_scales():
    parts = importlib.import_module("real_parts")
    matrix = np.array([[100, -3], [7, -128], [0, 5]], np.int8)  # 3 inputs, 2 outputs
    zero, scale = np.array([-1, 0], np.int8), np.array([0.5, 2.0], np.float32)
    bias = np.arange(200, dtype=np.float32)
    node = _field(3, "/vision_model/encoder/layers.0/mlp/fc1/MatMul_quant")
    node += _field(4, "MatMulInteger")
    node = b"".join(_field(1, x) for x in ("x", "m_quantized", "x_zero", "m_zero_point")) + node
    zeros = b"".join(_field(5, value % 2**64) for value in zero.tolist())  # numbers, not raw
    graph = _field(1, node) + _tensor("m_quantized", 3, (3, 2), matrix.tobytes())
    graph += _tensor("m_scale", 1, (2,), scale.tobytes())
    graph += _field(5, _field(1, 2) + _field(2, 3) + _field(8, "m_zero_point") + zeros)
    graph += _tensor("vision_model.encoder.layers.0.mlp.fc1.bias", 1, (200,), bias.tobytes())
    found = parts.weights(parts.graph_of(_field(1, 7) + _field(7, graph)))
    layer = "vision_model.encoder.layers.0.mlp.fc1"
    assert set(found) == {f"{layer}.weight", f"{layer}.bias"}
    assert found[f"{layer}.weight"].tolist() == [[50.5, 4.0, 0.5], [-6.0, -256.0, 10.0]]
    assert found[f"{layer}.bias"].tolist() == bias.tolist()


def test_the_figure_is_made_from_the_result():
    page = importlib.import_module("_real_tower_page")
    assert page.FIGURE.read_text() == page.figure(page.load()), "run python benchmarks/quality.py"


def test_the_page_is_made_from_the_result():
    """With the reason for each method that is left out, and a figure for each that a text names."""
    page = importlib.import_module("_real_tower_page")
    section = page.section(page.load())
    assert section.rstrip() in (ROOT / "docs" / "results-real.md").read_text()
    assert "`divprune`" in section
    assert "`dtop`: decides by a head" in section
    assert "{" not in section
