"""How long choosing takes, beside a plain transcription of each method's equations.

A transcription works on one image at a time, as published code does; a method on all at once.
Signals and features are random, at the widths of a 7B model. Both run in turns in one process; what
they choose is compared. Where a transcription takes seconds, it is run on some of the images;
where it takes little, both are repeated within a turn.
`python benchmarks/selection.py [METHOD...]`
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _bench

if __name__ == "__main__":
    _bench.warm_heap()

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import foveate
from foveate.core import Adaptive, Method, VisualTokens
from foveate.measure import flops

SIZES = ((576, 1), (576, 16), (2880, 1), (2880, 16))
SEVEN_B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
TEXT = 64
LIMIT = 2.0  # seconds that transcriptions may take in a round
SHORT = 0.01  # seconds that they should take at least, so that short calls are repeated
TIES = (
    "Scores lie closer together than 1e-6 there, which foveate takes for a tie. With ties no "
    "wider than rounding in double precision, results are the same"
)
DIFFERS = {
    **dict.fromkeys(("holov", "prunesid", "vidcom2"), f"{TIES}."),
    "vispruner": f"{TIES}, which was checked at 576 x 16.",
}
"""Why a method makes another choice than its transcription, where that was found out."""
Case = tuple[Callable[..., Tensor], Callable[..., dict[str, Tensor]], Callable[..., Method]]


def cases() -> dict[str, Case]:
    """Name -> transcription, inputs and method of every file of transcriptions."""
    found: dict[str, Case] = {}
    for path in sorted((Path(__file__).parent / "transcriptions").glob("[a-z]*.py")):
        found |= importlib.import_module(f"transcriptions.{path.stem}").CASES
    return found


def shown(method: Method, tensors: dict[str, Tensor], keep: int) -> VisualTokens:
    """What the method is shown of the inputs."""
    x = tensors.get("x")
    frames = x.shape[1] if x is not None and x.dim() == 4 else 1
    signals = {
        n: t.flatten(1)[:, None] if frames > 1 else t for n, t in tensors.items() if n != "x"
    }
    total = _total(tensors)
    cells = total // frames
    side = math.isqrt(cells)
    batch = next(iter(tensors.values())).shape[0]
    flat = None if x is None else x.reshape(batch, total, -1)
    return VisualTokens(
        features=lambda: flat,  # type: ignore[arg-type,return-value]
        index=torch.arange(total).expand(batch, -1),
        grid=(side, side) if side * side == cells else (1, cells),
        rows=tuple(range(batch)),
        signals=signals,
        site="pre_llm" if method.stage == "pre_llm" else "llm:3",
        frames=frames,
        quota=keep,
    )


def _total(tensors: dict[str, Tensor]) -> int:
    """Visual tokens of an image: `x` has them on one axis or, by frames, on two."""
    if "x" in tensors:
        return tensors["x"].shape[1:-1].numel()
    name, signal = next((n, t) for n, t in tensors.items() if not n.startswith("question"))
    return signal.shape[-2 if name.endswith(("keys", "states", "features")) else -1]


def reduce(method: Method, tokens: VisualTokens, keep: int) -> list[tuple[int, Any]]:
    """(image, its reduction) of all images."""
    if isinstance(method, Adaptive):
        parts = method.reduce_each(tokens)
    else:
        parts = [(range(len(tokens.index)), method.reduce(tokens, keep))]
    return [(image, (made, i)) for members, made in parts for i, image in enumerate(members)]


def agree(method: Method, tensors: dict[str, Tensor], keep: int, plain: list[Tensor]) -> bool:
    """Whether method and transcription choose, or make, the same tokens of every image."""
    tokens = shown(method, tensors, keep)
    for image, (made, i) in reduce(method, tokens, keep):
        if image >= len(plain):
            continue
        want = plain[image]
        if want.dtype == torch.long:
            same = want.tolist() == made.index[i].sort().values.tolist()
        else:
            members = made.matrix(tokens.count)[i] @ tokens.x[image]
            want = want.to(members)
            same = members.shape == want.shape and torch.allclose(
                members.sort(0).values, want.sort(0).values, rtol=1e-3, atol=1e-3
            )
        if not same:
            return False
    return True


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def alone(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each image's tensors."""
    count = next(iter(tensors.values())).shape[0]
    return [{name: tensor[i] for name, tensor in tensors.items()} for i in range(count)]


