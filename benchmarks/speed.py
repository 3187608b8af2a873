"""Speed by batch size and prompt length: TTFT, prefill, decoding, peak memory, cache bytes.

    python benchmarks/speed.py            # the published set on one CPU core, about 15 minutes
    python benchmarks/speed.py --gpu      # 4B and 7B sizes in bfloat16, batch 1 to 32; needs CUDA
    python benchmarks/speed.py --fresh    # forget what was measured before

Each part is one call of `foveate bench --speed`, whose result is kept in `benchmarks/results/`
after every cell; a run that was cut off goes on there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from foveate.cli.bench_speed import SpeedJob, bench_speed
from foveate.errors import FoveateError

RESULTS = Path(__file__).parent / "results"
SCHEDULE = "pyramiddrop.keep=0.5,0.25,0.125"
FOUR = "pyramiddrop,fastv,divprune,visionzip"
CPU = SpeedJob("", FOUR, keep="0.25", settings=(SCHEDULE,), new_tokens=8, threads=1)
GPU = replace(CPU, batch="1,2,4,8,16,32", new_tokens=32, threads=None, device="cuda")
ON_CPU = {
    "speed_batches": replace(
        CPU,
        model="random:llama-256x8",
        methods="pyramiddrop,fastv,dart,sparsevlm,divprune,cdpruner,visionzip,tome",
        new_tokens=4,
    ),
    "speed_long": replace(CPU, model="random:llama-256x8", tokens="2880", batch="1,2"),
    "speed_wide": replace(CPU, model="random:llama-768x16", methods=f"{FOUR},uniform", batch="1"),
    "speed_wide_long": replace(CPU, model="random:llama-768x16", tokens="2880", batch="1"),
}
ON_GPU = {
    "speed_gpu_qwen3_vl_4b": replace(
        GPU,
        model="random:qwen3-vl-4b",
        methods="dart,pyramiddrop,fastv,divprune",
        settings=(SCHEDULE, "dart.keep=0.5"),
        tokens="1920",
        text=75,  # a prefill of 1,995
    ),
    "speed_gpu_llava_next_7b": replace(
        GPU,
        model="random:llava-next-7b",
        methods="dart,pyramiddrop,fastv,divprune",
        settings=(SCHEDULE, "dart.keep=0.5"),
        tokens="2928",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the set that needs a CUDA device")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results first")
    arguments = parser.parse_args()
    jobs = ON_GPU if arguments.gpu else ON_CPU
    if arguments.fresh:
        for name in jobs:
            (RESULTS / f"{name}.json").unlink(missing_ok=True)
        sys.orig_argv.remove("--fresh")  # the process starts anew, with a warm heap
    try:
        for name, job in jobs.items():
            bench_speed(replace(job, json_path=RESULTS / f"{name}.json"))
    except FoveateError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
