"""Videos of Kimi K2.5: each chunk has features of its own, pooled over its frames."""

import pytest
import torch
from transformers.models.kimi_k25.modeling_kimi_k25 import get_vision_temporal_merge_index

import foveate
from foveate.engine.cache_argument import CACHE
from foveate.errors import InputError
from foveate.families import find_family
from foveate.methods import PyramidDrop
from tests.conformance import oracle
from tests.conformance.test_pixels import model_of
from tests.conformance.tolerance import TOLERANCE
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

NAME = "kimi_k25"
COUNTS = [8, 16, 8]  # a chunk, an image, a chunk
METHODS = {
    "pre_llm": (EveryThird(2), Spec(kept=[torch.arange(0, 6, 3)] * 3)),
    "llm": (PyramidDrop((2,), 4, "original"), Spec(drops=[Drop(2, 2, [4] * 3)])),
}


def prompt():
    """Two chunks of one frame each with an image between them."""
    member = MEMBERS[NAME]()
    grids = torch.tensor([[1, 4, 8], [1, 8, 4]])
    video, image = [member.video_id] * 8, [member.image_id] * 16
    ids = torch.tensor([[5, *video, 7, *image, 9, 10, *video, 11, 12]])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "video_grid_thw": grids,
        "pixel_values_videos": member.patches(grids, 3), **member.pixels(1),
    }  # fmt: skip


@pytest.mark.parametrize("kind", METHODS)
@torch.no_grad()
def test_chunks_beside_an_image_equal_the_oracle(kind):
    member, inputs, (method, spec) = MEMBERS[NAME](), prompt(), METHODS[kind]
    member.others = (member.video_id,)
    with foveate.use(model_of(NAME), method) as run:
        got = model_of(NAME).model(**fresh(inputs)).last_hidden_state[0, -1]
    images = run.record.images
    assert [(i.frames, *i.grid) for i in images] == [(1, 2, 4), (1, 4, 4), (1, 4, 2)]
    eager, length = model_of(NAME, "eager"), inputs["input_ids"].shape[1]
    want, history = oracle.run(member, eager, fresh(inputs), spec, length, COUNTS)
    for image, places in zip(zip(*history, strict=True), run.kept, strict=True):
        assert all(map(torch.equal, image, places.values()))
    plain, _ = oracle.run(member, eager, fresh(inputs), Spec(), length, COUNTS)
    torch.testing.assert_close(got, want[-1], rtol=0, atol=TOLERANCE)
    assert (got - plain[-1]).abs().max() > 0.02


def test_a_token_has_its_rows_in_all_frames():
    family = find_family(model_of(NAME))
    grids = torch.tensor([[3, 4, 8], [1, 8, 4], [2, 4, 4]])
    pictures = family.encoder.packed({"grid_thw": grids}, family.side("video"))
    for picture, frames in zip(pictures, grids[:, 0].tolist(), strict=True):
        assert picture.frames == 1
        assert picture.rows.shape[1] == 4 * frames
    want = [index.flatten(1) for index in _merged(grids)]
    assert all(torch.equal(p.rows, rows) for p, rows in zip(pictures, want, strict=True))


def _merged(grids):
    """(V, frames, 4) rows that transformers pools into each token of each chunk."""
    start = 0
    for grid in grids:
        rows = get_vision_temporal_merge_index(grid[None], 2, 2)
        if isinstance(rows, tuple):  # where each row goes, from 5.24 on
            rows = rows[0].argsort(stable=True).view(-1, 4, int(grid[0])).transpose(1, 2)
        yield start + rows
        start += int(grid.prod())


def test_grids_are_those_of_pooled_frames():
    family, grids = find_family(model_of(NAME)), torch.tensor([[3, 4, 8], [1, 8, 4]])
    features = [torch.zeros(8, 64)] * 2
    shapes = family.shapes("video", features, {"video_grid_thw": grids})
    assert shapes == [(8, (2, 4), 1), (8, (4, 2), 1)]
    with pytest.raises(
        InputError, match="video_grid_thw says 2 x 4 visual tokens, but there are 7"
    ):
        family.shapes("video", [torch.zeros(7, 64)], {"video_grid_thw": grids[:1]})


def test_chunks_of_several_frames_are_one_grid():
    """Before 5.24 transformers expects features of each frame, where its tower has pooled them."""
    member, model, grids = MEMBERS[NAME](), model_of(NAME), torch.tensor([[3, 4, 8]])
    patches = member.patches(grids, 0)
    if CACHE == "past_key_values":
        with pytest.raises(RuntimeError, match="split_sizes"):
            model.model.get_video_features(patches, grids)
        return
    with torch.no_grad(), foveate.use(model, EveryThird(2)):
        output = model.model.get_video_features(patches, grids)
    assert output.encoded.shapes == [(8, (2, 4), 1)]
    assert [int((~rows[:, 0].isnan()).sum()) for rows in output.pooler_output] == [2]
