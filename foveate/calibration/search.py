"""Search for hyper-parameters on calibration prompts, with Optuna.

A search maximises how well the pruned model agrees with the unpruned one: the cosine similarity of
the final states of the last prompt token. Calibration prompts need no answers for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from foveate.core import Method
from foveate.errors import FoveateError, InputError
from foveate.families import Family, find_family
from foveate.io.writing import explained
from foveate.run import use

Sample = Mapping[str, Any]
M = TypeVar("M", bound=Method)


@dataclass(frozen=True)
class SearchOptions:
    """How long a search runs, and where its trials go.

    Args:
        trials: trials in all, those in the storage included.
        startup: how many of them are drawn at random.
        seed: of the draws.
        storage: file that holds the trials, from which an interrupted search continues; `None`
            keeps them in memory.
        progress: whether to show a bar.
    """

    trials: int
    startup: int
    seed: int
    storage: str | Path | None
    progress: bool


def search(
    model: Any,
    samples: Iterable[Sample],
    propose: Callable[[Any], M | None],
    options: SearchOptions,
    settings: Mapping[str, Any],
) -> M:
    """The best of the proposed methods.

    Args:
        model: a supported vision-language model.
        samples: model inputs, each with an image.
        propose: makes a method of an Optuna trial, or `None` where the trial has no method.
        options: length, seed and storage of the search.
        settings: what must be the same for a search to continue.

    Raises:
        InputError: there are no samples, or the storage holds a search with other settings, or a
            trial cannot be written to it; those before it are kept.
        FoveateError: Optuna is not installed, or no trial had a method.
    """
    try:
        import optuna
    except ImportError:
        raise FoveateError("calibration needs Optuna: pip install 'foveate[calibrate]'") from None
    prompts = list(samples)
    if not prompts:
        raise InputError("calibration needs at least one prompt")
    with _quiet(optuna):
        journal = None if options.storage is None else _journal(optuna, Path(options.storage))
        with _told(journal):
            study = _study(optuna, journal, options.storage, dict(settings))
            best = _best(optuna, study, model, prompts, propose, options)
    chosen = propose(optuna.trial.FixedTrial(best))
    assert chosen is not None  # it was run
    return chosen


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Let Optuna log errors only: it warns of an interrupted trial with a traceback."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _best(
    optuna: Any, study: Any, model: Any, prompts: list[Sample],
    propose: Callable[[Any], Method | None], options: SearchOptions,
) -> dict[str, Any]:  # fmt: skip
    """Parameters of the best of all trials."""
    state = optuna.trial.TrialState
    done = len(study.get_trials(deepcopy=False, states=(state.COMPLETE, state.PRUNED)))
    # A search that goes on must not draw the same numbers again.
    study.sampler = optuna.samplers.TPESampler(
        seed=options.seed + done, n_startup_trials=options.startup
    )
    family = find_family(model)
    unpruned = [last_state(family, inputs) for inputs in prompts]

    def objective(trial: Any) -> float:
        method = propose(trial)
        if method is None:
            raise optuna.TrialPruned
        with use(model, method):
            return agreement(unpruned, [last_state(family, inputs) for inputs in prompts])

    if options.trials > done:
        study.optimize(
            objective, n_trials=options.trials - done, show_progress_bar=options.progress
        )
    if not study.get_trials(deepcopy=False, states=(state.COMPLETE,)):
        raise FoveateError(f"none of {options.trials} trials met the budget; allow more trials")
    return study.best_params


@torch.no_grad()
def last_state(family: Family, inputs: Sample) -> Tensor:
    """(B, D) final state of the last prompt token of each row."""
    seen: list[Tensor] = []
    text = family.text  # the base model may bring the head, and return logits alone
    handle = text.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        family.base(**inputs)
    finally:
        handle.remove()
    (states,) = seen
    mask = inputs.get("attention_mask")
    if mask is None:
        return states[:, -1].float()
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return states[torch.arange(len(last)), last.to(states.device)].float()


def agreement(unpruned: Iterable[Tensor], pruned: Iterable[Tensor]) -> float:
    """Mean cosine similarity of states (B, D) with all tokens and with fewer."""
    both = torch.cat(list(unpruned)), torch.cat(list(pruned))
    return float(torch.nn.functional.cosine_similarity(*both, dim=-1).mean())


def _journal(optuna: Any, path: Path) -> Any:
    """Optuna's file of trials, of which every line is whole: one on which a search was killed, or
    that did not fit on the disk, is taken back, so that a search can go on.
    """

    class Whole(optuna.storages.journal.JournalFileBackend):
        fault: InputError | None = None

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            try:
                with explained(path):
                    super().append_logs(logs)
            except InputError as error:
                _cut(path)
                self.fault = error
                raise

    with explained(path):
        if path.is_file():
            _cut(path)
        return Whole(str(path))


def _cut(path: Path) -> None:
    """Take back what follows the last whole line."""
    data = path.read_bytes()
    os.truncate(path, data.rfind(b"\n") + 1)


@contextmanager
def _told(journal: Any) -> Iterator[None]:
    """Optuna fails in other ways once a trial could not be written; say why it was not."""
    try:
        yield
    except Exception:
        if journal is not None and journal.fault is not None:
            raise journal.fault from None
        raise


def _study(optuna: Any, journal: Any, storage: str | Path | None, settings: dict[str, Any]) -> Any:
    """A new study, or the one in a file.

    Raises:
        InputError: the file's study has other settings.
    """
    backend = None if journal is None else optuna.storages.JournalStorage(journal)
    study = optuna.create_study(
        storage=backend, study_name="foveate", direction="maximize", load_if_exists=True
    )
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", settings)
    elif known != settings:
        raise InputError(
            f"{storage} holds a search with other settings ({known}, not {settings}); take another "
            "file"
        )
    return study