def measure(case: Case, visual: int, batch: int) -> dict[str, Any]:
    """Times, their ratio, whether results agree, and the FLOPs of a choice."""
    transcription, inputs, make = case
    tensors = inputs(visual, batch, torch.Generator().manual_seed(0))
    keep = _total(tensors) // 4
    method, images = make(keep), alone(tensors)
    tokens = shown(method, tensors, keep)

    def ours() -> object:
        return reduce(method, tokens, keep)

    start = time.process_time()
    first = transcription(images[0], keep)
    spent = time.process_time() - start
    few = images[: max(1, min(batch, int(LIMIT / spent)))]
    plain = [first, *(transcription(image, keep) for image in few[1:])]
    rounds = 9 if spent * len(few) < 1 else 3 if spent * len(few) < LIMIT / 2 else 1
    # Rounding decides between near ties, so what differs is compared in double precision.
    same = agree(method, tensors, keep, plain) or agree(
        method,
        (exact := {n: _double(t[: len(few)]) for n, t in tensors.items()}),
        keep,
        [transcription(image, keep) for image in alone(exact)],
    )
    with FlopCounterMode(display=False) as counter:
        ours()
    again = max(1, int(SHORT / (spent * len(few))))
    times = _bench.turns(
        {
            "ours": lambda: [ours() for _ in range(again)],
            "plain": lambda: [transcription(image, keep) for _ in range(again) for image in few],
        },
        rounds,
        warmup=int(rounds > 1),
    )
    # A transcription takes as long for each image, so some stand for all.
    times["plain"] = [seconds / again * batch / len(few) for seconds in times["plain"]]
    times["ours"] = [seconds / again for seconds in times["ours"]]
    total = batch * flops.prefill_flops(SEVEN_B, [[visual + TEXT]] * 32)
    return {
        "visual": visual,
        "batch": batch,
        "rounds": rounds,
        "images_transcribed": len(few),
        "ours_ms": 1e3 * statistics.median(times["ours"]),
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "faster": _bench.ratios(times["plain"], times["ours"]),
        "agree": same,
        "share_of_7b_prefill": counter.get_total_flops() / total,
    }


def remarks(result: dict[str, Any]) -> list[str]:
    """Which methods outside the encoder have no row, why some results differ, and which run each
    row is of; one remark each.
    """
    measured = result["methods"]
    known = cases()
    short = {name.split(",")[0].split()[0] for name in known}
    names = [n for n in foveate.list_methods() if foveate.get_method(n).stage != "vision"]
    said = [
        "Methods in the encoder are in the next table. No transcription exists of "
        f"{_listed(name for name in names if name not in short)}."
    ]
    if missing := [name for name in known if name not in measured]:
        said.append(f"Not measured yet: {_listed(missing)}.")
    why: dict[str, list[str]] = {}
    for name, rows in measured.items():
        if not all(row["agree"] for row in rows):
            why.setdefault(DIFFERS.get(name, "It is not known why."), []).append(name)
    said += [f"Results differ: {_listed(names)}. {reason}" for reason, names in why.items()]
    return said + [
        f"Measured at commit {commit}: {_listed(methods)}." for commit, methods in runs(result)
    ]


def runs(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Commit and methods of each run whose rows the table has; nothing if all are of one."""
    before = [(run["machine"]["commit"], run["methods"]) for run in result.get("earlier", [])]
    told = {name for _, methods in before for name in methods}
    last = [name for name in result["methods"] if name not in told]
    return [*before, (result["machine"]["commit"], last)] if before else []


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def keep_result(known: dict[str, Case], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Write the rows of this run, and those of methods that only earlier runs measured.

    Args:
        known: all methods, in order.
        old: what the file held before this run, or nothing.
        new: name -> rows of this run.
    """
    both = old.get("methods", {}) | new
    methods = {each: both[each] for each in known if each in both}
    result = {"keep": 0.25, "text": TEXT, "methods": methods}
    if runs := earlier(old, set(new)):
        result["earlier"] = runs
    _bench.save("selection", result)


def earlier(old: dict[str, Any], new: set[str]) -> list[dict[str, Any]]:
    """Machine and methods of each earlier run, without what was measured anew."""
    runs = list(old.get("earlier", []))
    if old:
        told = {name for run in runs for name in run["methods"]}
        mine = [name for name in old["methods"] if name not in told]
        runs.append({"machine": old["machine"], "methods": mine})
    left = [{**run, "methods": [n for n in run["methods"] if n not in new]} for run in runs]
    return [run for run in left if run["methods"]]


def main() -> None:
    """Measure all methods, or those named; each is saved when it is done."""
    torch.set_grad_enabled(False)
    known, new = cases(), {}
    path = _bench.RESULTS / "selection.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    for name in sys.argv[1:] or list(known):
        rows = []
        for size in SIZES:
            rows.append(row := measure(known[name], *size))
            print(
                f"{name:28} {row['visual']:5} x {row['batch']:2}: {row['ours_ms']:9.2f} ms, "
                f"{row['faster']['median']:7.2f}x, {'same' if row['agree'] else 'DIFFERENT'}, "
                f"{100 * row['share_of_7b_prefill']:.3f} % of the prefill's FLOPs",
                flush=True,
            )
        new[name] = rows
        keep_result(known, old, new)


if __name__ == "__main__":
    main()
