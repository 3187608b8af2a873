"""Many cells: `python -m tests.fuzz --cells 5000 --seed 1`, or one: `--replay 1:23`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
import warnings
from collections import Counter
from typing import Any

import torch
import transformers

from tests.fuzz.cell import cell_of
from tests.fuzz.judge import AGREED, BARE, CRASHED, DISAGREED, REFUSED, Outcome, judge
from tests.fuzz.page import PAGE, write

NUMBERS = re.compile(r"\b\d+(?:\.\d+)?(?:e[-+]?\d+)?\b")
SEVERAL = re.compile(r"\((?:N, )*N,?\)|N(?:, N)+")


def main(arguments: list[str] | None = None) -> int:
    """Run cells; 1 if any is at fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first cell")
    parser.add_argument("--replay", metavar="SEED:NUMBER", help="run one cell and show it")
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE.name}")
    given = parser.parse_args(arguments)
    quiet()
    if given.replay:
        return replay(given.replay)
    run = Run(given.seed, given.start, given.cells)
    run.play()
    print(run.table())
    if given.write:
        write(run.result())
    return 1 if run.faults else 0


def quiet() -> None:
    """One thread, and no remarks of transformers on tiny models."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()


def replay(key: str) -> int:
    """Run one cell, and show what is in it."""
    seed, number = key.split(":")
    cell = cell_of(int(seed), int(number))
    print(cell)
    outcome = judge(cell)
    print(f"{outcome.status}: {outcome.detail or f'{outcome.distance:.1e} from the oracle'}")
    return 1 if outcome.status in (DISAGREED, CRASHED) else 0


class Run:
    """Cells one after another.

    Args:
        seed: of all of them.
        start: number of the first.
        cells: how many.
    """

    def __init__(self, seed: int, start: int, cells: int) -> None:
        self.seed, self.numbers = seed, range(start, start + cells)
        self.outcomes: dict[str, Outcome] = {}
        self.seconds = 0.0

    def play(self) -> None:
        """Run them; says at once what is at fault, and how far it is now and then."""
        begin = time.monotonic()
        for number in self.numbers:
            key = f"{self.seed}:{number}"
            outcome = self.outcomes[key] = judge(cell_of(self.seed, number))
            self.seconds = time.monotonic() - begin
            if outcome.status in (DISAGREED, CRASHED):
                print(f"{key} {outcome.status}: {outcome.detail.splitlines()[0]}")
                print(f"  again: python -m tests.fuzz --replay {key}", flush=True)
            if len(self.outcomes) % 100 == 0 and sys.stdout:
                counts = ", ".join(f"{n} {status}" for status, n in self.counts.items())
                print(f"{len(self.outcomes)} of {len(self.numbers)}: {counts}", flush=True)

    @property
    def counts(self) -> dict[str, int]:
        """How many cells have which outcome."""
        found = Counter(outcome.status for outcome in self.outcomes.values())
        return {status: found[status] for status in (AGREED, REFUSED, BARE, DISAGREED, CRASHED)}

    @property
    def faults(self) -> list[str]:
        """Keys of cells that disagreed or crashed."""
        bad = (DISAGREED, CRASHED)
        return [key for key, outcome in self.outcomes.items() if outcome.status in bad]

    @property
    def messages(self) -> dict[str, list[str]]:
        """What was refused, numbers and names left out -> keys of cells, most first."""
        found: dict[str, list[str]] = {}
        for key, outcome in self.outcomes.items():
            if outcome.status in (REFUSED, BARE):
                found.setdefault(f"{outcome.status}: {plain(outcome.detail)}", []).append(key)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def table(self) -> str:
        """What became of all cells."""
        lines = [f"seed {self.seed}, {len(self.outcomes)} cells, {self.seconds:.0f} s"]
        lines += [f"{n:6d}  {status}" for status, n in self.counts.items()]
        lines += [f"{len(keys):6d}  {what} ({keys[0]})" for what, keys in self.messages.items()]
        lines += [f"        again: python -m tests.fuzz --replay {key}" for key in self.faults]
        return "\n".join(lines)

    def result(self) -> dict[str, Any]:
        """The same as JSON, for the page on reliability."""
        agreed = [o for o in self.outcomes.values() if o.status == AGREED]
        return {
            "seed": self.seed,
            "cells": len(self.outcomes),
            "counts": self.counts,
            "refused": {
                what.removeprefix(f"{REFUSED}: "): len(keys)
                for what, keys in self.messages.items()
                if what.startswith(REFUSED)
            },
            "farthest": max((o.distance for o in agreed), default=0.0),
            "removed": sum(o.bite > 1e-3 for o in agreed),
            "ties": sum(o.ties for o in agreed),
            "seconds": round(self.seconds),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        }


def plain(message: str) -> str:
    """A message without what differs from cell to cell."""
    message = re.sub(
        r"[.;] (Methods that work here: |No method works here).*", "", message, flags=re.DOTALL
    )
    return SEVERAL.sub("N", NUMBERS.sub("N", message)).strip()


if __name__ == "__main__":
    sys.exit(main())
