"""What sessions inside towers keep: bits, kernels, videos, batches, beams, gradients, the model."""

import copy
import threading

import pytest
import torch
from transformers import AttentionInterface

import foveate
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.methods import DivPrune, PyramidDrop, ToMe
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of, prompt
from tests.conformance.test_pixels_grids import VIDEO
from tests.conformance.test_pixels_grids import prompt as prompt_on_grids
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.towers import pictures
from tests.methods_for_tests import Average, EveryThird, Listed, Mix
from tests.vision.test_session import snapshot
from tests.vision.test_towers import CASES, TOLERANCE, TOWERS, member_pixels, rows, sheets, split
from tests.vision.towers import Full, Tower, encoder_of

GRIDS = [name for name in VIDEO if name in TOWERS]
SEGMENTS = [
    "cosmos3_edge", "dots3_note", "ernie4_5_vl_moe", "exaone4_5", "glm4v", "glm_ocr", "kimi_k25",
    "minimax_m3_vl", "muse_glimmer", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl",
    "qwen2_vl", "qwen3_vl",
]  # fmt: skip
PACKED = [*SEGMENTS, "mistral3", "llava-pixtral"]
SOME = ["qwen2_5_vl", "qwen3_vl", "mistral3", "internvl", "llava_next", "idefics3", "ovis2"]


@pytest.mark.parametrize("name", TOWERS)
def test_keeping_everything_changes_no_bit(name):
    model, (inputs, counts) = model_of(name), prompt(name)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        want, said = model(**fresh(inputs)).logits, model.generate(**fresh(inputs), **options)
        for method in (ToMe(r=0), ToMe(keep=1.0), Listed(keep=1.0), Listed(0, 1.0, inside=True)):
            with foveate.use(model, method) as run:
                assert torch.equal(model(**fresh(inputs)).logits, want)
                assert [image.total for image in run.record.images] == counts
                assert torch.equal(model.generate(**fresh(inputs), **options), said)


# -- kernels


@pytest.mark.parametrize("case", ["inside", "tome", "merge-then-drop"])
@pytest.mark.parametrize("name", TOWERS)
def test_eager_attention_agrees_with_sdpa(name, case):
    """Features, with the same tokens left, but for ties."""
    got = []
    for attention in ("sdpa", "eager"):
        model, (inputs, _) = model_of(name, attention), prompt(name)
        pixels = member_pixels(name, inputs)
        pixels = {
            k: v for k, v in pixels.items() if k != "pixel_attention_mask" or v.dim() == 2
        }  # but for patches
        with torch.no_grad(), foveate.use(model, CASES[case][0]):
            got.append(rows(encoder_of(model, MEMBERS[name].modality, pixels)().pooler_output))
    torch.testing.assert_close(*got, rtol=0, atol=TOLERANCE, equal_nan=True)


def segments_kernel(calls):
    """A flash kernel with segments, in plain torch, and what it is told."""

    def kernel(module, query, key, value, attention_mask, scaling=None, **told):
        assert attention_mask is None
        bounds, longest = told["cu_seq_lens_q"], told["max_length_q"]
        assert torch.equal(bounds, told["cu_seq_lens_k"])
        assert longest == told["max_length_k"] == int(bounds.diff().max())
        assert isinstance(longest, int)
        assert bounds.dtype == torch.int32
        assert bounds[0] == 0
        assert bounds[-1] == query.shape[2]
        assert bool((bounds.diff() > 0).all())
        calls.append(bounds.tolist())
        each = torch.arange(query.shape[1]) // (query.shape[1] // key.shape[1])
        key, value, mixed = key[:, each], value[:, each], torch.empty_like(query)
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            part = slice(start, stop)
            scores = query[:, :, part] @ key[:, :, part].transpose(2, 3) * scaling
            mixed[:, :, part] = scores.softmax(-1) @ value[:, :, part]
        return mixed.transpose(1, 2), None

    return kernel


