"""Inside the tower of every family, from pixels: features and states against oracles of both."""

import functools

import pytest
import torch

import foveate
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.methods import ClsDrop, ToMe
from tests.conformance import oracle
from tests.conformance.test_pixels import NAMES, model_of, prompt
from tests.conformance.tolerance import kernel_of, tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import Listed
from tests.oracle import Spec
from tests.vision.towers import Drop, Full, Merge, Tower, encoder_of

TOLERANCE = 5e-5
TILED = ("llava_next", "llava_next_video", "llava_onevision-tiles")
REFUSED = ("llava_onevision", "llava_onevision-video", "video_llava-video", "molmo2", "molmo2-o")
CLOSED = [name for name in NAMES if MEMBERS[name].closed or MEMBERS[name].mixes]
WITHOUT = ("fast_vlm", "perception_lm", *CLOSED)
TOWERS = [name for name in NAMES if name not in (*REFUSED, *WITHOUT)]

CASES = {
    "before": (Listed(layer=1, keep=0.5), [Drop(1, 0.5)]),
    "before-0": (Listed(layer=0, keep=0.5), [Drop(0, 0.5)]),
    "inside": (Listed(layer=0, keep=0.5, inside=True), [Drop(0, 0.5, inside=True)]),
    "twice": (
        [Listed(layer=0, keep=0.8), Listed(layer=1, keep=0.5, inside=True)],
        [Drop(0, 0.8), Drop(1, 0.5, inside=True)],
    ),
    "tome": (ToMe(r=(2, 1)), [Merge(0, 2), Merge(1, 1)]),
    "tome-unweighted": (
        ToMe(r=(2, 1), prop_attn=False), [Merge(0, 2, False), Merge(1, 1, False)],
    ),
    "merge-then-drop": (
        [ToMe(r=(2,)), Listed(layer=1, keep=0.5)], [Merge(0, 2), Drop(1, 0.5)],
    ),
    "cls-drop": (ClsDrop(layers=(0,), keep=0.5), [Drop(0, 0.5, inside=True, by_class=True)]),
}  # fmt: skip
WITH_CLASS = ("internvl", "internvl-norms", "llava", "llava_next", "llava_next_video",
              "llava_next_video-video", "video_llava", "vipllava")  # fmt: skip
PAIRS = [(n, c) for n in TOWERS for c in CASES if c != "cls-drop" or n in WITH_CLASS]


@functools.cache
def seen(name):
    """A prompt; padding of images is noise, because equal patches could merge in any order."""
    inputs, counts = prompt(name)
    inputs = fresh(inputs)
    if (crops := inputs.get("image_pixel_values")) is not None:
        crops += torch.randn(crops.shape, generator=torch.Generator().manual_seed(3)) * (crops == 0)
    if "pixel_attention_mask" in inputs:
        noise = torch.randn(
            inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(3)
        )
        real = inputs["pixel_attention_mask"][:, :, None]
        if real.dim() == 3:  # of patches, or of tiles, which the model leaves out
            if inputs["pixel_values"].dim() == 3:
                inputs["pixel_values"] += noise * (1 - real)
            return inputs, counts
        empty = inputs["pixel_values"].flatten(2).eq(0).all(2)[..., None, None, None]
        inputs["pixel_values"] += noise * ~real * ~empty
    return inputs, counts


@functools.cache
def known(name):
    """The tower of a member, what its layers are handed, and the rows of each visual token."""
    model, (inputs, counts) = model_of(name), seen(name)
    encode = encoder_of(model, MEMBERS[name].modality, member_pixels(name, inputs))
    tower = Tower(model)
    tokens = tower.tokens(encode)
    return tower, encode, tower.record(encode), tokens, counts


def member_pixels(name, inputs):
    return {k: v for k, v in inputs.items() if k in MEMBERS[name]().pixels(1)}


