"""AdaToken-3D: PyramidDrop with many small drops.

Paper: Zhang et al., "AdaToken-3D: Dynamic Spatial Gating for Efficient 3D Large Multimodal-Models
Reasoning", arXiv:2505.12782. Reference code: junkerman2004/Adatoken-3D @ 8407182, whose ranking and
dropping is that of PyramidDrop; only the schedule is its own.
Differs from the reference: as PyramidDrop does. The paper derives schedules from how attention
flows, but the release holds fixed lists and no rule that would make them: `keep` is that list.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.core import Keep, register
from foveate.methods.pyramiddrop import PyramidDrop


@register(
    "adatoken-3d",
    stage="llm",
    does="ten small drops by attention",
    needs=("text_attention",),
    paper="Zhang et al. 2025, arXiv:2505.12782",
)
@dataclass(frozen=True)
class AdaToken3D(PyramidDrop):
    """Rank visual tokens by the attention of the last prompt token, in ten small drops.

    The defaults are the release's adaptive setting for a language model of 32 layers; its question
    answering scripts use `layers=(8, 16, 24), keep=(0.8, 0.6, 0.4)`.

    Args:
        layers: decoder layers before which tokens are dropped, ascending. `None` scales the
            published ones to the depth of the model at hand; on one with fewer layers than drops,
            drops that fall together become one. With another number of entries in `keep`, stages
            are equal.
        keep: what survives each drop, as a share of the ORIGINAL count of each image, or a count;
            one number is the mean over the layers from the first drop on.
        positions: as in PyramidDrop.

    Cost: one key projection of all tokens and one query row per drop; no attention map.
    """

    keep: Keep = (0.9, 0.8, 0.75, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.25)
    published_layers = (4, 8, 12, 16, 18, 20, 22, 24, 26, 28)