@pytest.mark.parametrize("case", ["before-0", "twice", "tome-unweighted"])
@pytest.mark.parametrize("name", PACKED)
def test_kernels_with_segments_are_told_those_that_are_left(name, case, monkeypatch):
    model, (inputs, _) = model_of(name), prompt(name)
    calls = []
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "emulated_flash", segments_kernel(calls)
    )
    tower, method = Tower(model).module, CASES[case][0]
    with torch.no_grad():
        with foveate.use(model, method):
            want = encoder_of(model, "image", member_pixels(name, inputs))().pooler_output
        assert not calls
        monkeypatch.setattr(tower.config, "_attn_implementation", "emulated_flash")
        with foveate.use(model, method) as run:
            got = encoder_of(model, "image", member_pixels(name, inputs))().pooler_output
    assert run.record is None, "no forward has run"
    torch.testing.assert_close(rows(got), rows(want), rtol=0, atol=TOLERANCE, equal_nan=True)
    assert len(calls) == 3
    assert calls[-1][-1] < calls[0][-1] or case == "before-0"
    with pytest.raises(UnsupportedModelError, match="proportional attention"):
        foveate.use(model, ToMe())


def test_windows_lose_what_lies_in_them():
    """Of an 8 x 8 image in windows of 2 x 2 tokens, every window that is left keeps its own."""
    model, member = model_of("qwen2_5_vl"), MEMBERS["qwen2_5_vl"]()
    told = []

    def note(module, args, kwargs):
        told.append((kwargs["cu_seqlens"].tolist(), kwargs["position_embeddings"][0], args[0]))

    blocks = model.model.visual.blocks
    with torch.no_grad(), foveate.use(model, Listed(layer=0, keep=5)):
        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
        encoder_of(model, "image", member.pixels(1))()
    for handle in handles:
        handle.remove()
    # Tokens 0, 3, 6, 9, 12 of 4 x 4 are left; windows hold 0-1 4-5, 2-3 6-7, 8-9 12-13, 10-15.
    assert told[0][0] == told[2][0] == [0, 4, 12, 20]
    assert told[1][0] == [0, 20]
    assert all(len(rotary) == len(states) == 20 for _, rotary, states in told)


@pytest.mark.parametrize("case", ["twice", "tome"])
@pytest.mark.parametrize("name", PACKED)
def test_images_of_one_size_in_a_sequence_keep_what_they_keep_alone(name, case):
    """The first and the third of three images are reduced together."""
    model, member = model_of(name), MEMBERS[name]()
    if name in SEGMENTS:
        grids = torch.tensor([(1, 8, 8), (1, 4, 12), (1, 8, 8)])
        pixels = {"pixel_values": member.patches(grids, 0), "image_grid_thw": grids}
    else:
        sizes = torch.tensor([(16, 40), (32, 48), (16, 40)])
        pixels = {"pixel_values": pictures(3, 3, 48, 48), "image_sizes": sizes}
    with torch.no_grad(), foveate.use(model, CASES[case][0]):
        together = encoder_of(model, "image", pixels)().pooler_output
        for number, feature in enumerate(together):
            one = member.take(pixels, number, number + 1)
            (alone,) = encoder_of(model, "image", one)().pooler_output
            torch.testing.assert_close(feature, alone, rtol=0, atol=TOLERANCE, equal_nan=True)
    assert not torch.equal(together[0].isnan(), together[2].isnan()) or case == "twice"


@pytest.mark.parametrize("case", ["twice", "tome"])
def test_images_of_one_grid_whose_cells_differ_keep_what_they_keep_alone(case):
    """Tokens of the first and third image are 2 x 2 patches, of the second one patch."""
    model, member = model_of("video_llama_3"), MEMBERS["video_llama_3"]()
    grids, sides = torch.tensor([(1, 8, 8), (1, 4, 4), (1, 8, 8)]), torch.tensor([2, 1, 2])
    pixels = {"pixel_values": member.patches(grids, 0), "image_grid_thw": grids}
    pixels["image_merge_sizes"] = sides
    with torch.no_grad(), foveate.use(model, CASES[case][0]):
        together = encoder_of(model, "image", pixels)().pooler_output
        assert [len(feature) for feature in together] == [16, 16, 16]
        for number, feature in enumerate(together):
            one = member.take(pixels, number, number + 1)
            (alone,) = encoder_of(model, "image", one)().pooler_output
            torch.testing.assert_close(feature, alone, rtol=0, atol=TOLERANCE, equal_nan=True)
            assert feature.isnan().any()