def images_of(name, calls, tokens, counts):
    """Rows of each token of each image that goes through the encoder."""
    hidden = calls[0][0][0]
    if name in TILED:
        special = hidden.shape[1] - 16
        return [
            [[n * hidden.shape[1] + special + i] for i in range(16)] for n in range(len(hidden))
        ]
    if name == "phi4_multimodal":  # crops of 2 x 2 tokens, each of 2 x 2 patches
        cell = [0, 1, 4, 5]
        return [
            [[n * 16 + first + i for i in cell] for first in (0, 2, 8, 10)]
            for n in range(len(hidden))
        ]
    if name == "llava_next_video-video":
        counts = [4] * (len(tokens) // 4)
    return [[token for token in part if token] for part in split(tokens, counts)]


def split(items, counts):
    items = iter(items)
    return [[next(items) for _ in range(count)] for count in counts]


def survivors(full, tokens, counts):
    """Whether each visual token is alive: its rows are, or it is a newline whose line lives, or it
    begins or ends an image, or separates its parts.
    """
    rows = {
        row: full.tokens[p][t]
        for p in range(len(full.tokens)) for t in range(len(full.tokens[p]))
        for row in full.tokens[p][t]
    }  # fmt: skip
    stands = {full.tokens[p][t][0] for p in range(len(full.tokens)) for t in full.kept(p)}
    images = []
    for image in split(tokens, counts):
        alive = [bool(token) and rows[token[0]][0] in stands for token in image]
        newlines = [i for i, token in enumerate(image) if not token]
        start = 16 if newlines and newlines[0] > 16 else 0
        if newlines[:1] == [0]:
            alive[0] = alive[-1] = True
            start, newlines = 1, newlines[1:-1]
        for newline in newlines:
            separates = newline == start
            alive[newline] = separates or any(alive[start:newline])
            start = newline + 1
        images.append(torch.tensor(alive))
    return images


def run_oracle(name, case):
    tower, _, calls, tokens, counts = known(name)
    full = Full(tower, calls, images_of(name, calls, tokens, counts))
    full.run(CASES[case][1])
    return full, survivors(full, tokens, counts)


def rows(pooled):
    return torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in pooled])


def sheets(output):
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]


