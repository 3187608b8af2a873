"""The embedded model, served."""

import pytest

from foveate import tiny
from foveate.serve import Engine
from tests.serve.running import running


@pytest.fixture(scope="session")
def loaded():
    """The model that tests ask themselves; servers have their own."""
    return tiny.load()


@pytest.fixture(scope="session")
def scenes():
    return [tiny.draw_scene(seed) for seed in range(8)]


@pytest.fixture(scope="session")
def address():
    """A server whose own method is PyramidDrop."""
    with running(Engine(*tiny.load(), "pyramiddrop")) as found:
        yield found
