"""Ray: a connection to a cluster, or a Ray of our own on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from foveate.errors import InputError
from foveate.io.quoting import shown

_STORE = 100 * 2**20  # bytes of the object store of a Ray of our own


def import_ray(option: str) -> Any:
    """The module `ray`.

    Args:
        option: what needs it, for the message.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError(f"{option} needs Ray: pip install 'foveate[ray]'") from None
    return ray


def check_gpus(gpus: float, device: str, names: tuple[str, str]) -> None:
    """Refuse GPUs that no model would use, and models on GPUs that Ray does not give.

    Args:
        gpus: of a process.
        device: where its model runs.
        names: options of the command that set how many processes there are, and their GPUs.

    Raises:
        InputError: so it is.
    """
    many, each = names
    cuda = device.startswith("cuda")
    if gpus and not cuda:
        raise InputError(f"{each} gives GPUs that models use with --device cuda")
    if cuda and not gpus:
        raise InputError(f"--device cuda with {many} needs {each}, such as 1 or 0.5")


@contextmanager
def connected(ray: Any, address: str | None, cpus: float) -> Iterator[None]:
    """A connection to Ray; one that was there before is used, and stays.

    Args:
        ray: the module.
        address: of a cluster, or `auto`; `None` for `RAY_ADDRESS`, and without that for a Ray of
            our own, which ends with the block.
        cpus: what a Ray of our own must promise its processes.

    Raises:
        InputError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what its C++ says to users of Ray
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        count = max(os.cpu_count() or 1, int(cpus + 0.99))
        options = {"num_cpus": count, "include_dashboard": False, "object_store_memory": _STORE}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot reach Ray at {shown(address, 60)}: {shown(error, 120)}") from None
    try:
        yield
    finally:
        ray.shutdown()
