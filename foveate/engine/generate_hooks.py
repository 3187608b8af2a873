"""GenerateHooks: what happens around a call of `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from foveate.engine import features
from foveate.engine.compilation import untraced
from foveate.engine.feature_reducer import FeatureReducer
from foveate.engine.inputs import check_early_exit, check_later_images, prompt_of
from foveate.engine.rollback import ROPE, reset_rope
from foveate.engine.state import Args, Kwargs
from foveate.engine.tags import Tags
from foveate.engine.thread_state import GenerateCall, ThreadState
from foveate.errors import AttachError
from foveate.families import Family


class GenerateHooks:
    """Hooks around `generate`.

    Args:
        family: the model.
        state: what each thread is doing with the model.
        tags: what tags encoder output.
        reducer: what removes tokens from it.
        look_after: puts back hooks that others have taken off.
    """

    def __init__(
        self,
        family: Family,
        state: ThreadState,
        tags: Tags,
        reducer: FeatureReducer,
        look_after: Callable[[], None],
    ) -> None:
        self.family, self.state, self.tags = family, state, tags
        self._reducer, self._look_after = reducer, look_after

    @untraced
    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `generate`: note its rows, and keep it from compiling the decoding step. A stream
        ends if it fails, or its reader would wait for ever.
        """
        args, kwargs = by_name(original, args, kwargs)
        names = ("inputs", "input_ids", "inputs_embeds")
        given = (kwargs[name] for name in names if kwargs.get(name) is not None)
        inputs = args[0] if args else next(given, None)
        kwargs.setdefault("disable_compile", True)  # slots change shape with every token
        state, base = self.state, self.family.base
        rope, outer = getattr(base, ROPE, None), state.generate
        try:
            self._look_after()
            check_later_images(self.family, inputs, kwargs)
            check_early_exit(self.family, kwargs)
            state.generate = GenerateCall(inputs, prompt_of(inputs, kwargs), outer.told)
            self._adopt_whole(kwargs)
            return original(*args, **kwargs)
        except BaseException:
            reset_rope(base, rope)
            end_stream(kwargs)
            raise
        finally:
            state.generate = outer

    def _adopt_whole(self, kwargs: Kwargs) -> None:
        """Reduce features that were made outside, before a prefill in chunks cuts images apart, or
        beams repeat what is not projected yet.
        """
        config = kwargs.get("generation_config") or self.family.model.generation_config
        given = dict(kwargs.get("mm_encoder_outputs") or {})
        chunked = kwargs.get("prefill_chunk_size", config.prefill_chunk_size) is not None
        if not given:
            return
        for modality, output in given.items():
            early = chunked or self.family.late_projector(modality) is not None
            if early and output is not None and not features.is_tagged(output):
                given[modality] = self.tags.adopt(modality, output, kwargs)
                self._reducer.reduce(modality, given[modality])
        kwargs["mm_encoder_outputs"] = given


def by_name(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The arguments of a call, all by name, if the function takes them so."""
    names = list(inspect.signature(function).parameters.values())[: len(args)] if args else []
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in kwargs for p in names)
    if not plain or len(names) < len(args):
        return args, kwargs  # it refuses them, or knows what to do with them
    return (), {**{p.name: value for p, value in zip(names, args, strict=True)}, **kwargs}


def end_stream(kwargs: Mapping[str, Any]) -> None:
    """Let whoever reads the stream of a `generate` that fails go on."""
    streamer = kwargs.get("streamer")
    if streamer is not None:
        with suppress(Exception):  # the error that matters is on its way
            streamer.end()


def refuse_late(*args: Any, **kwargs: Any) -> None:
    """Refuse a `generate` that was taken from the model within a session and begins after it.

    Raises:
        AttachError: always.
    """
    end_stream(kwargs)
    raise AttachError(
        "this `generate` was taken from the model within a foveate session that has been left "
        "since; begin within the block (join threads there), or take `model.generate` anew"
    )
