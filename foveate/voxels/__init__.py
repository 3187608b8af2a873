"""Sparse voxels that a sentence prunes on their way to finer levels (TSP3D).

Examples:
    >>> import torch
    >>> from foveate.voxels import Backbone, BoxHead, TwoLevelPruning, VoxelGrounder, draw_scene
    >>> scene = draw_scene(3)
    >>> scene.sentence
    'the red ball left of the blue ball'
    >>> loop = TwoLevelPruning(16, heads=2, hidden=32)
    >>> model = VoxelGrounder(Backbone(3, 16), loop, BoxHead(16)).eval()
    >>> words = torch.randn(1, 8, 16)
    >>> found = model(scene.voxels, words, torch.ones(1, 8, dtype=torch.bool))
    >>> box, probability = found.best()
    >>> box.shape
    torch.Size([1, 6])
"""

from foveate.voxels.account import ConvolutionAccount
from foveate.voxels.convolution import GenerativeUpsample, SparseConv
from foveate.voxels.fusion import TextFusion
from foveate.voxels.loop import LevelCount, Refined, TwoLevelPruning
from foveate.voxels.loss import Target, grounding_loss, iou
from foveate.voxels.network import Backbone, BoxHead, Grounding, VoxelGrounder
from foveate.voxels.pruning import CompletionAddition, TextGuidedPruning
from foveate.voxels.scenes import VoxelScene, batch_of, draw_scene
from foveate.voxels.sparse import SparseVoxels

__all__ = [
    "Backbone",
    "BoxHead",
    "CompletionAddition",
    "ConvolutionAccount",
    "GenerativeUpsample",
    "Grounding",
    "LevelCount",
    "Refined",
    "SparseConv",
    "SparseVoxels",
    "Target",
    "TextFusion",
    "TextGuidedPruning",
    "TwoLevelPruning",
    "VoxelGrounder",
    "VoxelScene",
    "batch_of",
    "draw_scene",
    "grounding_loss",
    "iou",
]
