"""foveate.json: the methods of a model, beside its checkpoint.

The file holds `format` (a number that grows when older versions of foveate could not read it),
`foveate` (the version that wrote it), `methods` (what `Method.to_dict` says, in stream order) and
`head` (see `foveate.prepare`). It may hold `audio` (`true`, or methods for audio alone) and
`keep_total`, as `foveate.use` takes them: its format is then 2, as older versions would pass over
them. What methods have learned is in foveate.safetensors.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.core.budget import PerRequest, plain_total
from foveate.core.method import Method
from foveate.core.registry import get_method
from foveate.errors import BudgetError, FoveateError, InputError
from foveate.io.quoting import each_of, listed, quoted, shown, within
from foveate.io.reading import check_plain, parse_json, read_text, reason
from foveate.io.writing import check_folder, replacing, write_json

FILE = "foveate.json"
WEIGHTS = "foveate.safetensors"
FORMAT = 2
KEYS = ("format", "foveate", "methods", "head", "audio", "keep_total")
Head = Literal["all", "labels"]


@dataclass(frozen=True)
class Saved:
    """What is written about a prepared model.

    Args:
        methods: its methods, in stream order.
        head: of which tokens logits are made in training.
        audio: whether they act on audio too, or methods for it alone.
        keep_total: most visual tokens of a conversation; `None` for any number.

    Raises:
        BudgetError: `keep_total` is no positive int.
    """

    methods: tuple[Method, ...]
    head: Head = "all"
    audio: bool | tuple[Method, ...] = False
    keep_total: int | None = None

    def __post_init__(self) -> None:
        if isinstance(plain_total(self.keep_total), tuple):
            raise BudgetError(
                f"a saved keep_total is one number for all rows, got {quoted(self.keep_total)}"
            )

    @property
    def besides(self) -> dict[str, Any]:
        """What holds for a whole session, as JSON values: `audio` and `keep_total`, where set."""
        found: dict[str, Any] = {}
        if self.audio is not False:
            heard = self.audio
            found["audio"] = heard if heard is True else [method.to_dict() for method in heard]
        if self.keep_total is not None:
            found["keep_total"] = int(self.keep_total)
        return found

    def alone(self, name: str | os.PathLike[str]) -> tuple[Method, ...]:
        """The methods of a file, where nothing else can be taken from it.

        Args:
            name: of the file.

        Raises:
            InputError: it says more.
        """
        if self.besides:
            raise InputError(
                f"{shown(name)} also sets {' and '.join(self.besides)}, which is read where the "
                "file alone is the method of foveate.use, foveate.load or `foveate run`, `batch` "
                "or `serve`; here, take it out of the file"
            )
        return self.methods

    def write(self, folder: str | Path, learned: Mapping[str, Tensor] | None = None) -> Path:
        """Write the file into a folder, which is made if need be.

        Args:
            folder: where to.
            learned: weights of methods that learn, which go into a file of their own.

        Returns:
            The path of foveate.json.

        Raises:
            InputError: a method is not registered or holds what JSON cannot, so that nobody could
                load it, or the folder cannot be written to.
        """
        heard = self.audio if isinstance(self.audio, tuple) else ()
        for method in (*self.methods, *heard):
            check_registered(method)
            check_readable(method)
        data = {
            "format": FORMAT if self.besides else 1,
            "foveate": _version(),
            "methods": [method.to_dict() for method in self.methods],
            "head": self.head,
            **self.besides,
        }
        path = Path(folder) / FILE
        check_folder(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, data)
        if learned:
            weights = {name: value.contiguous() for name, value in learned.items()}
            with replacing(path.with_name(WEIGHTS)) as part:
                save_file(weights, part)
        return path

    def read_weights(self, path: str | Path | None, learned: nn.Module) -> None:
        """Read the weights of methods that learn into their modules.

        Raises:
            InputError: there are none, or they do not fit.
        """
        heard = self.audio if isinstance(self.audio, tuple) else ()
        every = [method.slug for method in (*self.methods, *heard)]
        names = [every[int(number)] for number, _ in learned.named_children()]
        if path is None:
            raise InputError(f"{each_of(names)} learns, but there is no {WEIGHTS} beside {FILE}")
        try:
            learned.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{path} does not hold the weights of {listed(names)}: {error}"
            ) from None

    @classmethod
    def read(cls, path: str | Path) -> Saved:
        """Read a file.

        Raises:
            InputError: it is no such file, damaged, or written by a newer foveate.
            UnknownMethodError: a method is not known here.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except FoveateError as error:
            raise type(error)(within(path, error)) from None

    @classmethod
    def from_dict(cls, data: Any) -> Saved:
        """What the file holds, as `json.loads` gives it.

        Raises:
            InputError: it is something else, or written by a newer foveate.
            FoveateError: as in `foveate.core.saving.from_dict`.
        """
        if not isinstance(data, dict) or type(data.get("format")) is not int:
            raise InputError("foveate.save has not written this: no `format`")
        if data["format"] > FORMAT:
            raise InputError(
                f"it has format {quoted(data['format'])}, written by foveate "
                f"{shown(str(data.get('foveate', 'of a later version')), 20)}; this foveate "
                f"{_version()} reads formats up to {FORMAT}, so upgrade it"
            )
        if unknown := [name for name in data if name not in KEYS]:
            raise InputError(f"it says {quoted(unknown[0])}, which is none of {', '.join(KEYS)}")
        methods, head = data.get("methods"), data.get("head", "all")
        if not isinstance(methods, list) or not methods:
            raise InputError("it names no `methods`; save the model again")
        if not isinstance(head, str) or head not in get_args(Head):
            raise InputError(f"head must be 'all' or 'labels', got {quoted(head)}")
        made = tuple(from_dict(method) for method in methods)
        return cls(made, head, _audio(data), data.get("keep_total"))  # type: ignore[arg-type]


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)} cannot be read as JSON: {reason(error)}") from None


