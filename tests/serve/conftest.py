"""The embedded model, served."""

import pytest

from foveate import tiny
from foveate.serve import Engine
from tests.serve.running import running


@pytest.fixture(scope="session")
def loaded():
    return tiny.load()


@pytest.fixture(scope="session")
def scenes():
    return [tiny.draw_scene(seed) for seed in range(8)]


@pytest.fixture(scope="session")
def address(loaded):
    """A server whose own method is PyramidDrop."""
    with running(Engine(*loaded, "pyramiddrop")) as found:
        yield found
