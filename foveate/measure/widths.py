"""What the matrices of decoder layers really measure.

Layers that were pruned are narrower than their config says, each by another amount. Quantised and
wrapped matrices still tell what they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from foveate.families.decoder_layer import has_mlp, mixer_of, mlp_of
from foveate.measure.mixers import Attention, Mixer
from foveate.measure.mlps import Mlp

FUSED = ("Wqkv", "qkv_proj")
OUTPUT = ("o_proj", "out_proj", "Wo")
GATE = ("g_proj", "gate_proj")
DOWN = ("down_proj", "fc2", "w2", "Wo")
M = TypeVar("M", bound="Mixer | Mlp")


def size_of(matrix: Any) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer, or of what stands for one; `None` if it does not say.

    Its weight says so, unless it is packed or sharded; then the features that the layer names do.
    """
    weight = getattr(matrix, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        return weight.shape[0], weight.shape[1]
    features = getattr(matrix, "out_features", None), getattr(matrix, "in_features", None)
    return features if all(isinstance(n, int) for n in features) else None  # type: ignore[return-value]


def measured(layer: Any, mixer: Mixer, mlp: Mlp) -> tuple[Mixer, Mlp]:
    """What mixes the tokens of a decoder layer, and its MLP, as wide as they are.

    Read are attention with grouped heads, and MLPs that all tokens pass; others stay as they are.

    Args:
        layer: the layer's module.
        mixer: as wide as the config says.
        mlp: as wide as the config says.
    """
    hidden = None
    if isinstance(mixer, Attention):
        mixer, hidden = _attention(mixer_of(layer), mixer)
    if _is_dense(mlp):
        down = _size(mlp_of(layer) if has_mlp(layer) else mixer_of(layer), DOWN)
        if down is not None:
            hidden, mlp = down[0], replace(mlp, neurons=down[1])
    return _with_hidden(mixer, hidden), _with_hidden(mlp, hidden)


def _is_dense(mlp: Mlp) -> bool:
    """Whether all tokens pass all its neurons, or it has none."""
    return not mlp.router


def _attention(module: Any, mixer: Attention) -> tuple[Attention, int | None]:
    """Attention as wide as its matrices, and the hidden width, if it is known."""
    width = getattr(module, "head_dim", mixer.head_dim)
    output, fused, key = _size(module, OUTPUT), _size(module, FUSED), _size(module, ("k_proj",))
    heads = mixer.heads if output is None else output[1] // width
    kv_heads = mixer.kv_heads
    if fused is not None:
        kv_heads = (fused[0] // width - heads) // 2
    elif key is not None:
        kv_heads = key[0] // width
    gate = _size(module, GATE) if mixer.gate else None
    made = replace(
        mixer,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        gate=mixer.gate if gate is None else gate[0],
    )
    return made, None if output is None else output[0]


def _size(module: Any, names: Sequence[str]) -> tuple[int, int] | None:
    """`size_of` the first matrix that a module has of some names."""
    matrices = (matrix for name in names if (matrix := getattr(module, name, None)) is not None)
    return size_of(next(matrices, None))


def _with_hidden(of: M, hidden: int | None) -> M:
    return of if hidden is None else replace(of, hidden=hidden)
