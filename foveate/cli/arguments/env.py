"""`foveate env`: what a bug report needs."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = (
    "foveate", "torch", "transformers", "huggingface_hub", "accelerate", "peft", "numpy", "pillow",
    "safetensors", "typer", "rich", "av", "fastapi", "optuna", "pyarrow", "pyvips", "ray", "vllm",
)  # fmt: skip


def env() -> None:
    """Print versions, the device and the system, for a bug report."""
    rows = {"system": platform.platform(), "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            rows[name] = version(name)
        except PackageNotFoundError:
            rows[name] = "not installed" if name in ("foveate", "torch") else ""
    if find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            rows["device"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        else:
            rows["device"] = f"CPU, {torch.get_num_threads()} threads"
    for name, value in rows.items():
        if value:
            print(f"{name + ':':17}{value}")
