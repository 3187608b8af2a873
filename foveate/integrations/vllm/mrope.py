"""M-RoPE: survivors keep their positions in time, height and width.

Where an item begins, and what follows it, can be told before the encoder runs: the item takes as
many positions as if nothing were removed. Which positions within it survive is known afterwards.
So vLLM is told that all tokens of an item are at its first position, and the distances from there
come with the embeddings, through vLLM's caches and in whatever parts it prefills them, until the
language model is called. vLLM does the same for its own pruning, but in its model runners, and only
if it is started with a rate for all videos.

Shapes: `N` rows of an item, `T` tokens of a forward, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_pp_group
from vllm.sequence import IntermediateTensors

from foveate.errors import UnsupportedModelError
from foveate.integrations.vllm.model import FoveateModel
from foveate.integrations.vllm.request import KEY

DIGITS, BASE = 3, 256
CHANNELS = 3 * DIGITS
"""Columns with the distances of a row; integers up to `BASE` are exact in half precision."""


def written(distances: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, CHANNELS) of (3, N) distances, in digits."""
    assert int(distances.min()) >= 0
    assert int(distances.max()) < BASE**DIGITS
    digits = [distances // BASE**i % BASE for i in range(DIGITS)]
    return torch.cat(digits).T.to(dtype)


def read(channels: Tensor) -> Tensor:
    """(3, N) distances that `written` has written."""
    digits = channels.T.long().unflatten(0, (DIGITS, 3))
    powers = torch.tensor([BASE**i for i in range(DIGITS)], device=channels.device)
    return (digits * powers[:, None, None]).sum(0)


def grid_positions(frames: int, height: int, width: int, pace: float = 1.0) -> Tensor:
    """(3, N) positions of the tokens of a grid, from its first.

    Args:
        frames: how many.
        height: in tokens.
        width: in tokens.
        pace: positions from one frame to the next.
    """
    axes = np.indices((frames, height, width)).reshape(3, -1)
    axes[0] = (axes[0] * pace).astype(np.int64)
    return torch.from_numpy(axes)


def numbered(length: int, items: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """(3, T) positions of a prompt, each token of an item at the first of the item's; and by how
    much later positions differ from the number of tokens before them.

    Args:
        length: T.
        items: first column, number of columns, and number of positions of each, in order.
    """
    steps = torch.ones(length, dtype=torch.int64)
    for start, columns, extent in items:
        steps[start : start + columns] = 0
        steps[start + columns - 1] = extent
    ends = steps.cumsum(0)
    positions = ends - steps
    return positions.expand(3, -1).clone(), int(ends[-1]) - length


class MRopeModel(FoveateModel):
    """Base of models that number tokens along three axes."""

    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        size = vllm_config.scheduler_config.max_num_batched_tokens
        self._distances = torch.zeros(3, size, dtype=torch.int64)
        self._placed = False  # whether some distance is not zero
        self._unable = _why_unable(vllm_config)
        self._longest = vllm_config.model_config.max_model_len
        made = self.make_empty_intermediate_tensors  # type: ignore[has-type]

        def with_distances(batch_size: int, dtype: Any, device: Any) -> IntermediateTensors:
            tensors = made(batch_size, dtype, device)
            tensors[KEY] = torch.zeros(batch_size, 3, dtype=torch.int64, device=device)
            return tensors

        self.make_empty_intermediate_tensors = with_distances

    # -- an item

    def positions(self, modality: str, data: Mapping[str, Any], item: int) -> Tensor:
        """(3, N) positions within an item of which nothing is removed, from its first.

        Args:
            modality: `image` or `video`.
            data: what vLLM calls the model with, for some items.
            item: which of them.
        """
        raise NotImplementedError

    def extent(self, modality: str, data: Mapping[str, Any]) -> int:
        """How many positions an item takes up.

        Args:
            modality: `image` or `video`.
            data: what vLLM's processor has made of it.
        """
        batch = {
            name: value[None] if torch.is_tensor(value) else [value] for name, value in data.items()
        }
        return int(self.positions(modality, batch, 0).max()) + 1

    def placed(self, modality: str, kwargs: Mapping[str, Any], item: int, images: Any) -> Tensor:
        """(N, D + CHANNELS) survivors and their distances from the item's first position."""
        if self._unable:
            raise UnsupportedModelError(self._unable)
        (image,) = images
        positions = self.positions(modality, kwargs, item)[:, image.places.cpu()]
        return with_positions(image.rows, positions)

    # -- a prompt

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Positions as vLLM has them; those of items to be reduced are where the item begins."""
        if not any(_asked(feature) for feature in mm_features):
            return super().get_mrope_input_positions(  # type: ignore[misc]
                input_tokens, mm_features
            )
        items = [
            (
                feature.mm_position.offset,
                feature.mm_position.length,
                self.extent(feature.modality, feature.data.get_data()),
            )
            for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        ]
        positions, delta = numbered(len(input_tokens), items)
        self._check_range(delta)
        return positions, delta

    def _check_range(self, delta: int) -> None:
        """Refuse positions for which vLLM has made no rotary embeddings.

        Raises:
            UnsupportedModelError: they may be reached.
        """
        layers = self.language_model.model
        rotary = layers.layers[layers.start_layer].self_attn.rotary_emb
        last, limit = self._longest + delta, len(rotary.cos_sin_cache)
        if delta > 0 and last > limit:
            raise UnsupportedModelError(
                f"positions of this prompt may reach {last}, as tokens keep theirs when others are "
                f"removed, but vLLM has made rotary embeddings of {limit}; start it with a "
                "--max-model-len that is smaller by as much"
            )

    # -- a forward

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        """Embeddings of a batch; distances that come with them are kept for `forward`."""
        if self._placed:
            self._distances.zero_()
            self._placed = False
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            widest = max(rows.shape[-1] for rows in multimodal_embeddings)
            if widest > self._width:
                self._keep(multimodal_embeddings, is_multimodal)
                multimodal_embeddings = [rows[:, : self._width] for rows in multimodal_embeddings]
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    @property
    def _width(self) -> int:
        """Columns of what vLLM makes of a token."""
        raise NotImplementedError

    def _keep(self, embeddings: Sequence[Tensor], is_multimodal: Tensor) -> None:
        """Keep the distances that come with some embeddings."""
        found = [
            read(rows[:, self._width :])
            if rows.shape[-1] > self._width
            else torch.zeros(3, len(rows), dtype=torch.int64, device=rows.device)
            for rows in embeddings
        ]
        device = self._distances.device
        columns = is_multimodal.nonzero()[:, 0].to(device)
        self._distances[:, columns] = torch.cat(found, 1).to(device)
        self._placed = True

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's, with survivors at their own positions."""
        if positions.dim() == 1:
            return super().forward(  # type: ignore[misc]
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        if intermediate_tensors is None:
            distances = self._distances[:, : positions.shape[1]]
        else:
            tensors = dict(intermediate_tensors.tensors)
            distances = tensors.pop(KEY).T
            intermediate_tensors = IntermediateTensors(tensors)
        if distances.shape[1] < positions.shape[1]:  # padding
            missing = positions.shape[1] - distances.shape[1]
            distances = torch.nn.functional.pad(distances, (0, missing))
        output = super().forward(  # type: ignore[misc]
            input_ids,
            positions + distances.to(positions.dtype),
            intermediate_tensors,
            inputs_embeds,
            **kwargs,
        )
        if not get_pp_group().is_last_rank:
            output.tensors[KEY] = distances.T.contiguous()
        return output

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: Mapping[str, Any]) -> Any:
        """What vLLM is to run as a graph, after which nothing can be removed.

        Raises:
            UnsupportedModelError: an item is to be reduced.
        """
        if any(name.startswith(KEY) for name in mm_kwargs):
            raise UnsupportedModelError(
                "foveate removes tokens after the vision tower, but vLLM runs the tower as a CUDA "
                "graph here and caches its output; start vLLM without cudagraph_mm_encoder"
            )
        return super().get_encoder_cudagraph_item_specs(mm_kwargs)  # type: ignore[misc]


def with_positions(rows: Tensor, positions: Tensor) -> Tensor:
    """(N, D + CHANNELS) rows and their positions."""
    return torch.cat((rows, written(positions, rows.dtype).to(rows.device)), 1)


def _asked(feature: Any) -> bool:
    """Whether a request asks for an item to be reduced."""
    return feature.data is not None and f"{KEY}_{feature.modality}" in feature.data


def _why_unable(vllm_config: Any) -> str:
    """Why vLLM was started in a way in which positions do not reach the language model, if so."""
    if getattr(vllm_config.parallel_config, "use_ubatching", False):
        return (
            "foveate cannot place the tokens of M-RoPE models where vLLM overlaps two halves of a "
            "batch; start it without dual batch overlap"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.draft_model_config is not None:
        return (
            "foveate cannot place the tokens of M-RoPE models for a draft model; start vLLM "
            "without speculative decoding, or with n-grams"
        )
    return ""