@pytest.mark.parametrize("name", TOWERS)
def test_the_oracle_itself_equals_the_tower(name):
    tower, encode, calls, tokens, counts = known(name)
    full = Full(tower, calls, images_of(name, calls, tokens, counts)).run([])
    with torch.no_grad():
        want = encode()
        with tower.replaced(full.states):
            got = encode()
    for mine, theirs in zip(sheets(got), sheets(want), strict=True):
        torch.testing.assert_close(rows(mine), rows(theirs), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_features_equal_those_of_the_full_length_oracle(name, case):
    tower, encode, *_ = known(name)
    full, alive = run_oracle(name, case)
    with torch.no_grad():
        plain = encode()
        with tower.replaced(full.states):
            want = encode()
        with foveate.use(tower.model, CASES[case][0]):
            got = encode_again(name)
    mask = torch.cat(alive)
    assert 0 < mask.sum() < len(mask)
    worst = bite = 0.0
    for mine, theirs, unpruned in zip(*map(sheets, (got, want, plain)), strict=True):
        mine, theirs, unpruned = rows(mine), rows(theirs), rows(unpruned)
        assert torch.equal(~mine[:, 0].isnan(), mask)
        scale = theirs[mask].abs().mean().clamp(min=1)
        worst = max(worst, ((mine - theirs)[mask].abs().max() / scale).item())
        bite = max(bite, ((mine - unpruned)[mask].abs().max() / scale).item())
    print(f"{name} {case}: {int(mask.sum())} of {len(mask)}, {worst:.1e}, bite {bite:.2f}")
    assert worst <= TOLERANCE
    assert bite > 1e-3, "the test does not bite"


def encode_again(name):
    """Features within a session, whose wrapper sits on the method of the model."""
    inputs, _ = seen(name)
    return encoder_of(model_of(name), MEMBERS[name].modality, member_pixels(name, inputs))()


@pytest.mark.parametrize(("name", "case"), [p for p in PAIRS if p[1] in ("inside", "tome")])
def test_from_pixels_to_states_equals_both_oracles(name, case):
    member, model, eager = MEMBERS[name](), model_of(name), model_of(name, "eager")
    model = model_of(name, kernel_of(model))
    inputs, counts = seen(name)
    full, alive = run_oracle(name, case)
    kept = [of.nonzero()[:, 0] for of in alive]
    method = CASES[case][0]
    with torch.no_grad(), foveate.use(model, method) as run:
        got = model.model(**fresh(inputs)).last_hidden_state[0]
        record = run.record
    assert [image.total for image in record.images] == counts
    for image, index in zip(record.images, kept, strict=True):
        assert torch.equal(list(image.kept.values())[-1], index)
    length = inputs["input_ids"].shape[1]
    renumber = find_family(model).one_dimensional
    with Tower(eager).replaced(full.states):
        spec = Spec(kept=kept, renumber=renumber)
        want, _ = oracle.run(member, eager, fresh(inputs), spec, length, counts)
    plain, _ = oracle.run(member, eager, fresh(inputs), Spec(), length, counts)
    visual = (inputs["input_ids"][0] == member.image_id).nonzero()[:, 0].split(counts)
    left = torch.ones(length, dtype=torch.bool)
    for columns, index in zip(visual, kept, strict=True):
        left[columns] = False
        left[columns[index]] = True
    worst = (want - got)[left].abs().max().item()
    bite = (plain - got)[left].abs().max().item()
    print(f"{name} {case}: {worst:.1e}, bite {bite:.2f}")
    assert worst <= tolerance_of(name, model)
    assert bite > 0.02, "the test does not bite"


def test_a_newline_lives_with_its_line():
    """Not with the thumbnail before the first line, unless that is alone."""
    family, member = find_family(model_of("llava_next")), MEMBERS["llava_next"]()
    arguments = member.take(member.pixels(3), 2, 3)
    alive = torch.zeros(3, 16, dtype=torch.bool)
    alive[0] = True
    (tokens,) = family.follow("image", list(alive), arguments)
    assert tokens[:16].all()
    assert not tokens[16:].any()
    alive[1, 9] = True  # in the second line: unpadding cuts off the first row of patches
    (tokens,) = family.follow("image", list(alive), arguments)
    lines = tokens[16:].view(6, 5)
    assert lines[1].sum() == 2
    assert lines[1, -1]
    assert lines.sum() == 2

    family, member = find_family(model_of("llava_onevision-tiles")), MEMBERS["llava_onevision"]()
    arguments = member.take(member.pixels(3), 0, 2) | {"batch_num_images": torch.tensor([2])}
    alive = torch.zeros(2, 16, dtype=torch.bool)
    alive[1, 3] = True
    first, second = family.follow("image", list(alive), arguments)
    assert not first.any()
    assert second.nonzero()[:, 0].tolist() == [3, 16]


def test_newlines_and_ends_around_cells():
    """Two images of 2 x 3 and 1 x 2 cells: signals, survivors and sources of their tokens."""
    family = find_family(model_of("hunyuan_vl"))
    arguments = {"image_grid_thw": torch.tensor([(1, 4, 6), (1, 2, 4)])}
    signal = [torch.arange(6.0)[None], torch.tensor([[7.0, 8.0]])]
    first, second = family.per_token("image", signal, arguments, -1.0)
    assert first.tolist() == [[-1, 0, 1, 2, -1, 3, 4, 5, -1, -1]]
    assert second.tolist() == [[-1, 7, 8, -1, -1]]
    alive = [torch.tensor([0, 0, 0, 0, 1, 0]).bool(), torch.tensor([0, 0]).bool()]
    first, second = family.follow("image", alive, arguments)
    assert first.nonzero()[:, 0].tolist() == [0, 6, 8, 9]
    assert second.nonzero()[:, 0].tolist() == [0, 4]
    sources = family.sources("image", 15, arguments).tolist()
    assert sources == [0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 6, 6, 7, 7, 7]


# -- refusals


@pytest.mark.parametrize(
    ("name", "why"),
    [("molmo2", "by attention"), ("perception_lm", "from timm"), ("fast_vlm", "from timm")],
)
def test_towers_whose_tokens_do_not_follow_are_refused_when_planned(name, why):
    with pytest.raises(UnsupportedModelError, match=f"inside the encoder.*{why}.* work here"):
        foveate.use(model_of(name), ToMe())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llava_onevision", "so many tiles are interpolated"),
        ("llava_onevision-video", "frames are interpolated"),
        ("video_llava-video", "class tokens of video frames"),
        ("llava_next_video-video", "by a convolution"),
    ],
)
def test_pixels_whose_tokens_do_not_follow_are_refused(name, why, monkeypatch):
    """The same session goes on with what it can follow, and the model without it."""
    model, (inputs, _) = model_of(name), prompt(name)
    if "convolution" in why:
        monkeypatch.setattr(model.config, "spatial_pool_mode", "conv")
    with torch.no_grad(), foveate.use(model, ToMe(r=2)):
        with pytest.raises(UnsupportedModelError, match=why) as error:
            model(**fresh(inputs))
        assert model.config.model_type in str(error.value)
        assert "tome" in str(error.value)
        assert "ethods that work here: " in str(error.value)
    monkeypatch.undo()
    with torch.no_grad():
        model(**fresh(inputs))


