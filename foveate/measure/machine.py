"""What numbers were measured on, and a heap that keeps still while they are."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""Settings of glibc's allocator with which it keeps freed memory."""
QUIET = {"KINETO_LOG_LEVEL": "99"}
"""Keeps torch's profiler, which counts memory, from writing to stderr."""


def can_warm_heap() -> bool:
    """Whether the allocator takes `HEAP`: glibc's does."""
    return platform.libc_ver()[0] == "glibc"


def heap_is_warm() -> bool:
    """Whether this process keeps freed memory."""
    return can_warm_heap() and all(os.environ.get(name) == value for name, value in HEAP.items())


def warm_heap(threads: int | None = None) -> None:
    """Start this program anew, with an allocator that keeps freed memory; at most once.

    On a CPU, torch hands freed memory back to the system, and the page faults that follow change
    ratios of times by several points. Where the allocator is not glibc's, nothing happens.

    Args:
        threads: math threads that the new process begins with; `None` leaves that alone.
    """
    wanted = {**QUIET, **HEAP} if can_warm_heap() else dict(QUIET)
    if threads is not None:
        wanted |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **wanted})


def describe_machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """Hardware and versions, by name."""
    import transformers

    device = torch.device(device)
    threads = torch.get_num_threads()
    used = f"{threads} thread{'s' if threads > 1 else ''} used"
    facts = {"cpu": f"{_cpu()}, {os.cpu_count()} cores, {used}", "device": str(device)}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    facts |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": version("foveate"),
    }
    if commit := _commit():
        facts["commit"] = commit
    return facts


def _cpu() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of the commit that this package lies in; empty outside a repository."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return ""
    return found.stdout.strip()
