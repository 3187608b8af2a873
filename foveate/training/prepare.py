"""Training: prepare a model, train it with any training loop, save it and load it.

There is no training loop here. A prepared model is the same object with hooks on its inner modules,
so a stock Trainer, TRL or a bare loop train it, and it generates with the same methods.

Training has other query tokens than inference, because the labels say where prompts end. A method
that ranks by the last token of the prompt ranks by the token before each supervised span after the
image, averaged over spans. The question is the text after the image that is not supervised. Methods
that read the prompt leave images alone after which nothing is supervised. The choice carries no
gradient; the survivors do. Random choices are the same at each step, as in inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.resolve import MethodLike
from foveate.core.saving import FILE, WEIGHTS, Head, Saved, from_dict
from foveate.engine.attachment import MARK
from foveate.engine.session import LEARNED
from foveate.errors import AttachError, FoveateError, InputError
from foveate.families import unwrap
from foveate.io.quoting import listed, quoted
from foveate.io.writing import filling
from foveate.run import Session, use

M = TypeVar("M", bound=nn.Module)
Train = Literal["all", "method"]


def prepare(
    model: M,
    method: MethodLike,
    *,
    head: Head = "all",
    train: Train = "all",
    audio: bool | MethodLike = False,
    **fields: Any,
) -> M:
    """Attach methods to a model before it is trained.

    Adapters may be put on it before or after, and so may DDP, FSDP and accelerate's wrappers.
    `save_pretrained` of this object, and so a Trainer's checkpoint, writes a foveate.json too.

    Args:
        model: a supported model, or a PEFT model around one.
        method: a method, its name, or a list of those in stream order; see `foveate.use`.
        head: `all` makes logits of every token. In training, `labels` makes them only where a
            label is to be predicted, (N, vocabulary); the loss is the same.
        train: `all` leaves it to you which parameters of the model are trained. `method` freezes
            them, so that the method's own are trained alone.
        audio: what acts on audio, on a model that hears; see `foveate.use`.
        **fields: the method's hyper-parameters, if `method` is a name.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: a method has nothing to do in training, or the model cannot make
            logits of some tokens alone.
        BudgetError: a foveate.json says `keep_total`, which is not for training.
        FoveateError: the method has no parameters to be trained alone; and see `foveate.use`.

    Examples:
        >>> model = foveate.prepare(model, foveate.methods.PyramidDrop())  # doctest: +SKIP
        >>> Trainer(model=model, args=args, train_dataset=data).train()  # doctest: +SKIP
        >>> foveate.save(model, "out")  # doctest: +SKIP
    """
    if not isinstance(head, str) or head not in get_args(Head):
        raise FoveateError(f"head must be 'all' or 'labels', got {quoted(head)}")
    if train not in get_args(Train):
        raise FoveateError(f"train must be 'all' or 'method', got {quoted(train)}")
    session = use(unwrap(model), method, audio=audio, **fields)
    session.check_training()
    return _attach(model, session, head, train)


def _attach(model: M, session: Session, head: Head, train: Train) -> M:
    """Put a session on a model, of which it becomes a part."""
    if train == "method":
        _check_learns(session, "to train; use train='all'")
    if head == "labels":
        session.label_logits()
    session.attach()
    try:
        if train == "method":
            session.freeze_model()
        session.own_learned()
        session.around_saving(model, _with_files(session))
    except BaseException:
        session.remove()
        raise
    return model


def save(model: nn.Module, folder: str | Path, processor: Any = None, **options: Any) -> None:
    """Save a prepared model with `save_pretrained`, and foveate.json beside it.

    Of a PEFT model only the adapters are saved. The checkpoint loads without foveate too.

    Args:
        model: a prepared model, or any wrapper of one.
        folder: where to.
        processor: saved as well if it is given.
        **options: of `save_pretrained`.

    Raises:
        AttachError: the model was not prepared.
        InputError: a method is not registered, or the files cannot be written; the folder is then
            as it was.

    foveate.json then also holds the `audio` of `prepare`, and the `keep_total` of `load`.
    """
    around = _with_files(session_of(model))
    if options.get("push_to_hub"):
        options.setdefault("repo_id", Path(folder).name)
    with filling(folder) as stage:
        around(_saver(model).save_pretrained, stage, **options)
        if processor is not None:
            processor.save_pretrained(stage)


def load(
    folder: str | Path, *, trainable: bool = False, keep_total: int | None = None, **options: Any
) -> Any:
    """Load a model that `save` has saved, and prepare it.

    Args:
        folder: a folder, or a repository of the Hugging Face hub.
        trainable: whether adapters can be trained on.
        keep_total: most visual tokens of a conversation, see `foveate.use`; `None` for what was
            saved. The model cannot be trained with it.
        **options: of `from_pretrained` of the model (`dtype`, `device_map`, `revision`, ...).

    Returns:
        The model, in evaluation mode as `from_pretrained` leaves it; a PEFT model if adapters were
        saved.

    Raises:
        InputError: there is no foveate.json, or it is damaged or of a newer version.
        BudgetError: `keep_total` is no positive int, does not fit the methods, or the model is to
            be trained.
        FoveateError: the methods do not fit the model.
    """
    path = _find(folder, FILE, options)
    if path is None:
        raise InputError(
            f"{folder} has no {FILE}, so foveate.save did not write it; load the model with "
            "transformers and call foveate.prepare(model, method)"
        )
    saved = _limited(Saved.read(path), keep_total)
    adapters = _find(folder, "adapter_config.json", options)
    if adapters is None:
        return _restore(_from_pretrained(folder, options), saved, folder, options)
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise FoveateError(f"{folder} holds adapters, which need peft: pip install peft") from None
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    inner: Any = _from_pretrained(base, options)
    model = PeftModel.from_pretrained(inner, str(folder), is_trainable=trainable)
    return _restore(model, saved, folder, options, trainable=trainable)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the methods of a prepared model and what they have learned, without the model.

    Args:
        model: a prepared model, or any wrapper of one, whose methods have parameters.
        folder: where to; it gets foveate.json and foveate.safetensors.

    Raises:
        AttachError: the model was not prepared.
        FoveateError: its methods have no parameters, or the files cannot be written.
    """
    session = session_of(model)
    _check_learns(session, "to save; foveate.save(model, folder) saves the model")
    with filling(folder) as stage:
        _saved(session).write(stage, session.learned.state_dict())


