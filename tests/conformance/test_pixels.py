"""Real vision towers: pixels, packing, projector, pruning, and the oracle on the same pixels."""

import functools

import pytest
import torch

import foveate
from foveate.core.tokens import Shape
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.methods import FasterVLM, PyramidDrop
from tests.conformance import oracle
from tests.conformance.batches import batch_of
from tests.conformance.tolerance import TOLERANCE, kernel_of, tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh, loud
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

IMAGES = 3
NAMES = [name for name in sorted(MEMBERS) if MEMBERS[name]().pixels(1) is not None]
WITH_CLASS_TOKEN = [name for name in NAMES if MEMBERS[name].class_attention]


@functools.cache
def model_of(name, attention="sdpa"):
    """A member's model whose tower and projector are loud enough to matter."""
    return loud(MEMBERS[name]().build(attention))


@functools.cache
def prompt(name):
    """A row of text and images of several sizes, and the visual tokens of each image."""
    member = MEMBERS[name]()
    pixels = member.pixels(IMAGES)
    counts = member.counts(model_of(name), pixels)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (4,), generator=generator).tolist()
    for count in counts:
        ids += [member.image_id] * count
        ids += torch.randint(3, 80, (5,), generator=generator).tolist()
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | member.extras(ids, len(counts)) | pixels, counts


def class_scores(name):
    """(V) class-token attention of each image's tokens, from eager attention weights."""
    member, model = MEMBERS[name](), model_of(name, "eager")
    weights = []
    attention = model.get_submodule(member.class_attention.format(member.class_layer))
    hook = attention.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    with torch.no_grad():
        member.encode(model, member.pixels(IMAGES))
    hook.remove()
    return member.class_scores(model, member.pixels(IMAGES), weights[0].mean(1)[:, 0, 1:])


def case(name, kind, counts):
    """A method, and what the oracle must do for it."""
    images, few = len(counts), min(counts) // 3
    if kind == "llm":
        family = find_family(model_of(name))
        legal = [i for i in family.attention_layers if i >= max(1, family.first_llm_layer)]
        drops = [
            Drop(layer, layer, [kept] * images)
            for layer, kept in ((legal[0], 2 * few), (legal[-1], few))
        ]
        method = PyramidDrop((legal[0], legal[-1]), (2 * few, few), "original")
        return method, Spec(drops=drops)
    if kind == "pre_llm":
        return EveryThird(few), Spec(kept=[torch.arange(0, 3 * few, 3)] * images)
    kept = [score.topk(few).indices.sort().values for score in class_scores(name)]
    return FasterVLM(few, "original"), Spec(kept=kept)


@pytest.mark.parametrize("kind", ["llm", "pre_llm", "cls_attention"])
@pytest.mark.parametrize("name", NAMES)
def test_pruning_after_a_real_tower_equals_the_oracle(name, kind):
    member, model, eager = MEMBERS[name](), model_of(name), model_of(name, "eager")
    model = model_of(name, kernel_of(model))
    inputs, counts = prompt(name)
    if kind == "cls_attention" and not member.class_attention:
        with (
            pytest.raises(
                UnsupportedModelError,
                match=r"(class.token|cls_attention).*[Mm]ethods that work here",
            ),
            foveate.use(model, "fastervlm"),
        ):
            model(**fresh(inputs))
        return
    method, spec = case(name, kind, counts)
    seen = []
    head = member.head(model)
    hook = head.register_forward_pre_hook(lambda m, args: seen.append(args[0][0, -1]))
    with torch.no_grad(), foveate.use(model, method) as run:
        got = member.run(model, **fresh(inputs)).last_hidden_state[0]
        kept = [list(image.values()) for image in run.kept]
        model.generate(**fresh(inputs), max_new_tokens=1, do_sample=False)
    hook.remove()
    length = inputs["input_ids"].shape[1]
    want, history = oracle.run(member, eager, fresh(inputs), spec, length, counts)
    plain, _ = oracle.run(member, eager, fresh(inputs), Spec(), length, counts)
    assert len(kept) == len(counts)
    for image, places in enumerate(kept):
        for place, indices in zip(places, history, strict=True):
            assert torch.equal(place, indices[image])
    visual = (inputs["input_ids"][0] == member.image_id).nonzero()[:, 0].split(counts)
    alive = torch.ones(length, dtype=torch.bool)
    for columns, places in zip(visual, kept, strict=True):
        alive[columns] = False
        alive[columns[places[-1]]] = True
    distance = (want - got)[alive].abs().max().item()
    encoded_first = (want[-1] - seen[-1]).abs().max().item()
    bite = (plain - got)[alive].abs().max().item()
    print(f"{name} {kind}: {counts} tokens, {distance:.1e} {encoded_first:.1e}, bite {bite:.2f}")
    assert max(distance, encoded_first) <= tolerance_of(name, model)
    assert bite > 0.02, "the test does not bite"


@pytest.mark.parametrize("name", NAMES)
def test_every_token_has_a_place_in_its_grid(name):
    inputs, counts = prompt(name)
    with torch.no_grad(), foveate.use(model_of(name), EveryThird(1)) as run:
        model_of(name)(**fresh(inputs))
    images = run.record.images
    assert [image.total for image in images] == counts
    newline = name == "llava_onevision-video"
    cells = [image.frames * image.grid[0] * image.grid[1] + newline for image in images]
    assert cells == counts


