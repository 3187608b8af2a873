"""Losses equal their formulas, box by box and voxel by voxel."""

import math

import pytest
import torch

from foveate.errors import InputError
from foveate.voxels import (
    Backbone,
    BoxHead,
    SparseVoxels,
    TwoLevelPruning,
    VoxelGrounder,
    batch_of,
    draw_scene,
    grounding_loss,
    iou,
)
from foveate.voxels.loss import around, distance_iou_loss, focal_loss
from foveate.voxels.scenes import VOXEL_SIZE


def test_iou_and_distance_of_boxes():
    one = torch.tensor([[0.0, 0, 0, 2, 2, 2], [0, 0, 0, 1, 1, 1], [1, 2, 3, 2, 4, 6]])
    other = torch.tensor([[1.0, 0, 0, 2, 2, 2], [3, 0, 0, 1, 1, 1], [1, 2, 3, 2, 4, 6]])
    torch.testing.assert_close(iou(one, other), torch.tensor([4 / 12, 0.0, 1.0]))
    hulls = torch.tensor([9.0 + 4 + 4, 16 + 1 + 1, 1])
    apart = torch.tensor([1.0, 9, 0])
    torch.testing.assert_close(distance_iou_loss(one, other), 1 - iou(one, other) + apart / hulls)


def test_focal_loss_equals_its_formula():
    logits, wanted = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([True, False, False])
    for loss, logit, yes in zip(focal_loss(logits, wanted, 0.75), logits, wanted, strict=True):
        p = 1 / (1 + math.exp(-logit))
        want = -0.75 * (1 - p) ** 2 * math.log(p) if yes else -0.25 * p**2 * math.log(1 - p)
        assert loss.item() == pytest.approx(want, rel=1e-5)


def test_relevant_voxels_lie_in_a_cube_around_a_centre_of_their_scene():
    rows = [[0, 4, 4, 4], [0, 8, 4, 4], [0, 12, 4, 4], [1, 4, 4, 4]]
    voxels = SparseVoxels(torch.tensor(rows), torch.zeros(4, 1), 4)
    centres = torch.tensor([[0, 0.45, 0.4, 0.4]])  # 4.5 voxels along x
    assert around(voxels, centres, 0.1, 1.0).tolist() == [True, True, False, False]
    assert around(voxels, centres, 0.1, 2.0).tolist() == [True, True, True, False]


def small(**options):
    torch.manual_seed(0)
    loop = TwoLevelPruning(8, heads=2, hidden=8, layers=1, voxel_size=VOXEL_SIZE, **options)
    return VoxelGrounder(Backbone(3, 8), loop, BoxHead(8, VOXEL_SIZE))


def test_losses_reach_every_parameter_and_fall():
    model = small(dropout=0.0, samples=50, train_keep=((60, 60), (40, 40)))
    voxels, target = batch_of([draw_scene(1), draw_scene(2)])
    words, mask = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    seen = []
    for _ in range(8):
        losses = grounding_loss(model(voxels, words, mask), target, VOXEL_SIZE)
        assert set(losses) == {"box", "score", "keep", "addition"}
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        without = {name for name, p in model.named_parameters() if p.grad is None}
        assert without == set()
        optimizer.step()
        seen.append(loss.item())
    assert min(seen[-3:]) < 0.9 * seen[0]


def test_the_nearest_voxels_should_find_the_target():
    """With boxes that are right everywhere, only scores, pruning and addition are at a loss."""
    model = small().eval()
    voxels, target = batch_of([draw_scene(3)])
    words, mask = torch.randn(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    found = model(voxels, words, mask, prune=False)
    found.boxes.data[:] = target.boxes[0]
    level = found.refined.voxels
    apart = (level.coordinates[:, 1:] * VOXEL_SIZE - target.boxes[0, :3]).norm(dim=1)
    near = apart.argsort(stable=True)[:5]
    found.logits.data[:] = -30.0
    found.logits.data[near] = 30.0
    losses = grounding_loss(found, target, VOXEL_SIZE, nearest=5)
    assert losses["box"].item() == pytest.approx(0, abs=1e-5)
    assert losses["score"].item() == pytest.approx(0, abs=1e-6)
    assert losses["keep"] > 0.01
    box, probability = found.best()
    assert torch.equal(box, target.boxes)
    assert probability.item() == pytest.approx(1)


def test_wrong_targets_and_backbones_are_refused():
    model = small().eval()
    voxels, _ = batch_of([draw_scene(1), draw_scene(2)])
    words, mask = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    found = model(voxels, words, mask)
    _, other = batch_of([draw_scene(1)])
    with pytest.raises(InputError, match=r"boxes must be \(2, 6\), got \(1, 6\)"):
        grounding_loss(found, other, VOXEL_SIZE)
    with pytest.raises(InputError, match="three levels need two halvings at least, got 1"):
        Backbone(3, 8, halvings=1)
