"""PaliGemma and PaliGemma 2: SigLIP on a fixed grid, and a Gemma text model.

The prompt is a prefix whose tokens see each other; that is in the masks, which the engine
translates.
"""

from foveate.models.family import Family, register_family


@register_family("paligemma")
class PaliGemma(Family):
    """`PaliGemmaForConditionalGeneration` and `PaliGemmaModel`."""
