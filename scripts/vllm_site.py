"""Becomes `sitecustomize` of the environments that scripts/vllm.sh and `make timm` build.

torchvision's wheel for CUDA imports beside a torch for CPUs once its two operators have names.
"""

from __future__ import annotations

import sys
from typing import Any


class NameOperators:
    """Before torchvision is imported, define what its missing library would."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called for each import; finds nothing itself."""
        if name != "torchvision":
            return
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        from torch import library

        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            library.define(f"torchvision::{operator}", schema)


sys.meta_path.insert(0, NameOperators())  # type: ignore[arg-type]
