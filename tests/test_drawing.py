"""A run takes some cells of large tables: always enough of them, and all in time."""

from types import SimpleNamespace

import pytest

from tests.drawing import LARGE, SHARE, draw, rank


def table(families=30, methods=20, folder="conformance", test="test_all"):
    return [
        SimpleNamespace(
            nodeid=f"tests/{folder}/test_x.py::{test}[{family}-{method}]",
            callspec=SimpleNamespace(params={"family": family, "method": method}),
        )
        for family in range(families)
        for method in range(methods)
    ]


def test_a_seed_draws_the_same_cells_in_order_and_another_draws_others():
    items = table()
    once = draw(items, 1)
    assert once == draw(list(items), 1) == [item for item in items if item in once]
    assert once != draw(items, 2)
    assert 0.8 < len(once) / len(items) * SHARE < 1.6


@pytest.mark.parametrize("seed", range(5))
def test_every_family_and_every_method_occurs(seed):
    cells = draw(table(60, 35, test="test_cell"), seed)
    assert {cell.callspec.params["family"] for cell in cells} == set(range(60))
    assert {cell.callspec.params["method"] for cell in cells} == set(range(35))
    assert len(cells) < 0.1 * 60 * 35


def test_all_cells_are_drawn_in_time():
    items = table()
    drawn = {item.nodeid for seed in range(10 * SHARE) for item in draw(items, seed)}
    assert drawn == {item.nodeid for item in items}


@pytest.mark.parametrize("items", [table(9, 11), table(folder="engine")], ids=["small", "engine"])
def test_small_tables_and_other_folders_are_run_whole(items):
    assert len(items) < LARGE or "engine" in items[0].nodeid
    assert draw(items, 3) == items


def test_ranks_depend_on_the_seed_alone():
    assert rank(7, "a") == pytest.approx(rank(7, "a"), abs=0)
    assert rank(7, "a") != rank(8, "a") != rank(8, "b")
