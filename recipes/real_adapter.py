"""What training changes of a VLM of real parts: its projector, and low-rank changes of matrices.

The file holds `projector.NAME`, and `NAME.A` (R, in) and `NAME.B` (out, R) of every changed matrix
of the language model, all in bfloat16. The change is B A; scales are part of B.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.errors import InputError
from foveate.io.writing import replacing

CHANGED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Which matrices of a layer are changed."""
SCALE = 2
"""What the product of both factors is multiplied by in training."""


def fold(projector: dict[str, Tensor], mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    """A projector of features as they are, from one of features less their mean by their deviation.

    Args:
        projector: its parameters.
        mean: (D,) of the features' channels.
        deviation: (D,) of the features' channels.
    """
    first = projector["linear_1.weight"] / deviation
    bias = projector["linear_1.bias"] - first @ mean
    return {**projector, "linear_1.weight": first, "linear_1.bias": bias}


def write(trainee: Any, path: Path, **told: int) -> None:
    """Write what a `recipes.real_vlm.Trainee` has learnt, and numbers that tell of its training."""
    projector = {name: p.detach() for name, p in trainee.projector.state_dict().items()}
    folded = fold(projector, trainee.mean, trainee.deviation)
    held = {f"projector.{name}": value for name, value in folded.items()}
    for name, parameter in trainee.lora.items():
        layer, side = name.removesuffix(".default.weight").split(".lora_")
        held[f"{layer}.{side}"] = parameter.detach() * (SCALE if side == "B" else 1)
    small = {name: value.to(torch.bfloat16).contiguous() for name, value in held.items()}
    with replacing(path) as part:
        save_file(small, part, {name: str(value) for name, value in told.items()})


def read(trainee: Any, path: Path) -> int:
    """Go on from a file, for a `Trainee` that knows means and deviations of the features.

    Returns:
        The steps that it was trained for.
    """
    held = {name: value.float() for name, value in load_file(path).items()}
    projector = {n.removeprefix("projector."): held[n] for n in held if "projector" in n}
    # The inverse of what was folded in.
    first = projector["linear_1.weight"]
    projector["linear_1.bias"] = projector["linear_1.bias"] + first @ trainee.mean
    projector["linear_1.weight"] = first * trainee.deviation
    trainee.projector.load_state_dict(projector)
    for name, parameter in trainee.lora.items():
        layer, side = name.removesuffix(".default.weight").split(".lora_")
        parameter.data.copy_(held[f"{layer}.{side}"] / (SCALE if side == "B" else 1))
    return told(path)["steps"]


def told(path: Path) -> dict[str, int]:
    """The numbers that tell of an adapter's training."""
    with safe_open(path, "pt") as opened:
        return {name: int(value) for name, value in opened.metadata().items()}


def merge(model: Any, path: Path) -> None:
    """Put what was learnt into a LLaVA of the untrained parts, in place.

    Raises:
        InputError: the file is of another model.
    """
    held = load_file(path)
    projector = model.model.multi_modal_projector
    layers = dict(model.model.language_model.named_modules())
    try:
        projector.load_state_dict(
            {n.removeprefix("projector."): v.float() for n, v in held.items() if "projector" in n}
        )
        changes = [name.removesuffix(".A") for name in held if name.endswith(".A")]
        with torch.no_grad():
            for name in changes:
                weight = layers[name].weight
                change = held[f"{name}.B"].float() @ held[f"{name}.A"].float()
                weight.add_(change.to(weight.dtype))
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} was learnt by another model: {error}") from error