def from_dict(data: Mapping[str, Any]) -> Method:
    """The method that `Method.to_dict` has described.

    Args:
        data: `method`, its name, and hyper-parameters; those left out have their defaults.

    Raises:
        InputError: no name, or fields that the method does not have.
        UnknownMethodError: no such method.
        FoveateError: a value is refused by the method.

    Examples:
        >>> from_dict({"method": "fastv", "layer": 3})
        FastV(layer=3, keep=0.5, positions=None)
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise InputError(f"a method is a mapping with its name under `method`, got {quoted(data)}")
    kind = get_method(data["method"])
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    try:
        check_plain(dict(data))
    except ValueError as error:
        raise InputError(f"{kind.slug} cannot be made of this: {shown(error)}") from None
    values = {name: _value(value) for name, value in data.items() if name != "method"}
    values |= {"keep": _keep(data["keep"])} if "keep" in data else {}
    if unknown := [name for name in values if name not in names]:
        whole = unknown[0] in ("keep_total", "audio")
        why = (
            "It is no method's, but a whole session's: foveate.use"
            if whole
            else ("Another version of foveate may have written this")
        )
        raise InputError(
            f"{kind.slug} has no field {quoted(unknown[0])}; it has {', '.join(names)}. {why}"
        )
    try:
        return kind(**values)
    except FoveateError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{kind.slug} cannot be made of {quoted(dict(data))}: {shown(error)}"
        ) from None


def check_registered(method: Method) -> None:
    """Refuse a method that cannot be found by its name.

    Raises:
        InputError: so it is.
    """
    slug = getattr(method, "slug", None)
    try:
        known = slug is not None and get_method(slug) is type(method)
    except FoveateError:
        known = False
    if not known:
        raise InputError(
            f"{type(method).__name__} is not registered, so a saved model could not find it; put "
            "@foveate.register(name, stage=...) on the class"
        )


def check_readable(method: Method) -> None:
    """Refuse a method that its `to_dict` does not say all of, such as one that holds modules.

    Raises:
        InputError: so it is.
    """
    try:
        from_dict(method.to_dict())
    except FoveateError as error:
        raise InputError(
            f"this {method.slug} cannot be saved, for it could not be read back: {shown(error)}"
        ) from None


def _audio(data: Mapping[str, Any]) -> bool | tuple[Method, ...]:
    """What a file says of audio.

    Raises:
        FoveateError: it is no boolean, and no list of methods.
    """
    given = data.get("audio", False)
    if isinstance(given, bool):
        return given
    if not isinstance(given, list) or not given:
        raise InputError(f"audio must be true, false or a list of methods, got {quoted(given)}")
    return tuple(from_dict(method) for method in given)


def _value(value: Any) -> Any:
    """A hyper-parameter as methods have it: tuples instead of lists."""
    return tuple(map(_value, value)) if isinstance(value, list | tuple) else value


def _keep(value: Any) -> Any:
    """A `keep`, which may be a budget for each request."""
    if isinstance(value, Mapping) and list(value) == ["values"]:
        return PerRequest(_value(value["values"]))
    return _value(value)


def _version() -> str:
    try:
        return version("foveate")
    except PackageNotFoundError:  # run from a folder
        return "unknown"
