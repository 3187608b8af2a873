"""Recorded cases: inputs and the outputs of the authors' code.

Small ones are in `recorded` beside this file, others under `--golden-root`. Every file
DIR/<slug>/*.safetensors of a registered method is a case, and every check that its adapter offers
for it is a test of its own.
"""

from pathlib import Path

import pytest
from golden_case import Case, cases_of, checks_of

from foveate.core import list_methods

HERE = Path(__file__).parent / "recorded"


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
    there = root.is_dir()
    own, others = _cases(HERE), _cases(root) if there else []
    params = [
        pytest.param(check, id=f"{case.slug}/{case.path.stem}/{name}")
        for case in [*own, *others]
        for name, check in checks_of(case).items()
    ]
    if not own:
        raise pytest.UsageError(f"{HERE} has lost its cases")
    if others:
        return params
    if given or there:
        wrong = f"has no case of a registered method: {list_methods()}"
        raise pytest.UsageError(f"{root} {wrong if there else 'is not a folder'}")
    reason = "no folder shared/golden beside the repository; pass --golden-root DIR"
    return [*params, pytest.param(None, id="no-cases", marks=pytest.mark.skip(reason=reason))]


def _cases(root: Path) -> list[Case]:
    """All cases of registered methods under a folder."""
    return [case for slug in list_methods() for case in cases_of(slug, root)]
