"""`foveate serve`: load a model and answer until a signal comes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from foveate.cli.console import progress, stderr, stdout
from foveate.cli.inputs import check_model
from foveate.core import Method
from foveate.errors import InputError
from foveate.integrations.ray_cluster import check_gpus, import_ray
from foveate.loading import load_model

if TYPE_CHECKING:
    from foveate.serve.replicas import Fleet
    from foveate.tune.policy import Policy

NEEDED = ("fastapi", "uvicorn", "openai", "httpx", "prometheus_client")
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """`foveate.serve.Settings` without the model's name."""

    deadline: float
    max_held: int
    max_body: int
    max_images: int
    max_image_bytes: int
    max_pixels: int
    max_tokens: int
    allow_hosts: frozenset[str]
    show_kept: bool
    api_key: str | None


def serve(
    model: str,
    methods: Sequence[Method],
    limits: Limits,
    address: tuple[str, int],
    name: str | None,
    batching: tuple[int, float],
    weights: tuple[str, str],
    fleet: Fleet | None = None,
    policy: Policy | None = None,
    keep_total: int | None = None,
) -> None:
    """Load the model, and serve it.

    Args:
        model: hub id, local folder, `tiny` or `small`.
        methods: of requests that name none, in stream order; none for all tokens.
        limits: of requests.
        address: host and port.
        name: what clients call the model; by default `model`, of a folder its name.
        batching: most requests of a batch, and milliseconds to wait for them.
        weights: device and dtype.
        fleet: replicas under Ray; `None` for a model in this process.
        policy: what chooses methods for requests that name none; `None` for `methods`.
        keep_total: most visual tokens of a request; `None` for any number.

    Raises:
        FoveateError: a package is missing, the address is taken, or the method does not work.
    """
    check_packages()
    from foveate.serve import Settings, create_app
    from foveate.serve.logs import log_to_stderr
    from foveate.serve.server import listen, run

    listening = listen(*address)
    with progress() as steps:
        steps.say(f"loading {model}")
        engine = _engine(
            model, tuple(methods), batching, limits.max_tokens, weights, fleet, policy, keep_total
        )
    called = name or (Path(model).resolve().name if Path(model).is_dir() else model)
    app = create_app(engine, Settings(called, **asdict(limits)))
    listening.listen()  # who reads the address can connect
    place = (address[0], listening.getsockname()[1])
    _announce(called, _chosen_by(methods, policy), place, guarded=limits.api_key is not None)
    log_to_stderr()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray sets a handler that exits with code 15
    run(app, listening, limits.deadline)


def _announce(called: str, by: str, address: tuple[str, int], *, guarded: bool) -> None:
    """Say what is served where, and whether anyone may use it."""
    host, port = address
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    stdout().print(f"serving [bold]{escape(called)}[/] with {escape(by)} at {url}", soft_wrap=True)
    if not guarded and host not in LOCAL:
        stderr().print(
            "[yellow]note: no --api-key: anyone who can reach this address can use the server[/]"
        )


def _chosen_by(methods: Sequence[Method], policy: Policy | None) -> str:
    """What requests that name nothing are answered with."""
    if policy is not None:
        return f"one of {len(policy.options)} recipes for each question"
    return " + ".join(method.slug for method in methods) or "all tokens"


def _engine(
    model: str,
    methods: tuple[Method, ...],
    batching: tuple[int, float],
    max_tokens: int,
    weights: tuple[str, str],
    fleet: Fleet | None,
    policy: Policy | None,
    keep_total: int | None,
) -> Any:
    """What answers: a model here, or replicas; see `serve`."""
    most, wait = batching
    if fleet is None:
        from foveate.serve import Engine

        return Engine(
            *load_model(model, *weights), list(methods) or None, max_batch=most, max_wait=wait,
            max_tokens=max_tokens, policy=policy, keep_total=keep_total,
        )  # fmt: skip
    from foveate.serve.replicas import OPTION, Replicas, Spec

    device, dtype = weights
    import_ray(OPTION)
    check_gpus(fleet.gpus, device, (OPTION, "--gpus-per-replica"))
    for recipe in [methods] if policy is None else [o.methods for o in policy.options]:
        check_model(model, recipe, dtype, keep_total)
    where = str(Path(model).absolute()) if Path(model).is_dir() else model
    spec = Spec(where, methods, device, dtype, most, wait, max_tokens, policy, keep_total)
    return Replicas(spec, fleet)


def check_packages() -> None:
    """Refuse to start without what a server needs.

    Raises:
        InputError: a package is missing.
    """
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise InputError(f"foveate serve needs {', '.join(missing)}: pip install 'foveate[serve]'")
