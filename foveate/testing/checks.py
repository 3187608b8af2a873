"""The checks that a method must pass, on small models, in less than a minute."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core import Method
from foveate.core.resolve import MethodLike, methods_of
from foveate.errors import BudgetError, FoveateError, InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.run import use
from foveate.testing import models
from foveate.testing.replay import Log, Row, logged

TOLERANCE = 1e-4
ROWS = ((3, 5, 4), (6,), (4, 7))  # two images, none, and one


@dataclass
class Checks:
    """What was checked.

    Args:
        method: the method.
        passed: names of the checks it passed.
        skipped: check -> why it does not apply.
        failed: check -> what went wrong.
    """

    method: Method
    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for each check."""
        lines = [f"{self.method!r}"]
        lines += [f"  passed   {name}" for name in self.passed]
        lines += [f"  skipped  {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"  FAILED   {name}: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)


class _SkipError(Exception):
    """A check that does not apply."""


def check_method(method: MethodLike) -> Checks:
    """Run the engine's promises on a method.

    Identity (keeping everything changes no bit), an oracle at full length in prefill and decoding,
    rows of a ragged batch against the same rows alone, degenerate inputs, exact removal; on the
    packaged LLaVA and on a random model with M-RoPE.

    Args:
        method: one method, as `foveate.use` takes it: an instance, a class (which is checked with
            its defaults), a registered name, or what `to_dict` says.

    Returns:
        What was passed, and what does not apply to it.

    Raises:
        AssertionError: a check failed; the message lists all that did.
        FoveateError: the method cannot be made, or works on neither model.

    Examples:
        >>> print(check_method("fastv"))  # doctest: +SKIP
    """
    found = methods_of(method)
    if len(found) > 1:
        raise FoveateError("check_method checks one method; check the others on their own")
    (subject,) = found
    checks = Checks(subject)
    _run(checks, "settings", lambda: _settings(subject))
    families = (("llava", models.llava), ("m-rope", models.mrope))
    refusals = [_check_on(name, make(), checks) for name, make in families]
    if refusals[0] is not None and None not in refusals:
        raise refusals[0]
    if checks.failed:
        raise AssertionError(str(checks))
    return checks


def _check_on(name: str, model: Any, checks: Checks) -> FoveateError | None:
    """Run the checks on one model; returns why the model refuses the method, if it does."""
    try:
        use(model, checks.method)
    except FoveateError as error:
        checks.skipped[name] = f"refused: {error}"
        return error
    for check in (_identity, _oracle, _batch, _degenerate, _removal):
        run = functools.partial(check, checks.method, model)
        _run(checks, f"{name}: {check.__name__[1:]}", run)
    return None


def _run(checks: Checks, name: str, check: Callable[[], None]) -> None:
    try:
        with torch.no_grad():
            check()
    except _SkipError as why:
        checks.skipped[name] = str(why)
    except Exception as error:  # a user's code may raise anything
        checks.failed[name] = f"{type(error).__name__}: {error}".strip()
    else:
        checks.passed.append(name)


def _settings(method: Method) -> None:
    """A frozen dataclass whose fields are plain JSON."""
    assert dataclasses.is_dataclass(method), "a method is a dataclass"
    assert type(method).__dataclass_params__.frozen, "use @dataclass(frozen=True)"
    json.dumps(method.to_dict())


def _changed(method: Method, keep: Any) -> Method:
    """The method with another budget, in as many steps as it has.

    Raises:
        _SkipError: it has no budget of that form.
    """
    if getattr(method, "keep", None) is None:
        raise _SkipError("the method has no keep")
    now = method.keep
    wanted = (keep,) * len(now) if isinstance(now, tuple) else keep
    try:
        return dataclasses.replace(method, keep=wanted)  # type: ignore[type-var]
    except FoveateError as error:
        raise _SkipError(f"keep={wanted} is refused: {error}") from None


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def _identity(method: Method, model: Any) -> None:
    """With keep=1.0 nothing changes, not by a bit."""
    everything = _changed(method, 1.0)
    inputs = models.prompts(model, ROWS)
    bare = _logits(model, inputs)
    with use(model, everything):
        got = _logits(model, inputs)
    assert torch.equal(got, bare), "keep=1.0 changes logits"


def _oracle(method: Method, model: Any) -> None:
    """Prefill and decoding equal the model at full length with removed tokens hidden."""
    check_oracle([method], model)


