"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: Qwen's readers, which also hear.

Tokens of audio count as text unless a session asks for them.
"""

from foveate.families.family import register_family
from foveate.families.mrope import MRope
from foveate.families.qwen3_vl import Qwen3VL


@register_family("qwen2_5_omni_thinker")
class Qwen25OmniThinker(MRope):
    """`Qwen2_5OmniThinkerForConditionalGeneration` and `Qwen2_5OmniThinkerModel`."""

    places_later_images = False
    unheard = ""


@register_family("qwen3_omni_moe_thinker")
class Qwen3OmniThinker(Qwen3VL):
    """`Qwen3OmniMoeThinkerForConditionalGeneration` and `Qwen3OmniMoeThinkerModel`."""

    places_later_images = False
    unheard = ""
