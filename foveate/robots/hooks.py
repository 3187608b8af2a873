"""ReuseHooks: what `Reuse` puts on a policy.

A control step goes through them in this order: `sample` or `forward` begins it, `tower` encodes its
images, and `prefix` reads its prompt, where `layer` and `queried` follow a rule. What one step
leaves to the next is in `Memory`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.engine.attachment import MARK, Attachment
from foveate.engine.cache_argument import CACHE, NAMES
from foveate.engine.gate import Gate, is_within
from foveate.engine.inputs import bound
from foveate.engine.replaced_forward import forward_of
from foveate.errors import AttachError, InputError
from foveate.families import Family
from foveate.families.decoder_layer import mixer_of
from foveate.robots.actions import actions_after
from foveate.robots.control_step import NEEDED, Observation
from foveate.robots.memory import Memory
from foveate.robots.partial_prefix import begin
from foveate.robots.vla_cache import VLACache

Forward = Callable[..., Any] | None


class ReuseHooks(Attachment):
    """Hooks around a policy, the vision tower and what reads the prompt.

    Args:
        family: the policy.
        rule: which tokens keep keys and values of the step before, if any.
    """

    mark = "_foveate_reuse"

    def __init__(self, family: Family, rule: VLACache | None) -> None:
        super().__init__(Gate())
        self.family, self.rule, self.memory = family, rule, Memory(family.text_layers)

    @property
    def root(self) -> nn.Module:
        """The policy."""
        policy: nn.Module = self.family.policy
        return policy

    # -- life

    def begin(self) -> None:
        """Put everything on, or nothing.

        Raises:
            AttachError: the policy is running in this thread, or has such hooks.
            InputError: as in `check`.
        """
        if is_within(self.root) or is_within(self.family.model):
            raise AttachError("reuse cannot begin within a forward of its model; begin it before")
        if not self.claim():
            raise AttachError("control steps of this model are reused already; leave that block")
        try:
            self.check()
            with self.gate.opening():
                self.attach()
        except BaseException:
            self.remove()
            raise

    def end(self) -> None:
        """Take everything off, once no other thread is inside, and forget what could be taken
        over.
        """
        self.gate.close(self.entries, self.remove)
        last, self.memory = self.memory.last, Memory(self.family.text_layers)
        self.memory.last = last

    def check(self) -> None:
        """Refuse sessions beside which something cannot be taken over.

        Raises:
            InputError: there is a rule as well, or a method needs the vision tower to run.
        """
        session = self._session
        if session is None:
            return
        names = ", ".join(method.slug for method in session.plan.methods)
        if self.rule is not None:
            raise InputError(
                f"VLA-Cache takes tokens over by their place in the whole prompt, and {names} may "
                "remove others in each step; beside a session, use Reuse without a rule"
            )
        if session.plan.vision or session.tags.signals is not None:
            raise InputError(
                f"{names} acts inside the vision tower or reads it, which does not run for images "
                "that have not changed; use a method that does neither, such as 'divprune'"
            )

    def attach(self) -> None:
        """Install the hooks."""
        family: Any = self.family
        self.replace_forward(family.policy, self.forward, outer=True)
        if hasattr(family.model, "sample_actions"):
            self.entries.append(self.wrap(family.model, "sample_actions", self.sample, outer=True))
        self.replace_forward(family.base, self.prefix, outer=True)
        self.replace_forward(family.encoder.tower, self.tower, outer=True)
        if self.rule is None:
            return
        for number, layer in enumerate(family.layers):
            self.replace_forward(layer, functools.partial(self.layer, number))
            self.after(mixer_of(layer).q_proj, self.queried)

    @property
    def _session(self) -> Any:
        """What a session has put on the text model, if there is one."""
        return vars(self.family.text).get(MARK)

    def _check_call(self) -> None:
        """Refuse a call; as in `check`.

        Raises:
            InputError: gradients are wanted.
        """
        self.check()
        if torch.is_grad_enabled():
            raise InputError(
                "what is taken over from an earlier step has no gradients; call the model under "
                "torch.no_grad(), and train without reuse"
            )

    # -- a step

    @torch.no_grad()
    def sample(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the method that samples actions."""
        given = bound(original, args, kwargs)
        try:
            cache = self._recall(given)
            if cache is None:
                return original(*args, **kwargs)
            return actions_after(cache, self.family.model, given)
        finally:
            self.memory.seeing = None

    def forward(self, module: nn.Module, before: Forward, *args: Any, **kwargs: Any) -> Any:
        """In place of the policy's forward, which reads the prompt if it is given no cache."""
        run = forward_of(module, before)
        given = bound(run, args, kwargs)
        ready = any(given.get(name) is not None for name in (*NAMES, "inputs_embeds"))
        if ready or given.get("pixel_values") is None:
            return run(*args, **kwargs)
        try:
            cache = self._recall(given)
            rest = {name: value for name, value in given.items() if name not in NAMES}
            return run(**rest, **{CACHE: cache})
        finally:
            self.memory.seeing = None

    def _recall(self, given: dict[str, Any]) -> Cache | None:
        """Begin a step: the cache of its prompt, if the last one had the same.

        Raises:
            InputError: as in `check`, or gradients are wanted.
        """
        self.look_after()
        self._check_call()
        if any(given.get(name) is None for name in NEEDED):
            return None  # which the model refuses in its own words
        return self.memory.recall(Observation.of(given), self._session)

    # -- its prompt

    def tower(self, module: nn.Module, before: Forward, *args: Any, **kwargs: Any) -> Any:
        """In place of the vision tower's forward: encode images that are not those of before."""
        encode = forward_of(module, before)
        given = bound(encode, args, kwargs)
        pixels: Tensor = given.pop("pixel_values")
        if any(given.values()):
            return encode(*args, **kwargs)  # as more than states is asked for
        self._check_call()
        return self.memory.encoded(pixels, encode)

    def prefix(self, module: nn.Module, before: Forward, *args: Any, **kwargs: Any) -> Any:
        """In place of the forward of what reads the prompt: keep what it makes."""
        run, memory = forward_of(module, before), self.memory
        if memory.seeing is None:  # a loop of the caller's
            return run(*args, **kwargs)
        if self.rule is not None:
            memory.partial = begin(self.rule, self.family, memory.seeing, memory.step)
        try:
            output = run(*args, **kwargs)
            memory.remember(self._session, output.get(CACHE))
        finally:
            memory.partial = None
        return output

    def layer(
        self, number: int, module: nn.Module, before: Forward, hidden: Tensor, **kwargs: Any
    ) -> Any:
        """In place of the forward of a decoder layer."""
        run, partial = forward_of(module, before), self.memory.partial
        if partial is None:
            return run(hidden, **kwargs)
        return partial.run(number, run, module, hidden, kwargs)

    def queried(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """After a projection of queries."""
        if self.memory.partial is not None:
            self.memory.partial.attended.queried(output)
