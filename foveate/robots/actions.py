"""Actions of a policy after a prompt that is cached already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from foveate.engine.cache_argument import CACHE


def actions_after(cache: Cache, model: Any, given: Mapping[str, Any]) -> Tensor:
    """Actions, as the model's `sample_actions` makes them once it has read the prompt.

    Args:
        cache: of the prompt alone; it is the same afterwards.
        model: what predicts velocities of actions from noise.
        given: arguments of `sample_actions`.

    Returns:
        (B, chunk, actions) for the B rows of the batch.
    """
    used = {"input_ids", "pixel_values", "num_steps", "noise"}
    told = {name: value for name, value in given.items() if name not in used}
    ids, config, noise = given["input_ids"], model.config, given.get("noise")
    if noise is None:
        size = (len(ids), config.chunk_size, config.max_action_dim)
        kind = {"dtype": given["pixel_values"].dtype, "device": ids.device}
        noise = torch.normal(mean=0.0, std=1.0, size=size, **kind)
    count = given.get("num_steps") or config.num_inference_steps
    length, change = cache.get_seq_length(), -1.0 / count
    for number in range(count):
        time = torch.full((len(ids),), 1.0 + number * change, device=ids.device)
        velocity = model(noise=noise, timestep=time, **{CACHE: cache}, **told).logits
        cache.crop(length - cache.get_seq_length())
        noise = noise + change * velocity
    return noise
