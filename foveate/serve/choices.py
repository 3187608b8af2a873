"""Choices: which methods a request may ask for, and which requests go together."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from foveate.core.budget import per_request, steps_in
from foveate.core.catalog import catalog
from foveate.core.method import Method
from foveate.core.registry import get_method
from foveate.core.resolve import methods_of
from foveate.errors import FoveateError, InputError, UnsupportedModelError
from foveate.run import use
from foveate.serve.request import Choice, Question
from foveate.tune.policy import Policy

REMEMBERED = 1000  # methods that were checked against the model
UNKNOWN = FoveateError("not checked")


@dataclass(frozen=True)
class Asked:
    """What removes visual tokens for a question.

    Args:
        methods: in stream order.
        everything: whether all tokens are kept, whatever the methods.
    """

    methods: tuple[Method, ...]
    everything: bool

    def to_json(self) -> Any:
        """The method as its `to_dict` says it, a list of several, or `None`."""
        said = [method.to_dict() for method in self.methods]
        if self.everything:
            said = [{**method, "keep": 1.0} for method in said]
        return (said[0] if len(said) == 1 else said) if said else None


class Choices:
    """Methods on a model.

    Args:
        model: a supported vision-language model.
        default: methods of requests that name none; none for all tokens.
        policy: what chooses them for requests that say nothing, instead of the default.
        keep_total: most visual tokens of a request; `None` for any number.

    Raises:
        FoveateError: the default, or a recipe of the policy, does not work on the model.
    """

    def __init__(
        self,
        model: Any,
        default: tuple[Method, ...] = (),
        policy: Policy | None = None,
        keep_total: int | None = None,
    ) -> None:
        self._model, self._default, self._policy = model, default, policy
        self._total = keep_total
        self._lock = threading.Lock()
        self._known: dict[str, FoveateError | None] = {}
        self._list: list[dict[str, Any]] = []
        for methods in [default] if policy is None else [o.methods for o in policy.options]:
            self._check(methods)

    def resolve(self, question: Question) -> Asked:
        """The methods that a request asks for, or that the policy chooses for it.

        Raises:
            FoveateError: there is no such method or field, `keep` is out of range, or the method
                does not work on the model.
        """
        choice = question.choice
        if self._policy is not None and question.images and choice == Choice():
            return Asked(self._policy.choose(question.text, question.images), False)
        everything = is_all(choice.keep)
        if everything and choice.method is None and not choice.fields:
            return Asked(self._default, True)
        made = self._made(choice, None if everything else choice.keep)
        self._check(made)
        return Asked(made, everything or not made)

    def key(self, question: Question, asked: Asked) -> tuple[Any, ...]:
        """What is equal for questions that can be answered together."""
        if not question.images:
            return ("text",)
        if asked.everything:
            return ("all",)
        said, first = [method.to_dict() for method in asked.methods], asked.methods[0]
        if len(said) > 1 or not self._mixes(first):
            return ("one", _text(said))
        return ("keeps", _text({**said[0], "keep": steps_in(cast(Any, first.keep))}))

    def listing(self) -> list[dict[str, Any]]:
        """Every method with `slug`, `stage`, `paper`, `summary`, `default_keep`, whether it `works`
        on the model with its defaults, and `why_not`. The method of requests that name none has a
        `default`: its `keep`, and its `fields` that are not as published.
        """
        with self._lock:
            if not self._list:
                self._list = [self._entry(entry.slug) for entry in catalog()]
            return self._list

    def _entry(self, slug: str) -> dict[str, Any]:
        cls = get_method(slug)
        try:
            made = methods_of(slug)
            keep, refused = made[0].keep, _refusal(self._model, made, self._total)
            why = "" if refused is None else str(refused)
        except FoveateError as error:  # a field has no default
            keep, why = getattr(cls, "keep", None), str(error)
        return {
            "slug": slug,
            "stage": cls.stage,
            "paper": cls.paper,
            "summary": " ".join((cls.__doc__ or "").partition("\n\n")[0].split()),
            "default_keep": keep,
            "works": not why,
            "why_not": why,
            "default": self._own(slug),
        }

    def _own(self, slug: str) -> dict[str, Any] | None:
        """What requests that name no method get, if it is this method and no other."""
        if [method.slug for method in self._default] != [slug]:
            return None
        said, published = self._default[0].to_dict(), methods_of(slug)[0].to_dict()
        fields = {name: value for name, value in said.items() if published.get(name) != value}
        fields.pop("keep", None)
        return {"keep": said.get("keep"), "fields": fields}

    def _made(self, choice: Choice, keep: Any) -> tuple[Method, ...]:
        given = {} if keep is None else {"keep": tuple(keep) if isinstance(keep, list) else keep}
        if "keep" in choice.fields:
            raise InputError("keep is a field of the request itself, not one of `fields`")
        given |= choice.fields
        if choice.method is not None:
            get_method(choice.method)  # a name, and never a file
            return methods_of(choice.method, **given)
        if not given:
            return self._default
        if len(self._default) != 1:
            several = "combines several methods" if self._default else "keeps all tokens by default"
            several = several if self._policy is None else "chooses methods by the question"
            raise InputError(f"this server {several}: name the method that {_names(given)} is of")
        (default,) = self._default
        return (changed(default, given),)

    def _check(self, methods: tuple[Method, ...]) -> None:
        """Refuse what does not work on the model.

        Raises:
            FoveateError: so it is.
        """
        if not methods:
            return
        name = _text([method.to_dict() for method in methods])
        known = self._known.get(name, UNKNOWN)
        if known is UNKNOWN:
            known = _refusal(self._model, methods, self._total)
            if len(self._known) >= REMEMBERED:
                self._known = {}
            self._known[name] = known
        if known is not None:
            raise type(known)(str(known))

    def _mixes(self, method: Method) -> bool:
        """Whether rows of a batch can each have their own keep of a method."""
        if method.keep is None:
            return False
        try:
            keep = per_request([cast(Any, method.keep)] * 2)
            self._check((changed(method, {"keep": keep}),))
        except FoveateError:
            return False
        return True


def changed(method: Method, fields: Mapping[str, Any]) -> Method:
    """A method with some fields changed.

    Raises:
        FoveateError: there is no such field, or the value does not fit.
    """
    own = {f.name: getattr(method, f.name) for f in dataclasses.fields(cast(Any, method))}
    return methods_of(type(method), **{**own, **fields})[0]


def _refusal(model: Any, methods: tuple[Method, ...], total: int | None) -> FoveateError | None:
    """What stands against methods on a model, where a request has so many visual tokens at most."""
    try:
        session = use(model, methods, keep_total=total)
    except FoveateError as error:
        return error
    if not len(session.learned):
        return None
    names = ", ".join(method.slug for method in methods)
    return UnsupportedModelError(f"{names} learns parameters, which this model was not given")


def is_all(keep: Any) -> bool:
    """Whether `keep` stands for all tokens: JavaScript writes 1.0 as 1."""
    return not isinstance(keep, bool) and isinstance(keep, int | float) and keep == 1


def _names(given: Mapping[str, Any]) -> str:
    return ", ".join(sorted(given))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
