"""The catalogue says what the classes say, without importing them."""

import pytest

from foveate.core import STAGES, Method, catalog, get_method, list_methods
from foveate.core.registry import _REGISTRY


def test_the_catalogue_is_the_registry():
    """What is read from sources is what importing them registers."""
    entries = catalog.catalog()
    assert [e.slug for e in sorted(entries, key=lambda e: e.slug)] == [
        name for name in list_methods() if get_method(name).__module__.startswith("foveate.")
    ]
    for entry in entries:
        cls = get_method(entry.slug)
        said = entry.stage, entry.needs, entry.paper, entry.does
        assert said == (cls.stage, cls.needs, cls.paper, cls.does)
        assert bool(entry.title) == ("arXiv" in entry.paper)


def test_entries_come_in_the_order_of_the_stream():
    """By stage, then by name."""
    found = [(STAGES.index(e.stage), e.slug) for e in catalog.catalog()]
    assert found == sorted(found)


@pytest.fixture
def plugin(monkeypatch):
    """A method of another package, which is registered when its entry point is loaded."""
    monkeypatch.setattr(catalog, "entry_points", lambda group: [object()])

    class Plugged(Method):
        slug, stage, needs, paper = "plugged", "llm", (), "Doe 2026"

    monkeypatch.setitem(_REGISTRY, "plugged", Plugged)


def test_methods_of_other_packages_are_listed(plugin):
    """They are not in foveate's folder, so the registry is asked."""
    entries = catalog.catalog()
    assert catalog.Entry("plugged", "llm", (), "Doe 2026") in entries
    assert len(entries) == len(list_methods())
