"""Which cells of very large tables of tests a run takes.

Every family meets every promise in each run, and every method every family in time: of a test with
a hundred cells or more, a share is drawn by a seed that changes from day to day, and beside it the
cells that every value of every parameter needs to occur. `--all-cells` runs everything.
"""

import collections
import datetime
import hashlib
import os

LARGE = 100  # cells, from which on a test is drawn from
FOLDERS = ("conformance", "vision")
SHARES = {"test_cell": 40}  # one in so many; of other tests, one in twelve
SHARE = 12
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
        seed: of the run.
    """
    tables = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and any(f"/{name}/" in item.nodeid for name in FOLDERS):
            tables[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for test, cells in tables.items():
        if len(cells) < LARGE:
            continue
        ranks = {cell.nodeid: rank(seed, cell.nodeid) for cell in cells}
        share = 1 / SHARES.get(test.rpartition("::")[2], SHARE)
        first = {}  # parameter and value -> the cell of the lowest rank
        for cell in sorted(cells, key=lambda cell: ranks[cell.nodeid]):
            for name, value in cell.callspec.params.items():
                first.setdefault((name, str(value)), cell.nodeid)
        needed = set(first.values())
        left_out |= {n for n, number in ranks.items() if number >= share and n not in needed}
    return [item for item in items if item.nodeid not in left_out]
