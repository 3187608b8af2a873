"""The loop of two levels equals the same computation on dense grids."""

import functools

import pytest
import torch
from hypothesis import given, settings

from foveate.errors import BudgetError, InputError
from foveate.voxels import (
    CompletionAddition,
    SparseVoxels,
    TextFusion,
    TextGuidedPruning,
    TwoLevelPruning,
)
from foveate.voxels.pruning import best, sample
from tests.voxels import dense as oracle
from tests.voxels.test_convolution import shaken

FEW = settings(max_examples=10, deadline=None)
SETTINGS = {"thresholds": (0.7, 0.4), "addition": 0.35}
LEVELS = oracle.voxel_sets(channels=8, strides=(1, 2, 4))


def words_of(scenes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(scenes)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:scenes, None]
    return torch.randn(scenes, 5, 8, generator=generator, dtype=dtype), mask


@functools.cache
def loop_of(as_released=False, **options):
    return shaken(
        TwoLevelPruning(8, heads=2, hidden=6, voxel_size=0.2, as_released=as_released, **options)
    )


@pytest.mark.parametrize("as_released", [False, True])
@FEW
@given(levels=LEVELS)
@torch.no_grad()
def test_loop_equals_the_dense_one(levels, as_released):
    loop = loop_of(as_released, **SETTINGS)
    words, mask = words_of(len(levels[0].counts))
    refined = loop(levels, words, mask)
    grid, spoken = oracle.refine(loop, levels, words, mask)
    oracle.assert_same(refined.voxels, grid)
    torch.testing.assert_close(refined.words, spoken)


def fixed_levels(dtype=torch.float64):
    """Three scenes of different sizes."""
    generator, levels = torch.Generator().manual_seed(5), []
    for stride in (1, 2, 4):
        side = 8 // stride
        rows = [
            (scene, *(stride * n for n in oracle.unravelled(cell, side)))
            for scene, count in enumerate((40, 7, 23))
            for cell in torch.randperm(side**3, generator=generator)[:count].tolist()
        ]
        features = torch.randn(len(rows), 8, generator=generator, dtype=torch.float64)
        levels.append(SparseVoxels(torch.tensor(rows), features.to(dtype), stride))
    return levels


@torch.no_grad()
def test_fixed_scenes_prune_and_add_at_every_level():
    """So that the comparisons with the dense grid are about something."""
    refined = loop_of(**SETTINGS)(fixed_levels(), *words_of(3))
    for count in refined.counts:
        assert 3 < count.kept < count.scored
        assert count.generated > count.kept
    assert refined.counts[0].added == 0
    assert refined.counts[1].added > 0
    last = refined.counts[1]
    assert last.left == last.generated + last.added == len(refined.voxels)


@torch.no_grad()
def test_single_precision_agrees_with_the_dense_grid():
    loop = loop_of(**SETTINGS)
    single = TwoLevelPruning(8, heads=2, hidden=6, voxel_size=0.2, **SETTINGS).eval()
    single.load_state_dict(loop.state_dict())
    levels, (words, mask) = fixed_levels(torch.float32), words_of(3, torch.float32)
    grid, _ = oracle.refine(single, levels, words, mask)
    largest = grid[0].abs().max().item()
    oracle.assert_same(single(levels, words, mask).voxels, grid, rtol=1e-4, atol=2e-5 * largest)


@torch.no_grad()
def test_a_batch_gives_each_scene_what_it_gets_alone():
    loop = loop_of(**SETTINGS)
    levels, (words, mask) = fixed_levels(), words_of(3)
    together = loop(levels, words, mask).voxels
    for scene in range(3):
        alone = []
        for level in levels:
            rows = level.scenes == scene
            coordinates = level.coordinates[rows] * torch.tensor([0, 1, 1, 1])
            alone.append(SparseVoxels(coordinates, level.features[rows], level.stride))
        own = mask[scene]
        got = loop(alone, words[scene : scene + 1, own], own[own][None]).voxels
        rows = together.scenes == scene
        assert torch.equal(got.coordinates[:, 1:], together.coordinates[rows][:, 1:])
        torch.testing.assert_close(got.features, together.features[rows])


@torch.no_grad()
def test_nothing_is_pruned_at_threshold_0_or_if_told_so():
    levels, (words, mask) = fixed_levels(), words_of(3)
    whole = loop_of(**SETTINGS)(levels, words, mask, prune=False)
    assert whole.completion is None
    assert all(count.kept == count.scored for count in whole.counts)
    none = loop_of(thresholds=(0.0, 0.0), addition=0.9999)(levels, words, mask)
    added = none.counts[1].added
    assert added == 0
    torch.testing.assert_close(none.voxels.features, whole.voxels.features)


