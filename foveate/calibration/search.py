"""Search for hyper-parameters on calibration prompts, with Optuna.

A search changes how well the pruned model says what the whole model says: the cosine similarity of
the final states of the last prompt token, which calibration prompts need no answers for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.core import Method
from foveate.errors import FoveateError, InputError
from foveate.families import find_family
from foveate.io.writing import explained
from foveate.run import use

Sample = Mapping[str, Any]
Propose = Callable[[Any], Method | None]


def search(
    model: Any,
    samples: Iterable[Sample],
    propose: Propose,
    *,
    trials: int,
    startup: int,
    seed: int,
    storage: str | Path | None,
    settings: Mapping[str, Any],
    progress: bool,
) -> Method:
    """The best of the proposed methods.

    Args:
        model: a supported vision-language model.
        samples: model inputs, each with an image.
        propose: makes a method of an Optuna trial, or `None` where the trial has no method.
        trials: how many to have in all, those in the storage included.
        startup: how many of them are drawn at random.
        seed: of the draws.
        storage: file that holds the trials, so that a search can go on where it stopped; `None`
            keeps them in memory.
        settings: what must be the same for a search to go on.
        progress: whether to show a bar.

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
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        journal = None if storage is None else _journal(optuna, Path(storage))
        with _told(journal):
            study = _study(optuna, journal, storage, dict(settings))
            best = _best(optuna, study, model, prompts, propose, trials, startup, seed, progress)
    finally:
        optuna.logging.set_verbosity(verbosity)
    chosen = propose(optuna.trial.FixedTrial(best))
    assert chosen is not None  # it was run
    return chosen


def _best(
    optuna: Any, study: Any, model: Any, prompts: list[Sample], propose: Propose,
    trials: int, startup: int, seed: int, progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """Parameters of the best of so many trials."""
    state = optuna.trial.TrialState
    done = len(study.get_trials(deepcopy=False, states=(state.COMPLETE, state.PRUNED)))
    # A search that goes on must not draw the same numbers again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + done, n_startup_trials=startup)
    base = find_family(model).base
    whole = [last_state(base, inputs) for inputs in prompts]

    def objective(trial: Any) -> float:
        method = propose(trial)
        if method is None:
            raise optuna.TrialPruned
        with use(model, method):
            return agreement(whole, [last_state(base, inputs) for inputs in prompts])

    if trials > done:
        study.optimize(objective, n_trials=trials - done, show_progress_bar=progress)
    if not study.get_trials(deepcopy=False, states=(state.COMPLETE,)):
        raise FoveateError(f"none of {trials} trials met the budget; allow more trials")
    return study.best_params


@torch.no_grad()
def last_state(base: Any, inputs: Sample) -> Tensor:
    """(B, D) final state of the last prompt token of each row."""
    states = base(**inputs).last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is None:
        return states[:, -1].float()
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return states[torch.arange(len(last)), last.to(states.device)].float()


def agreement(whole: Iterable[Tensor], pruned: Iterable[Tensor]) -> float:
    """Mean cosine similarity of states (B, D) with all tokens and with fewer."""
    both = torch.cat(list(whole)), torch.cat(list(pruned))
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
    place = None if journal is None else optuna.storages.JournalStorage(journal)
    study = optuna.create_study(
        storage=place, study_name="foveate", direction="maximize", load_if_exists=True
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
