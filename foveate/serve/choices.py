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
from foveate.errors import BudgetError, FoveateError, InputError, UnsupportedModelError
from foveate.io.quoting import each_of
from foveate.run import use
from foveate.serve.errors import RequestError
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
        keep_total: most visual tokens of its prompt; `None` for any number.
    """

    methods: tuple[Method, ...]
    everything: bool
    keep_total: int | None = None

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
        keep_total: most visual tokens of a request, which may ask for fewer; `None` for any
            number.

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
            self._check(methods, limited=keep_total is not None)

    def resolve(self, question: Question) -> Asked:
        """The methods that a request asks for, or that the policy chooses for it.

        Raises:
            FoveateError: there is no such method or field, `keep` or `keep_total` is out of range,
                or the method does not work on the model.
        """
        choice, total = question.choice, self._limit(question)
        if self._policy is not None and question.images and choice == Choice():
            chosen = self._policy.choose(question.text, question.images)
            self._check_for(question, chosen)
            return Asked(chosen, False, total)
        everything = is_all(choice.keep)
        if everything and choice.method is None and not choice.fields:
            return Asked(self._default, True, total)
        made = self._made(choice, None if everything else choice.keep)
        everything = everything or not made
        self._check_for(question, made)
        return Asked(made, everything, total)

    def _limit(self, question: Question) -> int | None:
        """Most visual tokens of a question.

        Raises:
            RequestError: it asks for more than it may have, or for less than it needs.
        """
        wanted, most = question.keep_total, self._total
        if wanted is not None and most is not None and wanted > most:
            raise RequestError(
                f"keep_total: this server allows up to {most} visual tokens, got {wanted}",
                param="keep_total",
            )
        total, images = most if wanted is None else wanted, len(question.images)
        if total is not None and images > total:
            raise RequestError(
                f"keep_total: {images} images keep at least a visual token each, got {total}",
                param="keep_total",
            )
        return total

    def _check_for(self, question: Question, methods: tuple[Method, ...]) -> None:
        """Refuse what does not work on the model, or not with the total of a question."""
        own = question.keep_total
        try:
            self._check(methods, limited=own is not None or self._total is not None)
        except BudgetError as error:
            if own is None or not str(error).startswith("keep_total"):
                raise
            raise RequestError(str(error), param="keep_total", code=type(error).__name__) from None

    def key(self, question: Question, asked: Asked) -> tuple[Any, ...]:
        """What is equal for questions that can be answered together."""
        if not question.images:
            return ("text",)
        limited = asked.keep_total is not None
        if asked.everything:
            return ("all", limited)
        said, first = [method.to_dict() for method in asked.methods], asked.methods[0]
        if len(said) > 1 or not self._mixes(first, limited=limited):
            return ("one", _text(said), limited)
        keeps = _text({**said[0], "keep": steps_in(cast(Any, first.keep))})
        return ("keeps", keeps, limited)

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
            limited = self._total is not None
            keep, refused = made[0].keep, _refusal(self._model, made, limited=limited)
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
        if "keep_total" in choice.fields:
            raise InputError("keep_total is a field of the request itself, not one of `fields`")
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

    def _check(self, methods: tuple[Method, ...], *, limited: bool) -> None:
        """Refuse what does not work on the model, or not with a total where there is one.

        Raises:
            FoveateError: so it is.
        """
        if not methods:
            return
        name = _text([limited, *(method.to_dict() for method in methods)])
        known = self._known.get(name, UNKNOWN)
        if known is UNKNOWN:
            known = _refusal(self._model, methods, limited=limited)
            if len(self._known) >= REMEMBERED:
                self._known = {}
            self._known[name] = known
        if known is not None:
            raise type(known)(str(known))

    def _mixes(self, method: Method, *, limited: bool) -> bool:
        """Whether rows of a batch can each have their own keep of a method."""
        if method.keep is None:
            return False
        try:
            keep = per_request([cast(Any, method.keep)] * 2)
            self._check((changed(method, {"keep": keep}),), limited=limited)
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


def _refusal(model: Any, methods: tuple[Method, ...], *, limited: bool) -> FoveateError | None:
    """What stands against methods on a model, with a total or without; its number is no matter."""
    try:
        session = use(model, methods, keep_total=1 if limited else None)
    except FoveateError as error:
        return error
    if not len(session.learned):
        return None
    who = each_of(methods[int(number)].slug for number in session.learned)
    return UnsupportedModelError(f"{who} learns parameters, which this model was not given")


def is_all(keep: Any) -> bool:
    """Whether `keep` stands for all tokens: JavaScript writes 1.0 as 1."""
    return not isinstance(keep, bool) and isinstance(keep, int | float) and keep == 1


def _names(given: Mapping[str, Any]) -> str:
    return ", ".join(sorted(given))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