# -- videos


def video_tokens(name):
    """Visual tokens of the video of a member, as images of its encoder."""
    frame = 8
    return [frame] * 3 if name.startswith("glm") else [3 * frame]


@pytest.mark.parametrize("case", ["inside", "tome", "merge-then-drop"])
@pytest.mark.parametrize("name", GRIDS)
def test_videos_on_grids_equal_the_oracle(name, case):
    """GLM's frames are images of their own, Qwen's are one image in segments."""
    model, clip = model_of(name), MEMBERS[name]().clip()
    tower, encode = Tower(model), encoder_of(model, "video", clip)
    tokens, calls = tower.tokens(encode), tower.record(encode)
    full = Full(tower, calls, split(tokens, video_tokens(name))).run(CASES[case][1])
    alive = torch.zeros(24, dtype=torch.bool)
    for picture, count in enumerate(video_tokens(name)):
        alive[[picture * count + token for token in full.kept(picture)]] = True
    with torch.no_grad():
        with tower.replaced(full.states):
            want = encode()
        with foveate.use(model, CASES[case][0]):
            got = encoder_of(model, "video", clip)()
    for mine, theirs in zip(sheets(got), sheets(want), strict=True):
        mine, theirs = rows(mine), rows(theirs)
        assert torch.equal(~mine[:, 0].isnan(), alive)
        torch.testing.assert_close(mine[alive], theirs[alive], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in GRIDS if name.startswith("qwen")])
def test_images_and_videos_of_one_prompt_keep_what_they_keep_alone(name):
    model, (inputs, counts, _) = model_of(name), prompt_on_grids(name, "both")
    method, member = ToMe(r=2), MEMBERS[name]()
    kept = {}
    with torch.no_grad(), foveate.use(model, method) as run:
        model.model(**fresh(inputs))
        together = [list(image.values())[-1] for image in run.kept]
        totals = [image.total for image in run.record.images]
        for modality, given in (("image", member.pixels(2)), ("video", member.clip())):
            pooled = encoder_of(model, modality, given)().pooler_output
            kept[modality] = [(~feature[:, 0].isnan()).nonzero()[:, 0] for feature in pooled]
    assert totals == counts
    alone = [kept["image"][0], kept["video"][0], kept["image"][1]]
    for mine, other in zip(together, alone, strict=True):
        assert torch.equal(mine, other)


# -- with other stages, in batches, under beams


@pytest.mark.parametrize("name", SOME)
def test_a_row_gets_what_it_gets_alone_through_all_stages(name):
    """Rows of two images, none, and one, of different sizes."""
    model = model_of(name)
    inputs, alone = batch_of(MEMBERS[name](), model, (2, 0, 1))
    first = max(1, find_family(model).first_llm_layer)
    legal = next(i for i in find_family(model).attention_layers if i >= first)
    methods = [
        Listed(layer=0, keep=0.8, positions="original"), ToMe(r=(0, 2), positions="original"),
        DivPrune(keep=0.6, positions="original"), PyramidDrop((legal,), 0.5, "original"),
    ]  # fmt: skip
    with torch.no_grad(), foveate.use(model, methods) as run:
        together, kept = model.model(**fresh(inputs)).last_hidden_state[:, -1], iter(run.kept)
        for state, row in zip(together, alone, strict=True):
            want = model.model(**fresh(row)).last_hidden_state[0, -1]
            torch.testing.assert_close(state, want, rtol=0, atol=TOLERANCE)
            for image in run.kept:
                mine = next(kept)
                assert list(mine) == ["vision:0", "vision:1", "pre_llm", f"llm:{legal}"]
                assert all(torch.equal(mine[place], image[place]) for place in image)


@pytest.mark.parametrize("method", [EveryThird(3), Average(keep=0.5, layer=3)], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_methods_after_the_tower_see_what_it_left(name, method):
    model, (inputs, counts) = model_of(name), prompt(name)
    with torch.no_grad(), foveate.use(model, [Listed(layer=0, keep=0.7), method]) as run:
        model.model(**fresh(inputs))
    for image, total in zip(run.kept, counts, strict=True):
        first, last = image.values()
        assert 0 < len(last) < len(first) < total
        assert bool(torch.isin(last, first).all())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "mistral3", "gemma4"])