@torch.no_grad()
def test_the_best_voxel_of_a_scene_survives_when_no_voxel_is_good_enough():
    loop = loop_of(thresholds=(0.999999, 0.999999), addition=0.999999)
    refined = loop(fixed_levels(), *words_of(3))
    for (looked, logits), count in zip(refined.decisions, refined.counts, strict=True):
        assert count.kept == 3
        kept = loop.pruning[0].keep(looked, logits)
        for scene in range(3):
            rows = looked.scenes == scene
            assert kept[rows].nonzero().item() == logits[rows].argmax()


def test_training_keeps_a_count_and_reaches_every_parameter():
    loop = loop_of(
        **SETTINGS, dropout=0.0, samples=30, train_samples=(60, 12),
        train_keep=((15, 20), (25, 25)),
    ).train()  # fmt: skip
    refined = loop(fixed_levels(), *words_of(3))
    scored = [looked.counts.tolist() for looked, _ in refined.decisions]
    assert scored[0] == [8, 7, 8]  # a grid of 2 x 2 x 2 has no more
    assert scored[1] == [25, 25, 25]
    looked, _ = refined.completion
    assert looked.counts.tolist() == [30, 7, 23]
    last = refined.counts[1]
    assert 3 * 15 <= last.left - last.added <= 3 * 20
    logits = [x for _, x in (*refined.decisions, refined.completion)]
    total = refined.voxels.features.sin().sum() + refined.words.sin().sum()
    (total + sum(x.sin().sum() for x in logits)).backward()
    loop.eval()
    for name, parameter in loop.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_training_keeps_generated_voxels_with_the_best_interpolated_logits():
    coarse = SparseVoxels(torch.tensor([[0, 0, 0, 0], [0, 4, 0, 0]]), torch.zeros(2, 1), 4)
    fine = SparseVoxels(
        torch.tensor([[0, 0, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]), torch.zeros(3, 1), 2
    )
    kept = TextGuidedPruning.keep_generated(fine, coarse, torch.tensor([1.0, 4.0]), 2)
    assert kept.tolist() == [False, True, True]  # logits 1, 2.5 and 4


def test_best_takes_the_first_of_ties_in_each_scene():
    rows = [[0, n, 0, 0] for n in range(4)] + [[1, n, 0, 0] for n in range(2)]
    voxels = SparseVoxels(torch.tensor(rows), torch.zeros(6, 1))
    scores = torch.tensor([1.0, 3.0, 1.0, 0.0, 5.0, 9.0])
    assert best(voxels, scores, 2).tolist() == [True, True, False, False, True, True]
    assert best(voxels, scores, 1).tolist() == [False, True, False, False, False, True]
    drawn = [sample(voxels, 3, torch.Generator().manual_seed(n)) for n in range(8)]
    assert all(x.counts.tolist() == [3, 2] for x in drawn)
    assert len({tuple(x.keys.tolist()) for x in drawn}) > 1


def test_bad_settings_and_inputs_are_refused():
    fusion = TextFusion(8, heads=2)
    for bad in (1.0, -0.1, "0.3"):
        with pytest.raises(BudgetError, match=r"threshold must be a probability in \[0, 1\)"):
            TextGuidedPruning(fusion, 8, bad)
    with pytest.raises(BudgetError, match="samples must be a positive count or None, got 0"):
        CompletionAddition(fusion, 8, samples=0)
    for several in ((0.3,), (0.3, 0.5, 0.7)):
        with pytest.raises(BudgetError, match="thresholds must be two"):
            TwoLevelPruning(8, heads=2, thresholds=several)
    with pytest.raises(BudgetError, match="train_keep must be ranges of positive counts"):
        TwoLevelPruning(8, heads=2, train_keep=((5, 4), (4, 4)))
    with pytest.raises(InputError, match="a multiple of the 3 heads, got 8"):
        TextFusion(8, heads=3)
    levels, (words, mask) = fixed_levels(), words_of(3)
    loop = loop_of()
    with pytest.raises(InputError, match=r"levels must be three.*got \[1, 2\]"):
        loop(levels[:2], words, mask)
    with pytest.raises(InputError, match=r"words must be \(3, T, 8\) for these voxels"):
        loop(levels, words[:2], mask[:2])
    with pytest.raises(InputError, match="mask must be booleans"):
        loop(levels, words, mask.double())
    with pytest.raises(InputError, match="sentence 1 has no words"):
        loop(levels, words, mask & torch.tensor([True, False, True])[:, None])
