"""Audio among visual tokens, where a session asks for it: a clip is an image of one row.

The model places the features of audio in the prompt itself, as it does those of images. Positions
are its own, and stay. Where a video comes with its sound, chunks of both take turns in the prompt:
the video is then one image and its sound another, whose tokens are not next to each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from foveate.core import Method
from foveate.core.video import VideoMethod
from foveate.engine.plan import Plan, PlannedStep
from foveate.errors import BudgetError, UnsupportedModelError
from foveate.families import Family
from foveate.families.family import AUDIO
from foveate.signals import SIGNALS

Audio = bool | tuple[Method, ...]
"""What acts on audio: nothing, the methods of the session, or methods of its own."""
_TOGETHER = {"evict_cache", "reinsert", "decode"}  # effects on all that an image's step has done


def clips(visual: Mapping[str, Tensor]) -> list[int]:
    """Tokens of each clip of audio in a prompt, row by row.

    A clip is a run of audio tokens, within which those of its video may stand; prompts put other
    tokens between clips.

    Args:
        visual: modality -> (B, T) placeholders, of audio among them.
    """
    heard = visual[AUDIO]
    run = heard | visual["video"] if "video" in visual else heard
    begins = run & ~F.pad(run[:, :-1], (1, 0))
    numbers = begins.flatten().cumsum(0)[heard.flatten()]
    return [count for count in numbers.bincount().tolist() if count]


def sharing(steps: Sequence[PlannedStep], audio: Audio, *, own: bool) -> list[PlannedStep]:
    """Steps that know what they act on.

    Args:
        steps: those of one method.
        audio: what acts on audio.
        own: whether the method is one of audio's own.
    """
    return [replace(s, audio=own) for s in steps] if isinstance(audio, tuple) else list(steps)


def check_audio(family: Family, plan: Plan, audio: Audio) -> None:
    """Refuse methods that cannot act on audio, or not beside methods of its own.

    Args:
        family: the model.
        plan: the plan.
        audio: what acts on audio.

    Raises:
        UnsupportedModelError: a method reads what audio has not, or acts on audio and images at
            once, which were to be kept apart.
        BudgetError: there is a total.
    """
    if audio is False:
        return
    if plan.total is not None:
        raise BudgetError(
            "keep_total is not divided among images and audio; leave keep_total or audio out"
        )
    steps = [*plan.vision, *plan.pre_llm, *plan.llm]
    steps += [] if plan.decode_step is None else [plan.decode_step]
    for planned in steps:
        if planned.sees(True) and (why := _unheard(planned)):
            instead = "another method" if planned.audio else "a method of its own"
            raise UnsupportedModelError(
                f"{planned.method.slug!r} cannot act on audio: it {why}; give audio {instead}, "
                "such as audio='divprune'"
            )
    together = [s.method.slug for s in steps if _TOGETHER & {*s.step.effects}]
    together += [m.slug for m in plan.methods if m.partial_compute(family)]
    if isinstance(audio, tuple) and together:
        raise UnsupportedModelError(
            f"{together[0]!r} acts on all visual tokens of a prompt at once, also on audio, which "
            "was to have a method of its own; use audio=True, or another method"
        )


def _unheard(planned: PlannedStep) -> str:
    """What of a step audio cannot give, if anything."""
    if planned.step.stage == "vision":
        return "acts inside the vision encoder, which audio does not pass"
    if isinstance(planned.method, VideoMethod):
        return "compares the frames of a video, and audio has none"
    for need in planned.step.needs:
        if SIGNALS[need.name].source in ("encoder", "input"):
            return f"reads {need.name} of the vision encoder, which audio does not pass"
    return ""
