"""A run takes some cells of large tables: always enough of them, and all in time."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.drawing import LARGE, SHARE, SLOW, THIRDS, draw, rank


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
    assert 1 <= len(once) / len(items) * SHARE < 1.6


@pytest.mark.parametrize("seed", range(5))
def test_every_family_and_every_method_occurs_within_three_days(seed):
    days = [draw(table(60, 35, test="test_cell"), seed + day) for day in range(THIRDS)]
    cells = [cell for day in days for cell in day]
    assert {cell.callspec.params["family"] for cell in cells} == set(range(60))
    assert {cell.callspec.params["method"] for cell in cells} == set(range(35))
    assert all(len(day) < 0.05 * 60 * 35 for day in days)


def test_the_families_of_a_day_are_those_of_every_table():
    few, more = ({c.callspec.params["family"] for c in draw(table(40, 2, test=t), 5)} for t in "ab")
    assert len(few & more) >= 8


def test_every_value_of_a_parameter_with_few_values_occurs_each_day():
    for seed in range(20):
        cells = draw(table(60, 4), seed)
        assert {cell.callspec.params["method"] for cell in cells} == set(range(4))


def test_all_cells_are_drawn_in_as_many_days_as_a_share_has_parts():
    items = table()
    drawn = {item.nodeid for seed in range(7, 7 + SHARE) for item in draw(items, seed)}
    assert drawn == {item.nodeid for item in items}


@pytest.mark.parametrize("name", SLOW)
def test_of_slow_tests_a_part_is_run_and_all_in_time(name):
    items = table(5, 4, folder="testing", test=name)
    days = [draw(items, seed) for seed in range(3, 3 + SLOW[name])]
    assert sum(len(day) for day in days) == len(items)
    assert {cell.nodeid for day in days for cell in day} == {cell.nodeid for cell in items}
    assert max(len(day) for day in days) - min(len(day) for day in days) <= 1


@pytest.mark.parametrize("items", [table(5, 5), table(folder="golden")], ids=["small", "golden"])
def test_small_tables_and_other_folders_are_run_whole(items):
    assert len(items) < LARGE or "golden" in items[0].nodeid
    assert draw(items, 3) == items


@pytest.mark.parametrize("name", SLOW)
def test_slow_tests_are_there(name):
    assert any(
        f"def {name}(" in path.read_text() for path in Path(__file__).parent.rglob("test_*.py")
    )


def test_ranks_depend_on_the_seed_alone():
    assert rank(7, "a") == pytest.approx(rank(7, "a"), abs=0)
    assert rank(7, "a") != rank(8, "a") != rank(8, "b")
