"""Everything that needs one CUDA card: checks, speed, memory, and the targets beside them.

    make gpu                                   # at most 25 minutes
    python benchmarks/gpu.py --device cpu      # the same code at tiny sizes, about 3 minutes
    python benchmarks/gpu.py --fresh           # forget what was measured before

Each part runs in a process of its own under a time limit. Its result is kept when it ends, and the
sweeps' after every cell; a run that was cut off goes on there. `benchmarks/table.py` puts it on
docs/benchmarks.md. A run on a CPU writes to build/gpu/, never to `benchmarks/results/`. The exit
status is 1 if a part failed or, on CUDA, a target was missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
RESULTS = ROOT / "benchmarks" / "results"
FILE = "gpu.json"
LIMITS = {
    "correctness": 3.0,
    "synchronisations": 1.5,
    "decoding": 1.5,
    "selection": 2.0,
    "training": 3.0,
    "speed_gpu_qwen3_vl_4b": 6.0,
    "speed_gpu_llava_next_7b": 8.0,
}
"""Minutes that each part may take, loading included. They sum to 25."""
LOADING = 1.0
"""Minutes of a sweep's limit that are left for making its model and for its longest round."""


def work(part: str, device_name: str, folder: Path) -> dict[str, Any]:
    """The result of one part, in this process."""
    import _gpu_checks as checks
    import _gpu_speed as speed

    from foveate.loading import check_device

    device = check_device(device_name)
    parts: dict[str, Callable[[Any], dict[str, Any]]] = {
        "correctness": checks.correctness,
        "synchronisations": checks.synchronisations,
        "decoding": speed.decoding,
        "selection": speed.selection,
        "training": speed.training,
    }
    if part in parts:
        return parts[part](device)
    return speed.sweep(part, device, folder, LIMITS[part] - LOADING)


def run_part(part: str, device: str, folder: Path) -> None:
    """Run one part here and keep its result, or the reason why there is none."""
    import torch

    from foveate.errors import FoveateError

    start = time.monotonic()
    try:
        found = {"result": work(part, device, folder)}
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    except FoveateError as error:
        found = {"error": str(error)}
    keep(folder, part, {"seconds": round(time.monotonic() - start, 1), **found})


def read(folder: Path) -> dict[str, Any]:
    """What was kept so far."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}


def keep(folder: Path, part: str, found: Mapping[str, Any]) -> None:
    """Put one part into the result file."""
    from foveate.io.writing import write_json

    now = read(folder)
    now["parts"][part] = dict(found)
    write_json(folder / FILE, now, indent=1)


def begin(device: str, folder: Path, fresh: bool) -> None:
    """Make the result file, or check that it was measured on this machine.

    Raises:
        FoveateError: there is no such device, or the file is of another machine.
    """
    from foveate.errors import InputError
    from foveate.io.writing import write_json
    from foveate.loading import check_device
    from foveate.measure.machine import describe_machine

    here = describe_machine(check_device(device))
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        for path in (FILE, *(f"{part}.json" for part in LIMITS)):
            (folder / path).unlink(missing_ok=True)
    old = read(folder).get("machine")
    if old is not None and old != here:
        differs = sorted(k for k in {*old, *here} if old.get(k) != here.get(k))
        raise InputError(
            f"{FILE} was measured elsewhere or with other versions ({', '.join(differs)}); "
            "--fresh starts anew"
        )
    if old is None:
        write_json(folder / FILE, {"machine": here, "parts": {}}, indent=1)


def supervise(part: str, device: str, folder: Path) -> None:
    """Run one part in a process of its own, and end it when its time is up."""
    command = [sys.executable, __file__, "--part", part, "--device", device, "--out", str(folder)]
    minutes = LIMITS[part]
    try:
        ended = subprocess.run(command, timeout=60 * minutes, check=False).returncode
    except subprocess.TimeoutExpired:
        keep(folder, part, {"error": f"ran past {minutes:g} minutes; the next run goes on"})
        return
    if ended != 0:
        keep(folder, part, {"error": f"ended with status {ended}; the lines above say why"})


def results_of(folder: Path) -> dict[str, Any]:
    """Results of finished parts by name, and the cells of the sweeps, as `judged` takes them."""
    parts = read(folder)["parts"]
    found = {name: part["result"] for name, part in parts.items() if "result" in part}
    files = {name: folder / f"{name}.json" for name in LIMITS if name.startswith("speed_")}
    sweeps = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
    return {**found, "sweeps": sweeps}


def show(folder: Path, device: str) -> bool:
    """Print errors and targets; whether all is well."""
    from _gpu_targets import judged

    errors = {n: p["error"] for n, p in read(folder)["parts"].items() if "error" in p}
    for name, error in errors.items():
        print(f"error: {name}: {error}")
    cpu = device == "cpu"
    print("Targets" + (" (of a GPU; tiny sizes on a CPU say nothing of them)" if cpu else ""))
    verdicts = judged(results_of(folder))
    for one in verdicts:
        mark = {True: "met   ", False: "MISSED", None: "-     "}[one.met]
        print(f"  {mark} {one.what}: {one.measured or 'not measured'}; target {one.target}")
    print(f"kept in {folder / FILE}")
    return not errors and (cpu or all(one.met for one in verdicts))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu at tiny sizes")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results first")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)  # within `supervise`
    given = parser.parse_args()
    if given.out is None:
        given.out = ROOT / "build" / "gpu" if given.device == "cpu" else RESULTS
    given.only = list(LIMITS) if given.only is None else given.only.split(",")
    if unknown := set(given.only) - set(LIMITS):
        parser.error(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(LIMITS)}")
    return given


def main() -> None:
    given = arguments()
    if given.part is not None:
        run_part(given.part, given.device, given.out)
        return
    from foveate.errors import FoveateError

    try:
        begin(given.device, given.out, given.fresh)
        for part in given.only:
            if "result" not in read(given.out)["parts"].get(part, {}):
                print(f"{part}, at most {LIMITS[part]:g} minutes", flush=True)
                supervise(part, given.device, given.out)
    except FoveateError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
        sys.exit(130)
    sys.exit(0 if show(given.out, given.device) else 1)


if __name__ == "__main__":
    main()
