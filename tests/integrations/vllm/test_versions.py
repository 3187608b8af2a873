"""Releases of vLLM that are served; no vLLM is needed."""

import pytest
from packaging.version import Version

from foveate.errors import UnsupportedModelError
from foveate.integrations.vllm import versions


@pytest.mark.parametrize("release", ["0.32.0", "0.32.3", "0.33.0+cpu"])
def test_known_releases_pass(monkeypatch, release):
    monkeypatch.setattr(versions, "installed", lambda: Version(release))
    versions.check_version()


@pytest.mark.parametrize("release", [Version("0.34.0"), Version("1.32"), None])
def test_other_releases_are_refused(monkeypatch, release):
    monkeypatch.setattr(versions, "installed", lambda: release)
    with pytest.raises(
        UnsupportedModelError, match=r"of 0\.32, the tests were run .* of 0\.33, the source"
    ):
        versions.check_version()


def test_distributions_are_asked_in_turn(monkeypatch):
    def version(name):
        if name == "vllm":
            raise versions.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(versions, "version", version)
    assert versions.installed() == Version("0.32.0")
