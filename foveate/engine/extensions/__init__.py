"""What one or two methods need of the engine beyond dropping tokens; see `base.Extension`."""

from foveate.core import Learning
from foveate.engine.extensions.base import Extension
from foveate.engine.extensions.conversation import Conversation
from foveate.engine.extensions.decode_choice import DecodeSelection
from foveate.engine.extensions.eviction import Eviction
from foveate.engine.extensions.key_gates import KeyGates
from foveate.engine.extensions.partial.forward import PartialDecode, PartialPrefill
from foveate.engine.extensions.suspension import Suspension
from foveate.engine.plan import Plan

EFFECTS: dict[str, type[Extension]] = {
    "decode": DecodeSelection,
    "evict_cache": Eviction,
    "reinsert": Suspension,
}
"""Effects of a step that an extension makes; others are the core's."""


def extensions_of(plan: Plan) -> tuple[tuple[type[Extension], ...], tuple[type[Extension], ...]]:
    """Extensions of a plan's forwards over a prompt, and of its forwards after a pruned cache."""
    steps = plan.llm if plan.decode_step is None else (*plan.llm, plan.decode_step)
    effects = dict.fromkeys(effect for planned in steps for effect in planned.step.effects)
    found = [EFFECTS[effect] for effect in effects if effect in EFFECTS]
    if any(isinstance(planned.method, Learning) for planned in plan.llm):
        found.append(KeyGates)
    if plan.work:
        found.append(PartialPrefill)
    if plan.total is not None:
        found.append(Conversation)
    return tuple(found), (PartialDecode,) if plan.visual_blind else ()
