"""What TSP3D learns from: boxes near the target, and which voxels pruning and addition should keep.

Source: GWxuan/TSP3D @ 3bd5e90, `models/multilevel_head.py` and `models/axis_aligned_iou_loss.py`.
A voxel counts as relevant when it lies within 1.625 voxels of its level, along each axis, of the
centre of an object: of any object at the coarsest level, of one that the sentence names below it.
The release writes this as 13 with a scale of its own.

Shapes: `n` voxels, `B` scenes, `M` objects of all scenes together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.voxels.network import Grounding
from foveate.voxels.pruning import best
from foveate.voxels.sparse import SparseVoxels

REGION = 1.625


@dataclass(frozen=True)
class Target:
    """What the sentences of a batch speak of; lengths are in metres.

    Args:
        boxes: (B, 6) centre and size of the target of each scene.
        objects: (M, 4) scene and centre of every object.
        named: (M', 4) scene and centre of the objects that sentences name, targets included.
    """

    boxes: Tensor
    objects: Tensor
    named: Tensor


def grounding_loss(
    found: Grounding,
    target: Target,
    voxel_size: float = 0.01,
    *,
    region: float = REGION,
    nearest: int = 32,
) -> dict[str, Tensor]:
    """The losses of a batch, to be summed.

    Args:
        found: boxes, and the decisions that led to them.
        target: what should have been found.
        voxel_size: side of the finest voxel, in metres.
        region: half side of what is kept around a centre, in voxels of its level.
        nearest: how many voxels, those nearest to the target's centre, should find it.

    Returns:
        `box` (distance IoU), `score`, `keep` and, where voxels were added, `addition` (focal).

    Raises:
        InputError: there is not one target for each scene.
    """
    voxels = found.refined.voxels
    if target.boxes.shape != (len(voxels.counts), 6):
        raise InputError(
            f"boxes must be ({len(voxels.counts)}, 6), got {tuple(target.boxes.shape)}"
        )
    near = _nearest(voxels, target, voxel_size, nearest)
    losses = {
        "box": distance_iou_loss(found.boxes[near], target.boxes[voxels.scenes[near]]).mean(),
        "score": focal_loss(found.logits, near, 0.25).sum() / near.sum(),
    }
    keep = found.logits.new_zeros(())
    wanted = (target.objects, target.named)
    for (looked, logits), centres in zip(found.refined.decisions, wanted, strict=True):
        relevant = around(looked, centres, voxel_size, region)
        each = focal_loss(logits, relevant, 0.75)
        scenes = range(len(looked.counts))
        parts = [(each[looked.scenes == b], relevant[looked.scenes == b]) for b in scenes]
        keep = (
            keep
            + torch.stack([loss.sum() / (int(yes.sum()) or len(yes)) for loss, yes in parts]).mean()
        )
    losses["keep"] = keep / 3
    if found.refined.completion is not None:
        looked, logits = found.refined.completion
        near = _nearest(looked, target, voxel_size, nearest)
        losses["addition"] = focal_loss(logits, near, 0.25).sum() / near.sum()
    return losses


def around(voxels: SparseVoxels, centres: Tensor, voxel_size: float, region: float) -> Tensor:
    """(n) which voxels lie within a cube around one of the (M, 4) centres in their scene.

    Args:
        voxels: of any level.
        centres: scene and centre, in metres.
        voxel_size: side of the finest voxel, in metres.
        region: half side of the cube, in voxels of this level.
    """
    metres = voxels.coordinates[:, None, 1:] * voxel_size
    far = (metres - centres[:, 1:]).abs().amax(-1)
    same = voxels.scenes[:, None] == centres[:, 0]
    return ((far < region * voxels.stride * voxel_size) & same).any(1)


def focal_loss(logits: Tensor, wanted: Tensor, alpha: float, gamma: float = 2.0) -> Tensor:
    """(n) focal loss (Lin et al., arXiv:1708.02002, eq. 5).

    Args:
        logits: (n).
        wanted: (n) booleans.
        alpha: weight of those that are wanted; the others have 1 - alpha.
        gamma: how much less sure decisions count.
    """
    loss = F.binary_cross_entropy_with_logits(logits, wanted.to(logits), reduction="none")
    weight = torch.where(wanted, alpha, 1 - alpha)
    return weight * (1 - (-loss).exp()) ** gamma * loss


def distance_iou_loss(one: Tensor, other: Tensor) -> Tensor:
    """(n) 1 - IoU + squared distance of the centres over that of the corners of the hull.

    Zheng et al., arXiv:1911.08287, eq. 7.

    Args:
        one: (n, 6) centre and size.
        other: (n, 6).
    """
    low, high = _corners(one), _corners(other)
    hull = torch.maximum(low[1], high[1]) - torch.minimum(low[0], high[0])
    apart = (one[:, :3] - other[:, :3]).square().sum(1)
    return 1 - iou(one, other) + apart / hull.square().sum(1).clamp(min=1e-9)


def iou(one: Tensor, other: Tensor) -> Tensor:
    """(n) shared volume of (n, 6) boxes over their joint volume."""
    (a, b), (c, d) = _corners(one), _corners(other)
    shared = (torch.minimum(b, d) - torch.maximum(a, c)).clamp(min=0).prod(1)
    return shared / (one[:, 3:].prod(1) + other[:, 3:].prod(1) - shared).clamp(min=1e-9)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[:, :3] - boxes[:, 3:] / 2, boxes[:, :3] + boxes[:, 3:] / 2


def _nearest(voxels: SparseVoxels, target: Target, voxel_size: float, count: int) -> Tensor:
    """(n) which voxels are the `count` nearest of their scene to its target's centre."""
    centres = target.boxes[voxels.scenes, :3]
    return best(voxels, -(voxels.coordinates[:, 1:] * voxel_size - centres).norm(dim=1), count)