def load_adapter(
    model: M, folder: str | Path, *, keep_total: int | None = None, **fields: Any
) -> M:
    """Prepare a model with methods that `save_adapter` or `save` has saved.

    Args:
        model: the model that they were trained with, without them.
        folder: a folder, or a repository of the Hugging Face hub.
        keep_total: as in `load`.
        **fields: hyper-parameters that are to be others than were saved, such as `keep`, where one
            method was saved.

    Returns:
        The same object; `foveate.training.prepare.session_of(model).remove()` takes the methods off
        again.

    Raises:
        InputError: the folder holds no such files, or they do not fit.
        FoveateError: the methods do not fit the model.
    """
    path = _find(folder, FILE, {})
    if path is None:
        raise InputError(f"{folder} has no {FILE}, so foveate.save_adapter did not write it")
    saved = _limited(Saved.read(path), keep_total)
    if fields:
        if len(saved.methods) > 1:
            raise InputError(
                f"{folder} holds {len(saved.methods)} methods, so it is not known whose "
                f"{', '.join(fields)} is meant; edit its {FILE}"
            )
        data = {**saved.methods[0].to_dict(), **fields}
        saved = replace(saved, methods=(from_dict(data),))
    return _restore(model, saved, folder, {})


def session_of(model: nn.Module) -> Session:
    """The session that `prepare` has attached: for its report, or to `remove()` it.

    Args:
        model: a prepared model, or any wrapper of one.

    Raises:
        AttachError: there is none.
    """
    for module in unwrap(model).modules():
        attachment = vars(module).get(MARK)
        if attachment is not None:
            return attachment.session
    raise AttachError(
        f"this {type(model).__name__} has no method; call foveate.prepare(model, method) first"
    )


def _check_learns(session: Session, what: str) -> None:
    """Refuse methods without parameters of their own."""
    if not len(session.learned):
        names = [method.slug for method in session.methods]
        none = f"none of {listed(names)} has" if len(names) > 1 else f"{names[0]} has no"
        raise FoveateError(f"{none} parameters of its own {what}")


def _saver(model: nn.Module) -> Any:
    """The outermost module within wrappers that can save itself."""
    found: Any = model
    while not hasattr(found, "save_pretrained"):
        found = getattr(found, "_orig_mod", getattr(found, "module", None))
    return found


def _with_files(session: Session) -> Callable[..., Any]:
    """`save_pretrained`, with what foveate writes beside it."""
    saved = _saved(session)

    def around(original: Callable[..., Any], save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_main_process", True):
            saved.write(save_directory, _learned(session, kwargs.get("state_dict")))
        return original(save_directory, *args, **kwargs)

    return around


def _saved(session: Session) -> Saved:
    """What foveate.json says of a session."""
    head: Head = "labels" if session.labelled_logits else "all"
    total = session.plan.total
    return Saved(session.shared_methods, head, session.audio, total)  # type: ignore[arg-type]


def _limited(saved: Saved, keep_total: int | None) -> Saved:
    """What was saved, with another total where one is given."""
    return saved if keep_total is None else replace(saved, keep_total=keep_total)


def _learned(session: Session, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What methods have learned: of a model's state where that was gathered, or as it is."""
    if state is not None:
        prefix = f"{LEARNED}."
        found = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if found:
            return found
    return session.learned.state_dict()


def _restore(
    model: M,
    saved: Saved,
    folder: str | Path,
    options: dict[str, Any],
    *,
    trainable: bool = False,
) -> M:
    """Prepare a model with what was saved of its methods.

    With a total it is not for training, of which its session refuses each step.
    """
    heard = saved.audio if isinstance(saved.audio, bool) else list(saved.audio)
    session = use(unwrap(model), list(saved.methods), keep_total=saved.keep_total, audio=heard)
    if trainable or saved.keep_total is None:
        session.check_training()
    _attach(model, session, saved.head, "all")
    learned = session_of(model).learned
    if len(learned):
        saved.read_weights(_find(folder, WEIGHTS, options), learned)
    return model


def _find(folder: str | Path, name: str, options: dict[str, Any]) -> str | None:
    """A file of a folder or a hub repository."""
    from transformers.utils import cached_file

    if str(folder).count("/") > 1 and not Path(folder).is_dir():  # which no hub id can be
        raise InputError(f"there is no folder {folder}")

    hub = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    given = {key: value for key, value in options.items() if key in hub}
    try:
        return cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False, **given)
    except OSError as error:
        raise InputError(f"{folder} cannot be loaded: {error}") from None


def _from_pretrained(folder: str | Path, options: dict[str, Any]) -> PreTrainedModel:
    """A model of the class that its config names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, **options)
    (name,) = config.architectures or ("",)
    kind = getattr(transformers, name, transformers.AutoModelForImageTextToText)
    return kind.from_pretrained(folder, **options)
