"""Targets on a GPU, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WAITS, FASTER, SELECTION_MS, DECODE_US = 2, 1.7, 2.0, 20.0
SWEEPS = "sweeps"
"""Key under which `judged` finds the results of the sweeps, by file name."""


@dataclass(frozen=True)
class Verdict:
    """One target.

    Args:
        what: is measured.
        target: in words.
        measured: in words; empty where nobody has measured it.
        met: whether it is; `None` where nobody knows.
    """

    what: str
    target: str
    measured: str = ""
    met: bool | None = None

    @property
    def cells(self) -> list[str]:
        answer = {True: "yes", False: "**no**", None: ""}[self.met]
        return [self.what, self.target, self.measured, answer]


Found = tuple[str, bool]
Look = Callable[[Mapping[str, Any]], "Found | None"]


def _part(name: str, look: Callable[[Mapping[str, Any]], Found]) -> Look:
    """Look at a part's result, if there is one."""

    def found(results: Mapping[str, Any]) -> Found | None:
        return None if name not in results else look(results[name])

    return found


def _answers(result: Mapping[str, Any]) -> Found:
    ran = [row for row in result["rows"] if "skipped" not in row]
    good = sum(row["ok"] for row in ran)
    kernels = ", ".join(dict.fromkeys(row["kernel"] for row in ran))
    return f"{good} of {len(ran)} ({kernels})", bool(ran) and good == len(ran)


def _waiting(result: Mapping[str, Any]) -> Found:
    added = [row for row in result["rows"] if "added" in row]
    worst = max(added, key=lambda row: row["added"])
    text = f"at most {worst['added']} ({worst['method']} on {worst['model']})"
    return text, worst["added"] <= WAITS


def _decoding(result: Mapping[str, Any]) -> Found:
    extra = {name: row["overhead_us"]["median"] for name, row in result["rows"].items()}
    worst = max(extra, key=lambda name: extra[name])
    return f"at most {extra[worst]:.0f} us ({worst})", extra[worst] <= DECODE_US


def _prefill(result: Mapping[str, Any]) -> Found:
    speed = result["speed_up"]
    text = f"{speed['median']:.2f}x ({speed['q25']:.2f} to {speed['q75']:.2f})"
    return f"{text} at {result['prompt_tokens']:,} tokens", speed["median"] >= FASTER


def _choosing(result: Mapping[str, Any]) -> Found:
    ms = result["selection_ms"]
    text = f"{ms['median']:.2f} ms ({ms['q25']:.2f} to {ms['q75']:.2f})"
    return text, ms["median"] <= SELECTION_MS


def _training(result: Mapping[str, Any]) -> Found:
    speed, peak = result["speed_up"], result["peak_bytes"]
    before, after = (peak[arm] / 2**30 for arm in ("all tokens", "pyramiddrop"))
    text = f"{speed['median']:.2f}x, peak {before:.1f} to {after:.1f} GiB"
    return text, speed["median"] > 1 and after <= before


def _slower(results: Mapping[str, Any]) -> Found | None:
    cells = [cell for sweep in results.get(SWEEPS, {}).values() for cell in sweep["cells"]]
    rows = [
        f"{name} at {cell['visual_tokens']:,} x {cell['batch']} ({', '.join(row['slower'])})"
        for cell in cells
        for name, row in cell.get("rows", {}).items()
        if row.get("slower")
    ]
    measured = sum("rows" in cell for cell in cells)
    if not measured:
        return None
    return "; ".join(rows) or f"none in {measured} cells", not rows


TARGETS: tuple[tuple[str, str, Look], ...] = (
    ("prefill and decoding of each stage, compared with eager attention on the CPU",
     "at most twice the bare model's deviation; same tokens kept in float32 and by fixed choices",
     _part("correctness", _answers)),
    ("host synchronisations that a session adds to a prefill", f"at most {WAITS}",
     _part("synchronisations", _waiting)),
    ("decoding, added per layer and token", f"at most {DECODE_US:.0f} us",
     _part("decoding", _decoding)),
    ("prefill with DART at 50 %, Qwen3-VL-4B size, 1,995 tokens", f"{FASTER}x or more",
     _part("selection", _prefill)),
    ("DART's selection there", f"at most {SELECTION_MS:.0f} ms", _part("selection", _choosing)),
    ("a training step with PyramidDrop, 7B size", "faster, with no more memory",
     _part("training", _training)),
    ("methods slower than all tokens at any batch from 1 to 32", "none", _slower),
)  # fmt: skip


def judged(results: Mapping[str, Any]) -> list[Verdict]:
    """Every target, with what was measured where there is something.

    Args:
        results: of finished parts by name, and the sweeps under `SWEEPS`.
    """
    verdicts = []
    for what, target, look in TARGETS:
        found = look(results)
        verdicts.append(Verdict(what, target, *(found or ())))
    return verdicts
