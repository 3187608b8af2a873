"""Inside encoders of other layers: identity, oracles, batches, accounts, maps, heads, removal."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    VideoMAEForPreTraining,
    VJEPA2Model,
    YolosConfig,
    YolosModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import foveate
from foveate.errors import AttachError, InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.methods import FlowCut, GTPViT, ToC3D, TokenTransforming, ToMe
from tests.methods_for_tests import Listed, Mix
from tests.vision import oracle
from tests.vision.encoders import LAYERS, PATCHES, WIDE, row_of
from tests.vision.kinds import FRAMES, KINDS, build, first, given, last, vitpose
from tests.vision.test_encoders import CASES, TOLERANCE, distance
from tests.vision.test_maps import map_of

PAIRS = [
    (name, case)
    for name, kind in KINDS.items()
    for case in CASES
    if kind.class_token or not CASES[case][2]
]
FEW = [pair for pair in PAIRS if pair[1] in ("tome", "tome-keep", "cls-drop-3", "before")]


def results_of(kind, model, inputs, steps):
    """The plain output of a model, and the oracle of each image."""
    plain = model(**inputs, output_hidden_states=True)
    embedded = first(kind, plain.hidden_states[0])
    tower = find_family(model).encoder.tower
    return plain, oracle.run(tower, kind.special, embedded, steps, kind=kind.full)


@pytest.mark.parametrize("name", KINDS)
def test_the_oracle_itself_equals_the_encoder(name):
    kind = KINDS[name]
    model, inputs = build(kind.model), given(kind)
    with torch.no_grad():
        plain, results = results_of(kind, model, inputs, [])
    for row, full in enumerate(results):
        for got, want in zip(plain.hidden_states, full.states, strict=True):
            assert distance(first(kind, got[row]), want) <= TOLERANCE


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_every_state_equals_the_full_length_oracle(name, case):
    kind = KINDS[name]
    model, inputs = build(kind.model), given(kind)
    method, steps, _ = CASES[case]
    with torch.no_grad():
        plain, results = results_of(kind, model, inputs, steps)
        with foveate.use(model, method) as run:
            got = model(**inputs, output_hidden_states=True)
    for row, full in enumerate(results):
        states = got.hidden_states[case == "before-0" :]  # captured after a step before layer 0
        wanted = full.states[case == "before-0" :]
        worst = max(
            distance(first(kind, one[row]), want) for one, want in zip(states, wanted, strict=True)
        )
        bite = distance(plain.hidden_states[-1][row], got.hidden_states[-1][row])
        print(f"distance to the oracle {worst:.1e}, to the unpruned encoder {bite:.2f}")
        assert worst <= TOLERANCE
        assert bite > 0.05, "the test does not bite"
        assert list(run.kept[row]) == list(full.kept)
        for place, kept in full.kept.items():
            assert torch.equal(run.kept[row][place], kept)


@pytest.mark.parametrize("method", [ToMe(r=0), GTPViT(r=0), Listed(keep=1.0)])
@pytest.mark.parametrize("name", KINDS)
def test_keeping_everything_changes_no_bit(name, method):
    kind = KINDS[name]
    model, inputs = build(kind.model), given(kind)
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
        with foveate.use(model, method):
            got = model(**inputs, output_hidden_states=True)
        after = last(model(**inputs))
    assert torch.equal(last(got), last(want))
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))
    assert torch.equal(after, last(want)), "the model is not as it was"


@pytest.mark.parametrize(("name", "case"), FEW)
def test_batch_equals_rows(name, case):
    kind = KINDS[name]
    model, inputs = build(kind.model), given(kind, 4)
    with torch.no_grad(), foveate.use(model, CASES[case][0]) as run:
        together, kept = last(model(**inputs)), run.kept
        for row in range(4):
            alone = last(model(**row_of(inputs, row)))
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=5e-5)
            for place, index in kept[row].items():
                assert torch.equal(run.kept[0][place], index)


@pytest.mark.parametrize("name", KINDS)
def test_eager_attention_agrees_with_sdpa(name):
    kind, got = KINDS[name], []
    for attention in ("sdpa", "eager"):
        model = build(kind.model, attention)
        with torch.no_grad(), foveate.use(model, ToMe(r=6)):
            got.append(last(model(**given(kind))))
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", [Listed(keep=1.0), Listed(layer=0), Listed(2, inside=True)])
def test_predicted_flops_equal_the_ones_torch_counts(name, method):
    kind = KINDS[name]
    model, inputs = build(kind.heads or kind.model, "eager"), given(kind, 2)
    with torch.no_grad(), foveate.use(model, method) as run:
        with FlopCounterMode(display=False) as counter:
            find_family(model).base(**inputs, **kind.only)
        counted = account(run.record, run.family, run.methods).total
    assert counted == counter.get_total_flops()
    full, left = PATCHES + kind.special, 12 + kind.special
    rows = {1: [(full, full)], 0: [(left, left)], 2: [(full, full), (full, left), (left, left)]}
    assert set(run.record.encoder_tokens) == set(rows[1 if method.keep == 1.0 else method.layer])


@pytest.mark.parametrize(("name", "case"), FEW)
def test_maps_equal_those_of_the_full_length_oracle(name, case, monkeypatch):
    kind = KINDS[name]
    model, inputs = build(kind.model, "eager"), given(kind, 2)
    method, steps, _ = CASES[case]
    wanted, attend = [], oracle.Full.attend

    def note(full, layer):
        found = attend(full, layer)
        wanted.append(map_of(full, found[0]))
        return found

    with torch.no_grad():
        plain = model(**inputs, output_attentions=True).attentions
        monkeypatch.setattr(oracle.Full, "attend", note)
        results_of(kind, model, inputs, steps)
        with foveate.use(model, method):
            got = model(**inputs, output_attentions=True).attentions
    for number, of in enumerate(got):
        assert of.shape == plain[number].shape
        for image in range(2):
            mine = first(kind, first(kind, of[image]).transpose(1, 2)).transpose(1, 2)
            want = wanted[image * LAYERS + number]
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_dense_reduction_comes_back_to_full_length(name):
    kind = KINDS[name]
    model, inputs = build(kind.model), given(kind)
    with torch.no_grad(), foveate.use(model, Mix(layer=1, keep=9)) as run:
        out = model(**inputs, output_hidden_states=True)
    length = PATCHES + kind.special
    assert {tuple(of.shape) for of in out.hidden_states} == {(3, length, 32)}
    assert last(out).isfinite().all()
    assert [n for n, _ in run.record.encoder_tokens] == [length] * 2 + [9 + kind.special] * 2


@pytest.mark.parametrize("case", ["tome", "tome-schedule", "before"])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_finite_and_checkpointing_changes_none(name, case):
    """Merged tokens of the layers that run again count as often as they did."""
    kind, found = KINDS[name], []
    model, inputs = build(kind.heads or kind.model).train(), given(kind, 2)
    # Each layer would go back through the bias that all share, with a session or without.
    ways = (None, False) if name == "beit-shared" else (None, False, True)
    for reentrant in ways:
        model.zero_grad()
        torch.manual_seed(0)  # for paths that are dropped in training
        with foveate.use(model, CASES[case][0]):
            if reentrant is not None:  # within the session as before it
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            states = find_family(model).base(**inputs, output_hidden_states=True).hidden_states
            sum(of.square().mean() for of in states).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, *checkpointed = found
    assert all(of.isfinite().all() for of in plain.values())
    assert any("patch_embed" in n and of.abs().sum() > 0 for n, of in plain.items())
    for of in checkpointed:
        assert set(of) == set(plain)
        for key, want in plain.items():
            torch.testing.assert_close(of[key], want, rtol=1e-4, atol=1e-6)


def test_layers_run_again_only_within_the_session():
    kind = KINDS["yolos"]
    model = build(kind.model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint = model.encoder.layer[-1]._gradient_checkpointing_func
    with foveate.use(model, CASES["tome-schedule"][0]):
        states = model(**given(kind, 1)).last_hidden_state
    with pytest.raises(AttachError, match=r"call `backward\(\)` within the session"):
        states.sum().backward()
    assert model.encoder.layer[-1]._gradient_checkpointing_func is checkpoint


def test_checkpoints_around_hooks_are_refused_where_tokens_are_gone(monkeypatch):
    """As before transformers 5.23."""
    kind = KINDS["yolos"]
    model = build(kind.model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    call = torch.nn.Module.__call__
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", call, raising=False)
    with foveate.use(model, ToMe(r=0)):
        model(**given(kind, 1))
    refused = pytest.raises(UnsupportedModelError, match="gradient checkpointing runs a YolosLayer")
    with foveate.use(model, Listed(layer=2)), refused:
        model(**given(kind, 1))


@pytest.mark.parametrize("name", ["yolos"])
def test_methods_that_attend_see_special_rows_first(name, monkeypatch):
    kind, seen, attend = KINDS[name], [], GTPViT.attend

    def look(method, tokens, layer):
        seen.append((layer, attend(method, tokens, layer)))
        return seen[-1][1]

    monkeypatch.setattr(GTPViT, "attend", look)
    model, inputs = build(kind.model), given(kind, 1)
    with torch.no_grad(), foveate.use(model, GTPViT(r=4)):
        got = model(**inputs, output_hidden_states=True).hidden_states[0]
        full = kind.full(model, kind.special, first(kind, got[0]))
        query, key, value = full.project(find_family(model).encoder.layers[0])
    layer, mixed = seen[0]
    assert layer.special == kind.special
    for mine, want in zip((layer.query, layer.key, layer.value), (query, key, value), strict=True):
        torch.testing.assert_close(mine[0], want)
    torch.testing.assert_close(mixed, layer.plain())
    assert len(seen) == LAYERS


# -- heads


@pytest.mark.parametrize("case", ["tome", "cls-drop-3", "before"])
def test_detection_heads_read_the_detection_tokens(case):
    kind = KINDS["yolos"]
    model, inputs = build(kind.heads), given(kind)
    method, steps, _ = CASES[case]
    with torch.no_grad():
        plain = model(**inputs)
        _, results = results_of(kind, model, inputs, steps)
        with foveate.use(model, method):
            got = model(**inputs)
        rows = torch.stack([full.x for full in results])[:, 1 : 1 + kind.trailing]
        rows = model.vit.layernorm(rows)
        boxes = model.bbox_predictor(rows).sigmoid()
    assert got.last_hidden_state.shape == plain.last_hidden_state.shape
    torch.testing.assert_close(got.logits, model.class_labels_classifier(rows), rtol=0, atol=2e-5)
    torch.testing.assert_close(got.pred_boxes, boxes, rtol=0, atol=2e-5)
    assert (got.logits - plain.logits).abs().max() > 1e-3, "the test does not bite"


def test_positions_between_layers_are_refused():
    config = YolosConfig(**{**WIDE, "image_size": [48, 48]}, use_mid_position_embeddings=True)
    with pytest.raises(UnsupportedModelError, match="after each layer but the last"):
        foveate.use(YolosModel(config), ToMe())


@pytest.mark.parametrize("name", ["beit", "beit-shared"])
@pytest.mark.parametrize("method", [ToMe(r=5), Listed(layer=2)], ids=["tome", "before"])
def test_resized_positions_are_those_of_the_patches_that_are_left(name, method):
    """The model resizes the bias to the number of rows, which must be that of all."""
    model, inputs = build(KINDS[name].model), given(KINDS[name], 2)
    with torch.no_grad(), foveate.use(model, method):
        want = model(**inputs).last_hidden_state
        got = model(**inputs, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["tome", "cls-drop-3", "before"])
def test_beit_segments_by_the_plain_neck_and_head(case):
    model, inputs = build(KINDS["beit-shared"].heads), given(KINDS["beit-shared"])
    method, _, _ = CASES[case]
    with torch.no_grad():
        plain = model(**inputs).logits
        with foveate.use(model, method):
            got = model(**inputs).logits
        with foveate.use(model.beit, method):
            states = model.beit(**inputs, output_hidden_states=True).hidden_states
        maps = [of[:, 1:].transpose(1, 2).unflatten(2, (6, 6)) for of in states[:4]]
        want = model.decode_head(model.fpn(maps))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert got.shape == plain.shape
    assert (got - plain).abs().max() > 1e-3, "the test does not bite"


@pytest.mark.parametrize("case", ["tome", "cls-drop-3"])
def test_beit_classifies_by_what_is_left(case):
    kind = KINDS["beit"]
    model, inputs = build(kind.heads), given(kind)
    method, steps, _ = CASES[case]
    with torch.no_grad():
        _, results = results_of(kind, model, inputs, steps)
        with foveate.use(model, method):
            got = model(**inputs).logits
        mean = torch.stack([full.x[1:][full.alive[1:]].mean(0) for full in results])
        want = model.classifier(model.beit.pooler.layernorm(mean))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_attention_by_relative_position_is_refused_where_it_is_not_known():
    model = build(KINDS["beit"].model)
    with pytest.raises(UnsupportedModelError, match="adds a bias by relative position"):
        foveate.use(model, FlowCut(keep=10, every=1))
    with foveate.use(model, ToMe()), pytest.raises(InputError, match="attention_mask"):
        model(**given(KINDS["beit"], 1), attention_mask=torch.ones(1, PATCHES + 1))


def shapes_of(run):
    return {(image.frames, image.grid) for image in run.record.images}


@pytest.mark.parametrize("case", ["tome", "before"])
def test_video_classifiers_average_what_is_left_by_sizes(case):
    kind = KINDS["videomae"]
    model, inputs = build(kind.heads), given(kind)
    method, steps, _ = CASES[case]
    with torch.no_grad():
        plain = model(**inputs).logits
        embedded = model(**inputs, output_hidden_states=True).hidden_states[0]
        results = oracle.run(model.videomae, 0, embedded, steps, kind=kind.full)
        with foveate.use(model, method) as run:
            got = model(**inputs).logits
            assert shapes_of(run) == {(FRAMES, (3, 3))}
        mean = torch.stack([full.x[full.alive].mean(0) for full in results])
        want = model.classifier(model.fc_norm(mean))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert (got - plain).abs().max() > 1e-3, "the test does not bite"


@pytest.mark.parametrize("case", ["tome", "before"])
def test_predictors_and_poolers_of_videos_read_all_rows(case):
    """Each removed row with what stands for it, at its own place."""
    kind = KINDS["vjepa2"]
    videos = given(kind)
    model, classifier = build(kind.model), build(kind.heads)
    with torch.no_grad():
        for one in (model, classifier.vjepa2):
            _, results = results_of(kind, one, videos, CASES[case][1])
            states = one.encoder.layernorm(torch.stack([full.states[-1] for full in results]))
            if one is model:
                every = [torch.arange(PATCHES).expand(3, -1)]
                want = model.predictor(states, every, every).last_hidden_state
                with foveate.use(model, CASES[case][0]) as run:
                    got = model(**videos).predictor_output.last_hidden_state
                    assert shapes_of(run) == {(FRAMES, (3, 3))}
                plain = model(**videos).predictor_output.last_hidden_state
            else:
                want = classifier.classifier(classifier.pooler(states))
                with foveate.use(classifier, CASES[case][0]):
                    got = classifier(**videos).logits
                plain = classifier(**videos).logits
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
            assert (got - plain).abs().max() > 1e-3, "the test does not bite"


@pytest.mark.parametrize(("tubelet", "frames", "deep"), [(2, 1, 1), (3, 2, 2), (3, 7, 2)])
def test_frames_that_are_too_few_for_a_tubelet_are_repeated(tubelet, frames, deep):
    config = KINDS["vjepa2"].model().config
    config.tubelet_size = tubelet
    model = build(lambda: VJEPA2Model(config))
    video = torch.randn(1, frames, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), foveate.use(model, ToMe(r=1)) as run:
        model(pixel_values_videos=video)
    assert shapes_of(run) == {(deep, (3, 3))}


def test_rows_that_are_numbered_as_they_come_are_refused_where_fewer_go_through():
    model = build(KINDS["vjepa2"].model)
    with pytest.raises(UnsupportedModelError, match="told the position of every row"):
        foveate.use(model, ToC3D())


def test_attention_of_rows_that_are_turned_within_it_is_refused():
    with pytest.raises(UnsupportedModelError, match="turns queries and keys by position within"):
        foveate.use(build(KINDS["vjepa2"].model), TokenTransforming())


def test_hidden_patches_of_videos_are_refused():
    kind = KINDS["videomae"]
    model, inputs = build(kind.model), given(kind, 1)
    hidden = torch.arange(PATCHES)[None] < 10
    with pytest.raises(UnsupportedModelError, match="hides most patches"):
        foveate.use(VideoMAEForPreTraining(model.config), ToMe())
    with foveate.use(model, ToMe()), pytest.raises(InputError, match="26 of 36 patches"):
        model(**inputs, bool_masked_pos=hidden)


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("method", [ToMe(r=5), Listed(layer=2)], ids=["tome", "before"])
def test_heatmaps_are_those_of_the_plain_head(method, simple, monkeypatch):
    """Each image has an expert of its own."""
    model = vitpose(simple=simple)
    inputs = {**given(KINDS["vitpose"], 2), "dataset_index": torch.tensor([0, 2])}
    with torch.no_grad():
        plain = model(**inputs).heatmaps
        with foveate.use(model, ToMe(r=0)):
            assert torch.equal(model(**inputs).heatmaps, plain)
        with foveate.use(model, method):
            got = model(**inputs).heatmaps
            alone = torch.cat([model(**row_of(inputs, row)).heatmaps for row in range(2)])
        with foveate.use(model.backbone, method):
            states = model.backbone(**inputs, output_hidden_states=True).hidden_states[-1]
        maps = model.backbone.layernorm(states).transpose(1, 2).unflatten(2, (9, 4))
        want = model.head(maps)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(got, alone, rtol=0, atol=5e-5)
    assert (got - plain).abs().max() > 1e-3, "the test does not bite"
