"""Recorded cases: inputs and the outputs of the authors' code, found under `--golden-root`.

Every file DIR/<slug>/*.safetensors of a registered method is a case, and every check that its
adapter offers for it is a test of its own.
"""

from pathlib import Path

import pytest
from golden_case import cases_of, checks_of

from foveate.core import list_methods


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-root",
        metavar="DIR",
        help="folder of recorded cases (default: shared/golden beside the repository)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_check" in metafunc.fixturenames:
        metafunc.parametrize("golden_check", _checks(metafunc.config))


def _checks(config: pytest.Config) -> list:
    given = config.getoption("golden_root", default=None)
    root = Path(given) if given else config.rootpath.parent / "shared" / "golden"
    if not root.is_dir():
        if given:
            raise pytest.UsageError(f"--golden-root {given} is not a folder")
        reason = "no folder shared/golden beside the repository; pass --golden-root DIR"
        return [pytest.param(None, id="no-cases", marks=pytest.mark.skip(reason=reason))]
    cases = [case for slug in list_methods() for case in cases_of(slug, root)]
    if not cases:
        raise pytest.UsageError(f"{root} has no case of a registered method: {list_methods()}")
    return [
        pytest.param(check, id=f"{case.slug}/{case.path.stem}/{name}")
        for case in cases
        for name, check in checks_of(case).items()
    ]
