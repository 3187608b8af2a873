"""Reading images from coarse to fine: which tiles are encoded, and what the model gets."""

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate import tiny
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.large import Reader, levels
from foveate.large.reader import tile_features
from foveate.methods import LRSVQA
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh

PROMPT = "<image> what number is red ?"


@pytest.fixture(scope="module")
def small():
    return tiny.load()


@pytest.fixture(scope="module")
def picture():
    return tiny.draw_scene(3, size=512).image


def seen_tiles(reader, monkeypatch):
    """Records (level size, row, column) of every tile that is read."""
    seen = []
    real = reader._pixels

    def pixels(source, level, row, column):
        seen.append((level.size, row, column))
        return real(source, level, row, column)

    monkeypatch.setattr(reader, "_pixels", pixels)
    return seen


def test_an_image_of_one_tile_is_read_as_without_a_reader(small):
    """Here the processor's image is the thumbnail itself."""
    model, processor = small
    image = tiny.draw_scene(5).image
    reading = Reader(model, processor).read(image, PROMPT)
    inputs = processor(images=image, text=PROMPT, return_tensors="pt")
    assert torch.equal(reading.inputs["input_ids"], inputs["input_ids"])
    assert reading.rounds == []
    assert reading.tiles == 1
    got, want = model(**reading.inputs).logits, model(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_only_tiles_that_are_called_for_are_read(small, picture, monkeypatch):
    model, processor = small
    reader = Reader(model, processor, method=LRSVQA(keep=12, shortest=256))
    seen = seen_tiles(reader, monkeypatch)
    reading = reader.read(picture, PROMPT)
    assert [level.size for level in reading.levels] == [(128, 128), (256, 256), (512, 512)]
    first, second = reading.rounds
    want = [((128, 128), 0, 0)]
    for round_ in (first, second):
        want += [(round_.tokens.level.size, *tile) for tile in round_.tiles.tolist()]
    assert seen == want
    assert len(first.tiles) == 4
    assert len(first.kept) == len(second.kept) == 12
    called = {(int(row) // 4, int(column) // 4) for row, column in first.tokens.cell[first.kept]}
    assert {tuple(tile) for tile in second.tiles.tolist()} == called
    assert len(called) < 16
    assert len(second.scores) == 64 * len(called)
    assert reading.tiles == 1 + 4 + len(called)


def test_reading_stops_where_too_many_tiles_would_be_needed(small, picture):
    model, processor = small

    def rounds(**fields):
        reader = Reader(model, processor, method=LRSVQA(shortest=256, **fields))
        return [len(r.tiles) for r in reader.read(picture, PROMPT).rounds]

    called = rounds()[1]
    assert rounds(tiles=called) == [4, called]
    assert rounds(tiles=called - 1) == [4]
    assert rounds(rounds=1) == [4]
    assert len(rounds(tiles=1, as_released=True)) == 2


def test_the_release_reads_two_levels(small):
    model, processor = small
    image = Image.new("RGB", (1024, 300), (200, 30, 30))
    count = {}
    for released in (False, True):
        method = LRSVQA(keep=2, shortest=200, as_released=released)
        reading = Reader(model, processor, method=method).read(image, PROMPT)
        count[released] = len(reading.rounds)
        assert len(reading.levels) > 4
    assert count == {False: len(reading.levels) - 1, True: 2}


def test_the_model_gets_thumbnail_and_survivors_in_order(small, picture):
    model, processor = small
    reader = Reader(model, processor, method=LRSVQA(keep=12, shortest=256))
    reading = reader.read(picture, PROMPT)
    (features,) = reading.inputs["mm_encoder_outputs"]["image"].pooler_output
    last = reading.rounds[-1]
    assert features.shape[0] == 256 + 12
    assert torch.equal(features[256:], last.tokens.values[last.kept])
    assert bool((last.tokens.order[last.kept].diff() > 0).all())
    thumbnail = picture.reduce(4)
    plain = processor(images=thumbnail, text=PROMPT, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        features[:256], model.model.get_image_features(plain).pooler_output[0], rtol=1e-3, atol=2e-2
    )
    ids = reading.inputs["input_ids"][0]
    assert int((ids == model.config.image_token_id).sum()) == 268
    assert model.generate(**reading.inputs, max_new_tokens=2).shape[1] == len(ids) + 2


def test_scores_come_from_the_whole_prompt(small, picture):
    """What the module is given: text in front, thumbnail, tiles' tokens, question."""
    model, processor = small
    reader = Reader(model, processor, method=LRSVQA(keep=12, shortest=256, rounds=1))
    reading = reader.read(picture, PROMPT)
    (features,) = reading.inputs["mm_encoder_outputs"]["image"].pooler_output
    ids = processor.tokenizer(PROMPT, return_tensors="pt")["input_ids"][0]
    place = ids.tolist().index(model.config.image_token_id)
    embed = model.get_input_embeddings()
    (only,) = reading.rounds
    parts = (embed(ids[:place]), features[:256], only.tokens.values, embed(ids[place + 1 :]))
    local = slice(place + 256, place + 256 + len(only.scores))
    want = reader.focus.scores(torch.cat(parts)[None], local)[0]
    torch.testing.assert_close(only.scores, want)
    assert torch.equal(only.kept, want.topk(12).indices.sort().values)


def test_released_positions_are_those_of_the_whole_grid(small, picture, monkeypatch):
    model, processor = small
    reader = Reader(model, processor, method=LRSVQA(keep=12, shortest=256, as_released=True))
    given = []
    real = reader.focus.scores

    def scores(hidden, local, positions):
        given.append((local, positions))
        return real(hidden, local, positions)

    monkeypatch.setattr(reader.focus, "scores", scores)
    reading = reader.read(picture, PROMPT)
    (local, positions), last = given[-1], reading.rounds[-1]
    rows, columns = (32, 32)
    row, column = last.tokens.cell.unbind(1)
    start = local.start
    assert torch.equal(positions[0, local], start + row * columns + column)
    assert positions[0, local.stop] == start + rows * columns


def test_sessions_work_on_what_was_read(small, picture):
    model, processor = small
    reading = Reader(model, processor, method=LRSVQA(keep=12, shortest=256)).read(picture, PROMPT)
    with foveate.use(model, "fastv", layer=2, keep=0.25) as run:
        model.generate(**reading.inputs, max_new_tokens=2)
    (image,) = run.kept
    assert [len(index) for index in image.values()] == [67]


class Endless:
    """An image of 27,328 pixels a side that is nowhere: grey, with what was asked of it."""

    size = (27_328, 27_328)

    def __init__(self):
        self.asked = []

    def window(self, box, reduce):
        left, top, right, bottom = box
        assert 0 <= left < right <= -(-27_328 // reduce)
        assert 0 <= top < bottom <= -(-27_328 // reduce)
        self.asked.append((right - left) * (bottom - top))
        return np.full((bottom - top, right - left, 3), 90, np.uint8)


def test_no_window_is_much_larger_than_a_tile(small):
    """So memory does not grow with the image: twice a tile's side, and a margin."""
    model, processor = small
    picture = Endless()
    reading = Reader(model, processor, method=LRSVQA(keep=2)).read(picture, PROMPT)
    assert len(reading.rounds) == len(reading.levels) - 1 == 8
    assert len(picture.asked) == reading.tiles < 30
    assert max(picture.asked) <= (2 * 128 + 8) ** 2


class _Processor:
    """What a reader asks of a processor."""

    class image_processor:
        image_mean, image_std = [0.5] * 3, [0.25] * 3

    def __init__(self, token):
        self.token = token

    def tokenizer(self, prompt, return_tensors):
        ids = [self.token if word == "<image>" else 5 for word in prompt.split()]
        return {"input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_families_that_read_tiles(name):
    model, member = model_of(name), MEMBERS[name]()
    side = model.config.vision_config.image_size
    image = tiny.draw_scene(1, size=128).image.resize((side * 4, side * 3))
    reader = Reader(model, _Processor(member.image_id), method=LRSVQA(keep=3))
    reading = reader.read(image, "a b <image> c d")
    assert len(reading.rounds) == len(levels((side * 3, side * 4), side)) - 1
    newline = getattr(model.model, "image_newline", None)
    for round_ in reading.rounds:
        cells, kept = round_.tokens.cell, round_.kept
        if newline is None:
            assert not round_.tokens.newline.any()
            continue
        ends = round_.tokens.newline
        assert torch.equal(round_.tokens.values[ends], newline.expand(int(ends.sum()), -1))
        rows = set(cells[kept][~ends[kept]][:, 0].tolist())
        assert set(cells[kept][ends[kept]][:, 0].tolist()) == rows, "newlines of rows that stay"
    assert model.generate(**reading.inputs, max_new_tokens=2, do_sample=False).shape[1] > 2


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_release_on_a_family_with_newlines(threshold):
    """All newlines of the whole grid are there; with `keep` all stay, and call for last tiles."""
    model, member = model_of("llava_next"), MEMBERS["llava_next"]()
    side = model.config.vision_config.image_size
    image = tiny.draw_scene(1, size=128).image.resize((side * 8, side * 6))
    method = LRSVQA(keep=3, threshold=threshold, as_released=True)
    reading = Reader(model, _Processor(member.image_id), method=method).read(image, "a <image> c")
    first, second = reading.rounds
    for round_ in (first, second):
        ends = torch.where(round_.tokens.newline)[0]
        assert len(ends) == round_.tokens.grid[0]
        if threshold is None:
            assert torch.isin(ends, round_.kept).all()
    rows, columns = second.tokens.level.blocks
    wide = first.tokens.grid[1] + 1
    want = {
        (int(row) * rows // first.tokens.grid[0], int(column) * columns // wide)
        for row, column in first.tokens.cell[first.kept]
    }
    assert {tuple(tile) for tile in second.tiles.tolist()} == want
    assert threshold is not None or {(row, columns - 1) for row in range(rows)} <= want


def test_tile_features_are_the_models_own():
    """Each tile's features equal those that the model packs, found by value."""
    model, member = model_of("llava_next"), MEMBERS["llava_next"]()
    pixels = member.pixels(1)
    with torch.no_grad():
        got = tile_features(find_family(model), pixels["pixel_values"][0]).flatten(0, 2)
        (packed,) = model.model.get_image_features(**fresh(pixels)).pooler_output
    newline = (packed == model.model.image_newline).all(-1)
    patches = packed[~newline]
    nearest = (patches[:, None] - got).abs().amax(-1).amin(1)
    assert nearest.max() < 1e-5


def test_refusals(small):
    model, processor = small
    image = Image.new("RGB", (300, 300))
    with pytest.raises(InputError, match="one image placeholder, this has 0"):
        Reader(model, processor).read(image, "what number is red ?")
    for name in ("qwen2_5_vl", "emu3"):
        with pytest.raises(UnsupportedModelError, match="square tiles by llava, llava_next"):
            Reader(model_of(name), processor)
    with pytest.raises(UnsupportedModelError, match="square tiles"):
        Reader(model_of("llava-pixtral"), processor)
