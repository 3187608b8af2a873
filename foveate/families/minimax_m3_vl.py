"""MiniMax M3 VL with full attention: patches of any grid merged 2 x 2, plain positions.

Sparse layers, which the released checkpoint has, are refused: they rate blocks of cache slots, and
compare slots with positions, as if slot and position were one.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.family import register_family
from foveate.families.gridded import Gridded

SPARSE = "minimax_m3_sparse"


@register_family("minimax_m3_vl")
class MiniMaxM3VL(Gridded):
    """`MiniMaxM3SparseForConditionalGeneration` and `MiniMaxM3VLModel`.

    The processor cuts videos into chunks, each with features of its own.

    Raises:
        UnsupportedModelError: some of its layers are sparse.
    """

    tower_path = "vision_tower"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        sparse = [number for number, kind in enumerate(self.layer_kinds) if kind == SPARSE]
        if sparse:
            raise UnsupportedModelError(
                f"{len(sparse)} of the {self.text_layers} decoder layers of this {self.model_type} "
                f"are sparse (the first is {sparse[0]}): they choose among blocks of cache slots, "
                "and take the number of a slot for the position of its token. Once tokens are "
                "removed, that is so only where positions are renumbered and no row is padded, "
                "which is not supported yet. Models of this type whose layers all have full "
                "attention are supported"
            )
