"""Tune the embedded model at two shares of FLOPs, and ask held-out questions.

    python benchmarks/tune.py [--each 100] [--trials 48] [--work DIR]

Questions are drawn by FoveaBench, seven of its tasks. The recipe is chosen on the questions of the
search alone, and so is the published method it is compared with: each at the largest `keep` that
the share of FLOPs allows. DIR keeps what was asked, so that a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from _bench import save, warm_heap
from _tune_data import TASKS, draw

warm_heap()

from foveate import tiny  # noqa: E402
from foveate.tune.asking import Asker  # noqa: E402
from foveate.tune.job import REPORT, Options, Tuning  # noqa: E402
from foveate.tune.space import describe  # noqa: E402
from foveate.tune.study import Plan  # noqa: E402

SHARES = (0.25, 0.125)
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=100, help="questions of a task")
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--work", type=Path, default=Path("tune-work"))
    arguments = parser.parse_args()
    data = draw(arguments.work / "data", arguments.each, SEED)
    model, processor = tiny.load()
    rows, asker = [], None
    for share in SHARES:
        options = Options(
            targets=(f"flops<={share}x",), held_out=0.6, max_new_tokens=4,
            plan=Plan(arguments.trials, seed=SEED),
        )  # fmt: skip
        job = Tuning("tiny", data, arguments.work / f"{share:g}", options)
        asker = asker or Asker(model, processor, job.rows, batch=16, max_new_tokens=4)
        began = time.process_time()
        verdict = job.run(model, processor, lambda found: print(len(found.candidates)), asker=asker)
        report = json.loads((job.out / REPORT).read_text())
        named = {"chosen": verdict.chosen, "published": verdict.published}
        print(share, verdict.gain, {k: c and describe(c.recipe) for k, c in named.items()})
        rows.append(row(share, report, time.process_time() - began))
        rules = {"tasks": TASKS, "each": arguments.each, "trials": arguments.trials, "seed": SEED}
        note = "the machine was shared with other work; CPU seconds of this process, one thread"
        save("tune", {"model": "tiny", **rules, "note": note, "shares": rows})


def row(share: float, report: dict, seconds: float) -> dict:
    """What a page needs of a report."""
    by_trial = {c["trial"]: c for c in report["candidates"]}
    wanted = [report["chosen"], report["best_published"], *report["front"]]
    full = [c for c in report["candidates"] if c["published"] or c["trial"] in wanted]
    return {
        "flops": share,
        "cpu_seconds": round(seconds, 1),
        "questions": report["questions"],
        "unpruned": report["unpruned"],
        "chosen": by_trial.get(report["chosen"]),
        "best_published": by_trial.get(report["best_published"]),
        "gain_over_published": report["gain_over_published"],
        "candidates": len(report["candidates"]),
        "refused": sum(count for count, _ in report["refused"]),
        "others": [c for c in full if c["trial"] not in wanted[:2]],
    }


if __name__ == "__main__":
    main()
