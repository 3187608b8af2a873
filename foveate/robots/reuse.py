"""Reuse: control steps of a policy that take over what has not changed since the step before."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from foveate.errors import InputError, UnsupportedModelError
from foveate.families import Family, find_family, unwrap
from foveate.io.quoting import quoted
from foveate.robots.hooks import ReuseHooks
from foveate.robots.memory import Reused
from foveate.robots.vla_cache import VLACache

if TYPE_CHECKING:
    from typing import Self


class Reuse:
    """Take over from the last control step what has not changed, as long as a block lasts.

    Exact: an image that equals that of the same camera and row in the step before, in every bit, is
    not encoded again; and where all that the prompt is made of is equal, it is not read again. With
    a rule, tokens that look nearly as before keep old keys and values, which changes actions. Each
    thread goes by its own last step.

    Args:
        model: a policy such as pi0. It may carry a session: enter that first.
        rule: which tokens keep keys and values of the step before; by default none.

    Raises:
        UnsupportedModelError: the model is no policy, or its attention kernel cannot serve a rule.
        LayerError: the rule names a layer that the model does not have.
        InputError: the rule is none; on entering, or in a step, that the session's methods do not
            go with it.

    Examples:
        >>> with Reuse(policy, VLACache()) as reuse:  # doctest: +SKIP
        ...     for observation in camera:
        ...         actions = policy.sample_actions(**observation)
        ...         print(reuse.last.tokens)
    """

    def __init__(self, model: PreTrainedModel, rule: VLACache | None = None) -> None:
        family = find_family(unwrap(model))
        if family.policy is None or family.encoder is None:
            raise UnsupportedModelError(
                f"control steps are those of a policy such as pi0, and {family.model_type} is none"
            )
        if rule is not None:
            _check_rule(family, rule)
        self._hooks = ReuseHooks(family, rule)

    def __enter__(self) -> Self:
        """Attach.

        Raises:
            AttachError: the model's steps are reused already, or it is running in this thread.
        """
        self._hooks.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the model, once no other thread is in it, and forget all steps."""
        self._hooks.end()

    @property
    def last(self) -> Reused | None:
        """What this thread's last step took over; `None` before the first."""
        return self._hooks.memory.last

    def forget(self) -> None:
        """Take nothing over in this thread's next step: after weights have changed, or where the
        step before was another robot's.
        """
        self._hooks.memory.clear()


def _check_rule(family: Family, rule: VLACache) -> None:
    if not isinstance(rule, VLACache):
        raise InputError(f"rule must be a VLACache, got {quoted(rule)}")
    rule.places(family.text_layers)
    rule.reader(family.text_layers)
    kernel = family.text.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            "VLA-Cache lets some tokens ask and all be looked at, under a mask of their own, which "
            f"{kernel} does not take; call model.set_attn_implementation('sdpa') first"
        )
