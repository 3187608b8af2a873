"""Sentences about drawn scenes are true of one object only, and boxes hold its voxels."""

import pytest
import torch

from foveate.errors import InputError
from foveate.voxels import batch_of, draw_scene
from foveate.voxels.scenes import COLOURS, RELATIONS, VOCABULARY, VOXEL_SIZE, word_ids

SCENES = [draw_scene(seed) for seed in range(40)]


def colour_at(scene, box):
    """Colours of the voxels inside a box."""
    metres = scene.voxels.coordinates[:, 1:] * VOXEL_SIZE
    inside = ((metres - box[:3]).abs() <= box[3:] / 2).all(1)
    return {tuple(row) for row in scene.voxels.features[inside].tolist()}


def test_objects_are_where_their_boxes_are_in_their_colour():
    for scene in SCENES:
        _, colour, _, *relation, _, other, _ = scene.sentence.split()
        for name, number in ((colour, scene.target), (other, scene.anchor)):
            (found,) = colour_at(scene, scene.boxes[number])
            assert found == pytest.approx(COLOURS[name])
        axis, sign = RELATIONS[" ".join(relation)]
        step = scene.boxes[scene.target] - scene.boxes[scene.anchor]
        assert sign * step[axis].item() >= 0.4 - 1e-6


def test_many_scenes_need_the_relation():
    """Another object of the target's colour stands on the other side."""
    twins = 0
    for scene in SCENES:
        (own,) = colour_at(scene, scene.boxes[scene.target])
        others = [b for n, b in enumerate(scene.boxes) if n not in (scene.target, scene.anchor)]
        twins += any(colour_at(scene, box) == {own} for box in others)
    assert 12 <= twins <= 36


def test_a_batch_holds_its_scenes_and_what_they_speak_of():
    voxels, target = batch_of(SCENES[:3])
    assert voxels.counts.tolist() == [len(scene.voxels) for scene in SCENES[:3]]
    for number, scene in enumerate(SCENES[:3]):
        rows = voxels.scenes == number
        assert torch.equal(voxels.features[rows], scene.voxels.features)
        assert torch.equal(target.boxes[number], scene.boxes[scene.target])
        named = target.named[target.named[:, 0] == number, 1:]
        assert torch.equal(named, scene.boxes[[scene.target, scene.anchor], :3])
        objects = target.objects[target.objects[:, 0] == number, 1:]
        assert torch.equal(objects, scene.boxes[:, :3])
    with pytest.raises(InputError, match="a batch needs a scene"):
        batch_of([])


def test_equal_seeds_draw_equal_scenes():
    again = draw_scene(7)
    assert again.sentence == SCENES[7].sentence
    assert torch.equal(again.voxels.keys, SCENES[7].voxels.keys)
    assert draw_scene(8).sentence != again.sentence


def test_words_have_places_and_unknown_ones_are_refused():
    ids, mask = word_ids(["the red box", "the box"])
    assert [VOCABULARY[i] for i in ids[0]] == ["<s>", "the", "red", "box"]
    assert mask.tolist() == [[True] * 4, [True, True, True, False]]
    with pytest.raises(InputError, match="no words for cube, pink"):
        word_ids(["the pink cube"])