@pytest.mark.parametrize("name", WITH_CLASS_TOKEN)
def test_class_attention_equals_eager_attention(name):
    """The row that methods see is that of an attention map, whatever became of the patches."""
    inputs, _ = prompt(name)
    scores = []

    class Spy(FasterVLM):
        def scores(self, tokens):
            scores.append(super().scores(tokens))
            return scores[-1]

    with torch.no_grad(), foveate.use(model_of(name), Spy(1)):
        model_of(name)(**fresh(inputs))
    rows = [row for group in scores for row in group]
    for want in class_scores(name):
        assert any(
            len(row) == len(want) and torch.allclose(row, want, rtol=0, atol=1e-6) for row in rows
        )


@pytest.mark.parametrize("kind", ["llm", "pre_llm"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_batch_gets_what_it_gets_alone(name, kind):
    """Rows with two images, none, and one; images of different sizes among them."""
    member, model = MEMBERS[name](), model_of(name)
    inputs, rows = batch_of(member, model, (2, 0, 1))
    method, _ = case(name, kind, prompt(name)[1])
    with torch.no_grad(), foveate.use(model, method):
        together = member.run(model, **fresh(inputs)).last_hidden_state[:, -1]
        for state, alone in zip(together, rows, strict=True):
            want = member.run(model, **fresh(alone)).last_hidden_state[0, -1]
            torch.testing.assert_close(state, want, rtol=0, atol=tolerance_of(name, model))


@pytest.mark.parametrize("kind", ["llm", "pre_llm"])
@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision", "video_llava"])
def test_images_and_videos_of_one_prompt_equal_the_oracle(name, kind):
    """Image, video, image: each has its own budget, and they are reported in this order."""
    member, frames = MEMBERS[name](), MEMBERS[f"{name}-video"]()
    member.others = (member.image_id + 1,)
    model, videos = model_of(name), frames.pixels(1)
    encode = model.model.get_video_features
    with torch.no_grad():
        tokens = encode(**videos, return_dict=True).pooler_output.shape[:-1].numel()
    _, (first, second, _) = prompt(name)
    counts = [first, tokens, second]
    ids = [3, 4]
    for number, count in enumerate(counts):
        ids += [member.image_id + number % 2] * count + [5, 6, 7]
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= member.take(member.pixels(IMAGES), 0, 2) | videos
    method, spec = case(name, kind, counts)
    with torch.no_grad(), foveate.use(model, method) as run:
        got = model.model(**fresh(inputs)).last_hidden_state[0, -1]
    want, history = oracle.run(
        member, model_of(name, "eager"), fresh(inputs), spec, ids.shape[1], counts
    )
    assert [image.total for image in run.record.images] == counts
    for image, places in enumerate(run.kept):
        for place, indices in zip(places.values(), history, strict=True):
            assert torch.equal(place, indices[image])
    distance = (want[-1] - got).abs().max().item()
    print(f"{name} {kind}: {counts} tokens, {distance:.1e}")
    assert distance <= TOLERANCE


def test_onevision_tiles_only_images_that_are_alone_in_their_sample():
    """Two thumbnails with a newline each, and an image of three tiles in the next row."""
    member, model = MEMBERS["llava_onevision"](), model_of("llava_onevision")
    pixels, number = member.pixels(IMAGES), torch.tensor([2, 1])
    first = [7, *[member.image_id] * 17, 8, *[member.image_id] * 17, 9]
    second = [5, *[member.image_id] * 46, 6]
    width = max(len(first), len(second))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in (first, second)])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **pixels}
    with torch.no_grad(), foveate.use(model, EveryThird(5)) as run:
        together = model.model(**fresh(inputs), batch_num_images=number).last_hidden_state[:, -1]
        totals = [image.total for image in run.record.images]
        alone = {"input_ids": torch.tensor([first]), **member.take(pixels, 0, 2)}
        want = model.model(**alone, batch_num_images=number[:1]).last_hidden_state[0, -1]
    assert totals == [17, 17, 46]
    torch.testing.assert_close(together[0], want, rtol=0, atol=TOLERANCE)
    arguments = {**pixels, "batch_num_images": number}
    boxes = [
        find_family(model).boxes("image", i, Shape(n, (1, n)), arguments)
        for i, n in enumerate(totals)
    ]
    assert [len(box) for box in boxes] == totals
    assert boxes[0][-1].isnan().all()
    assert not boxes[0][:-1].isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_beams_share_what_was_encoded_once(name):
    """Every beam gets all images of its row, with the same survivors."""
    model, (inputs, counts) = model_of(name), prompt(name)
    options = {"num_beams": 2, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), foveate.use(model, EveryThird(3)) as run:
        model(**fresh(inputs))
        once = run.kept
        if not MEMBERS[name].beams_of_many:
            with pytest.raises(InputError, match="one image or clip in each row"):
                model.generate(**fresh(inputs), **options)
            return
        out = model.generate(**fresh(inputs), **options)
        twice = run.kept
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    assert len(once) == len(counts)
    for got, want in zip(twice, 2 * once, strict=True):
        assert torch.equal(got["pre_llm"], want["pre_llm"])