def test_beams_share_what_the_encoder_left(name):
    model, (inputs, _) = model_of(name), prompt(name)
    with torch.no_grad(), foveate.use(model, ToMe(r=2)) as run:
        model(**fresh(inputs))
        once = run.kept
        model.generate(**fresh(inputs), max_new_tokens=3, num_beams=2, do_sample=False)
        twice = run.kept
    for mine, other in zip(twice, 2 * once, strict=True):
        assert all(torch.equal(mine[place], other[place]) for place in other)


# -- training, and what is left behind


@pytest.mark.parametrize("method", [ToMe(r=2), Listed(layer=1, keep=0.5), Mix(keep=2)], ids=str)
@pytest.mark.parametrize("name", [*SOME, "glm4v", "paddleocr_vl", "gemma3", "gemma4"])
def test_gradients_are_finite_and_reach_the_tower(name, method):
    """Mixing into a few tokens is dense, and runs on every kind of tower as well."""
    model, (inputs, _) = model_of(name), prompt(name)
    model.zero_grad()
    ids = inputs["input_ids"]
    with foveate.use(model, method):
        model(**fresh(inputs), labels=ids.masked_fill(ids >= 80, -100)).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert all(grad.isfinite().all() for grad in grads.values())
    first = [g for n, g in grads.items() if "patch" in n and "norm" not in n and "merger" not in n]
    assert first
    assert any(grad.abs().sum() > 0 for grad in first)


@pytest.mark.parametrize("method", [ToMe(r=(2,)), Listed(layer=1, keep=0.5)], ids=str)
@pytest.mark.parametrize("name", [*SOME, "gemma4"])
def test_checkpointing_the_tower_changes_no_gradient(name, method):
    """Layers that run again see merged tokens as often as they did."""
    model, (inputs, _) = copy.deepcopy(model_of(name)).train(), prompt(name)
    ids, found = inputs["input_ids"], []
    for checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with foveate.use(model, method):
            model(**fresh(inputs), labels=ids.masked_fill(ids >= 80, -100)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for key, want in found[0].items():
        torch.testing.assert_close(found[1][key], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TOWERS)
def test_leaving_restores_the_model(name):
    model, (inputs, _) = model_of(name), prompt(name)
    with torch.no_grad():
        want, before = model(**fresh(inputs)).logits, snapshot(model)
        with foveate.use(model, ToMe(r=2)):
            assert not torch.equal(model(**fresh(inputs)).logits, want)
            assert snapshot(model) != before
        assert snapshot(model) == before
        assert torch.equal(model(**fresh(inputs)).logits, want)


@pytest.mark.parametrize("where", ["this thread", "another thread"])
def test_a_record_tells_the_encoder_pass_of_its_own_features(where):
    """Not the last pass: of another image, or of another thread's."""
    model, member = model_of("qwen2_5_vl"), MEMBERS["qwen2_5_vl"]()
    pixels = member.pixels(2)
    images = [member.take(pixels, 0, 1), member.take(pixels, 1, 2)]
    count, other = (member.counts(model, image)[0] for image in images)
    assert count != other
    ids = torch.tensor([[5, *[member.image_id] * count, 6, 7]])
    inputs = {"input_ids": ids, **member.extras(ids, 1)}
    with torch.no_grad(), foveate.use(model, ToMe(keep=0.5)) as run:
        model(**fresh(inputs | images[0]))
        want, flops = run.record, str(run.report())
        made = model.model.get_image_features(**fresh(images[0]), return_dict=True)
        model.model.get_image_features(**fresh(images[1]), return_dict=True)
        given = inputs | {k: v for k, v in images[0].items() if k != "pixel_values"}
        found = []

        def ask():
            with torch.no_grad():
                model(**fresh(given), mm_encoder_outputs={"image": made})
                found.append((run.record, str(run.report())))

        if where == "this thread":
            ask()
        else:
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
    got, told = found[0]
    assert got.encoder_tokens == want.encoder_tokens
    assert all(map(torch.equal, got.encoder_bounds, want.encoder_bounds))
    assert told == flops
