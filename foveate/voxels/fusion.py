"""Voxels and words look at each other: the encoder in front of every decision of TSP3D.

In each layer voxels attend to voxels and words to words, then words to voxels and voxels to words,
each followed by a small network for each token. Positions are learned from coordinates; they join
the queries and keys of voxels, not their values.

Source: GWxuan/TSP3D @ 3bd5e90, `models/trans_modules.py`. Differs from it: the network for
positions has no batch normalisation, whose statistics would include the padding.

Shapes: `n` voxels of all scenes together, `B` scenes, `N` voxels of the largest, `T` words, `C`
channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.voxels.sparse import SparseVoxels


class _Layer(nn.Module):
    """One round of attention in all four directions.

    Args:
        channels: of voxels and words.
        heads: of each attention.
        hidden: width of the networks for each token.
        dropout: in training.
    """

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({
            name: nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
            for name in ("voxels", "words", "words_to_voxels", "voxels_to_words")
        })  # fmt: skip
        self.norm = nn.ModuleDict({
            name: nn.LayerNorm(channels) for name in (*self.attention, "voxels_mlp", "words_mlp")
        })  # fmt: skip
        self.mlp = nn.ModuleDict({
            name: nn.Sequential(
                nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(dropout),
                nn.Linear(hidden, channels), nn.Dropout(dropout),
            )
            for name in ("voxels", "words")
        })  # fmt: skip
        self.drop = nn.Dropout(dropout)

    def forward(
        self, voxels: Tensor, places: Tensor, absent: Tensor, words: Tensor, silent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, N, C) voxels and (B, T, C) words; `absent` and `silent` mark their padding."""
        placed = voxels + places
        voxels = self._add("voxels", voxels, placed, placed, voxels, absent)
        words = self._add("words", words, words, words, words, silent)
        asked = self._add("words_to_voxels", words, words, voxels, voxels, absent)
        told = self._add("voxels_to_words", voxels, voxels + places, words, words, silent)
        return self._network("voxels", told), self._network("words", asked)

    def _add(
        self, name: str, to: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor
    ) -> Tensor:
        seen, _ = self.attention[name](
            query, key, value, key_padding_mask=padding, need_weights=False
        )
        return self.norm[name](to + self.drop(seen))

    def _network(self, name: str, x: Tensor) -> Tensor:
        return self.norm[f"{name}_mlp"](x + self.mlp[name](x))


class TextFusion(nn.Module):
    """Attention between the voxels of a scene and the words of its sentence.

    Args:
        channels: of voxels and words, a multiple of `heads`.
        layers: rounds of attention.
        heads: of each attention.
        hidden: width of the networks for each token.
        dropout: in training.
        voxel_size: side of the finest voxel, in metres; positions are in metres.
    """

    def __init__(
        self,
        channels: int,
        layers: int = 2,
        heads: int = 8,
        hidden: int = 128,
        dropout: float = 0.1,
        voxel_size: float = 0.01,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise InputError(f"channels must be a multiple of the {heads} heads, got {channels}")
        self.voxel_size = voxel_size
        self.places = nn.Sequential(
            nn.Linear(3, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.layers = nn.ModuleList(
            [_Layer(channels, heads, hidden, dropout) for _ in range(layers)]
        )

    def forward(
        self, voxels: SparseVoxels, words: Tensor, mask: Tensor
    ) -> tuple[SparseVoxels, Tensor]:
        """Fuse both.

        Args:
            voxels: (n, C) features of B scenes.
            words: (B, T, C) features of their sentences.
            mask: (B, T) booleans, which of them are words and not padding.

        Returns:
            The voxels and the words with new features.

        Raises:
            InputError: shapes do not fit, or a sentence has no words.
        """
        check_words(voxels, words, mask)
        metres = voxels.coordinates[:, 1:].to(voxels.features) * self.voxel_size
        places, _ = voxels.with_features(self.places(metres)).padded()
        features, present = voxels.padded()
        for layer in self.layers:
            features, words = layer(features, places, ~present, words, ~mask)
        return voxels.with_features(features[present]), words


def check_words(voxels: SparseVoxels, words: Tensor, mask: Tensor) -> None:
    """Refuse sentences that do not belong to these scenes.

    Args:
        voxels: (n, C) features of B scenes.
        words: (B, T, C).
        mask: (B, T) booleans.

    Raises:
        InputError: shapes do not fit, or a sentence has no words.
    """
    scenes, channels = len(voxels.counts), voxels.features.shape[1]
    if words.dim() != 3 or len(words) != scenes or words.shape[2] != channels:
        raise InputError(
            f"words must be ({scenes}, T, {channels}) for these voxels, got {tuple(words.shape)}"
        )
    if mask.shape != words.shape[:2] or mask.dtype != torch.bool:
        raise InputError(
            f"mask must be booleans of shape {tuple(words.shape[:2])}, "
            f"got {tuple(mask.shape)} {mask.dtype}"
        )
    if not mask.any(1).all():
        raise InputError(f"sentence {int((~mask.any(1)).nonzero()[0])} has no words")