def check_oracle(methods: Sequence[Method], model: Any) -> None:
    """Compare methods, one after the other, with the model at full length.

    Args:
        methods: in stream order.
        model: from `foveate.testing.models`.

    Raises:
        AssertionError: logits of the prompt or of a generated token differ from the oracle's, or do
            not differ from those without methods.
    """
    family = find_family(model)
    if any("reinsert" in step.effects for method in methods for step in method.steps(family)):
        raise _SkipError("tokens come back, which the oracle does not replay")
    if not all(method.removes for method in methods):
        raise _SkipError("layers are computed approximately, which the oracle does not replay")
    inputs = models.prompts(model, [(5, 6)], seed=1)
    log: Log = []
    with use(model, [logged(method, log) for method in methods]) as run:
        out = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        kept = run.kept[0]
    _check_replayable(model, inputs, kept, log)
    prompt = inputs["input_ids"].shape[1]
    full = _full_length(inputs, out.sequences[:, :-1], model)
    states = Row(model, full).run(log, inputs.get("pixel_values"))
    want = model.lm_head(states[prompt - 1 :])
    got = torch.cat(out.logits)
    bare = _logits(model, full)[0, prompt - 1 :]
    error, effect = _distance(got, want), _distance(got, bare)
    assert error <= TOLERANCE, f"logits are {error:.1e} from the oracle's"
    assert effect > 10 * TOLERANCE, "removing tokens changed nothing, so that nothing was checked"


def _check_replayable(
    model: Any, inputs: dict[str, Any], kept: Mapping[str, Tensor], log: Log
) -> None:
    """Refuse what the oracle cannot replay, or where it could tell nothing.

    Raises:
        _SkipError: says which.
    """
    total = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if all(len(index) == total for index in kept.values()):
        raise _SkipError("it removed nothing of this image")
    if any(len(index) == 0 for index in kept.values()):
        raise _SkipError("it removes all tokens of an image")
    if model.config.model_type != "llava" and any(p.startswith("vision") for _, p, _ in log):
        raise _SkipError("the oracle of the encoder knows CLIP only")


def _full_length(inputs: dict[str, Any], ids: Tensor, model: Any) -> dict[str, Any]:
    """The prompt and the generated tokens (1, T) as one prompt."""
    full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return full


def _batch(method: Method, model: Any) -> None:
    """A row of a ragged, padded batch gets what it gets alone."""
    inputs = models.prompts(model, ROWS)
    settings: Any = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with use(model, method):
        together = model.generate(**inputs, **settings).logits
        for row in range(len(ROWS)):
            alone = model.generate(**models.one_row(inputs, model, row), **settings).logits
            for got, want in zip(together, alone, strict=True):
                error = _distance(got[row], want[0])
                assert error <= TOLERANCE, f"row {row} is {error:.1e} from the same row alone"


def _degenerate(method: Method, model: Any) -> None:
    """One token, more tokens than there are, and features that are the same everywhere."""
    inputs = models.prompts(model, [(4, 5)])
    total = int((inputs["input_ids"] == model.config.image_token_id).sum())
    black = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    cases: list[tuple[str, Method, dict[str, Any]]] = [("a black image", method, black)]
    for name, value in (("features that are all alike", 0.5), ("features of zero", 0.0)):
        same = torch.full((total, model.config.text_config.hidden_size), value)
        given = {n: v for n, v in inputs.items() if n != "pixel_values"}
        encoded: Any = [same]
        given["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=encoded)}
        cases.append((name, method, given))
    for name, keep in (("keep=1", 1), ("keep above the token count", 10 * total)):
        try:
            cases.append((name, _changed(method, keep), inputs))
        except _SkipError:
            continue
    for name, subject, given in cases:
        with use(model, subject):
            try:
                logits = _logits(model, given)
            except (BudgetError, UnsupportedModelError):  # refused with a reason
                continue
            except InputError as error:
                if "mm_encoder_outputs" in str(error):  # it needs what only the encoder knows
                    continue
                raise
        assert bool(logits.isfinite().all()), f"{name} gives logits that are not finite"


def _removal(method: Method, model: Any) -> None:
    """Nothing remains attached, and the same input gives the same output again."""
    inputs = models.prompts(model, [(4, 5)])
    bare = _logits(model, inputs)
    with use(model, method):
        first, second = _logits(model, inputs), _logits(model, inputs)
    assert torch.equal(first, second), "two runs differ"
    assert torch.equal(_logits(model, inputs), bare), "the model is not what it was"


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
