"""Which cells of large tables of tests a run takes.

The default run must end within minutes, so it takes a share of the tests that have very many cells,
or slow ones. The seed is the day: on as many days in a row as a share has parts, every cell is run.
Beside its share, a large table is run for every value of a parameter with few values, and for a
third of the values of one with many, such as families. It is the same third in all tables.
`--all-cells` runs everything.
"""

import collections
import datetime
import hashlib
import os

LARGE = 30  # cells, from which on a test is drawn from
FOLDERS = ("conformance", "engine", "families", "methods", "training", "vision")
SHARE = 12  # one cell in so many
SHARES = {"test_cell": 80}  # of other tests
MANY = 12  # values of a parameter, from which on a run meets a third of them
THIRDS = 3
SLOW = {  # tests of seconds a cell: one cell in so many is run, whatever its values
    "test_every_method_of_ours_passes": 8,
    "test_each_check_fails_where_its_promise_is_broken": 4,
    "test_a_model_compiled_before_runs_its_session": 4,
    "test_compiled_code_is_forgotten_with_the_session_wherever_it_led": 2,
    "test_every_method_costs_what_torch_counts": 4,
    "test_signals_after_a_step_are_those_of_the_masked_tower": 15,
    "test_methods_plan_on_the_published_layers_or_say_why_not": 4,
    "test_no_pair_is_refused_that_was_not": 3,
    "test_a_stock_trainer_trains_it_and_it_is_saved_and_loaded": 4,
    "test_other_pairs": 12,
    "test_three_in_a_row": 6,
    "test_inside_and_after_the_encoder": 12,
    "test_a_prefill_of_other_families_too": 24,
}
SEED = "FOVEATE_DRAW_SEED"


def seed_of(config):
    """The seed of a run, the same for all its workers."""
    given = config.getoption("--draw-seed")
    if given is not None:
        return given
    return int(os.environ.setdefault(SEED, str(datetime.date.today().toordinal())))


def is_drawn(config):
    """Whether a run takes a part: not where cells are asked for by name, or all."""
    named = config.option.keyword or any("::" in arg for arg in config.args)
    return not (named or config.getoption("--all-cells") or config.getoption("--write-support"))


def rank(seed, node):
    """A number below one for a cell, by chance."""
    digest = hashlib.blake2b(f"{seed} {node}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def draw(items, seed):
    """The items of a run, in order.

    Args:
        items: tests with `nodeid`, `location`, and `callspec.params` if they have parameters.
        seed: of the run; the next one takes the next part of every share.
    """
    tables = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            tables[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for test, cells in tables.items():
        name = test.rpartition("::")[2]
        if name in SLOW:
            kept = part(cells, SLOW[name], seed)
        elif len(cells) >= LARGE and any(f"/{folder}/" in test for folder in FOLDERS):
            kept = part(cells, SHARES.get(name, SHARE), seed) | needed(cells, seed)
        else:
            continue
        left_out |= {cell.nodeid for cell in cells} - kept
    return [item for item in items if item.nodeid not in left_out]


def part(cells, parts, seed):
    """The ids of one cell in `parts`, others for each of that many seeds in a row."""
    by_chance = sorted((cell.nodeid for cell in cells), key=lambda node: rank(0, node))
    return set(by_chance[seed % parts :: parts])


def needed(cells, seed):
    """The ids of cells in which every value of a parameter occurs; of many values, a third."""
    first = collections.defaultdict(dict)  # parameter -> value -> the cell of the lowest rank
    for cell in sorted(cells, key=lambda cell: rank(seed, cell.nodeid)):
        for name, value in cell.callspec.params.items():
            first[name].setdefault(str(value), cell.nodeid)
    return {
        node
        for values in first.values()
        for value, node in values.items()
        if len(values) < MANY or int(rank(0, value) * THIRDS) == seed % THIRDS
    }