def test_images_that_do_not_divide_into_cells_are_refused():
    model, member = model_of("mistral3"), MEMBERS["mistral3"]()
    pixels = member.pixels(2)
    pixels["image_sizes"][1, 0] = 36  # nine patches high
    with (
        torch.no_grad(), foveate.use(model, Listed()),
        pytest.raises(InputError, match="9 x 12 patches does not divide into cells of 2 x 2"),
    ):  # fmt: skip
        model.model.get_image_features(**pixels, return_dict=True)


@pytest.mark.parametrize("name", TOWERS)
def test_hidden_states_can_be_asked_for_where_a_tower_merges_its_last_rows(name):
    """The last hidden state is then what the merger made, which is at its own length already."""
    model = model_of(name)
    with torch.no_grad(), foveate.use(model, ToMe(r=(2, 1))):
        out = model(**fresh(seen(name)[0]), output_hidden_states=True)
    assert all(states.isfinite().all() for states in out.hidden_states)


@pytest.mark.parametrize("case", ["before-0", "twice", "tome"])
def test_the_route_of_a_call_says_the_side_of_tokens(case):
    """Granite Docling's tokens are single patches on the fine route."""
    model, member = model_of("granite_docling"), MEMBERS["granite_docling"]()
    pixels = {**member.pixels(2), "tile_fine_mask": torch.ones(1, dtype=torch.bool)}
    encode, tower = encoder_of(model, "image", pixels), Tower(model)
    tokens, calls = tower.tokens(encode), tower.record(encode)
    counts = [4 * member.visual] * 2
    full = Full(tower, calls, split(tokens, counts)).run(CASES[case][1])
    mask = torch.cat(survivors(full, tokens, counts))
    assert all(len(rows) == 1 for rows in tokens)
    with torch.no_grad():
        with tower.replaced(full.states):
            want = encode()
        with foveate.use(model, CASES[case][0]):
            got = encoder_of(model, "image", pixels)()
    for mine, theirs in zip(sheets(got), sheets(want), strict=True):
        assert torch.equal(~rows(mine)[:, 0].isnan(), mask)
        torch.testing.assert_close(rows(mine)[mask], rows(theirs)[mask], rtol=0, atol=TOLERANCE)
