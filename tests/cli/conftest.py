"""A drawn scene and what is asked about it."""

import pytest

from foveate import tiny


@pytest.fixture(scope="session")
def question():
    return tiny.draw_scene(3).questions[0].text


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    tiny.draw_scene(3).image.save(path)
    return str(path)
