"""Attention and features by chance, for methods made by hand."""

import torch


def seen(images, total, seed=0, spread=1.0):
    """(G, 1, H, V) attention of a class token that also sees itself."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(images, 1, 3, total, generator=generator)).softmax(-1) * 0.8


def features(images, total, seed=1):
    """(G, V, 8) features."""
    return torch.randn(images, total, 8, generator=torch.Generator().manual_seed(seed)).double()
