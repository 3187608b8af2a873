"""Write the tables of docs/choose.md, and docs/choose.svg, from the result files.

python benchmarks/choose.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _labelled import Point, scatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, FIGURE = ROOT / "docs" / "choose.md", ROOT / "docs" / "choose.svg"
SUPPORT = ROOT / "foveate" / "families" / "support.json"
NEEDS = ((0.65, "two thirds"), (0.5, "half"), (0.4, "two fifths"))
NOISE = 0.05
"""About twice the standard error of the difference of two accuracies of 480 questions each."""
COLOURS = {
    "vision": ("inside the encoder", "#0072b2"),
    "pre_llm": ("before the language model", "#009e73"),
    "llm": ("between decoder layers", "#d55e00"),
    "baseline": ("baselines", "#777777"),
}
BASELINES = {"random", "uniform", "downsample"}
SHOWN = 0.25  # the keep of the figure


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


# -- accuracy


def models() -> list[tuple[str, set[str]]]:
    """What a reader has, and the methods that work on it."""
    entries = json.loads(SUPPORT.read_text(encoding="utf-8"))

    def working(family: str) -> set[str]:
        return {name for name, of in entries.items() if "yes" in _values(of[family])}

    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"these methods are served: (.*?)\. Without", text, re.DOTALL)
    served = set(re.findall(r"`([\w-]+)`", listed))
    return [
        ("LLaVA-1.5", working("llava")),
        ("Qwen3-VL", working("qwen3_vl")),
        ("LLaVA-1.5 in vLLM", served & working("llava")),
        ("Qwen3-VL in vLLM", served & working("qwen3_vl")),
    ]


def _values(entry: str | dict[str, str]) -> list[str]:
    return [entry] if isinstance(entry, str) else list(entry.values())


def fitting(lines: Sequence[dict[str, Any]], names: set[str], most: float) -> list[dict[str, Any]]:
    """The best budget of each of some methods within a share of FLOPs, the most accurate first."""
    best: dict[str, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda x: (-x["accuracy"], x["flops"])):
        if line["method"] in names and line["keep"] and line["flops"] <= most:
            best.setdefault(line["method"], line)
    return list(best.values())


def accuracy_table() -> list[list[str]]:
    """For what a reader has and needs: a method, its keep, and which others do as well."""
    lines = load("quality")["lines"]
    rows = [["model", "FLOPs left, at most", "use", "`keep`", "accuracy", "FLOPs", "next"]]
    rows.append(["---", "---", "---", "---:", "---:", "---:", "---"])
    for have, names in models():
        for number, (most, words) in enumerate(NEEDS):
            first, *others = fitting(lines, names, most)
            near = [x for x in others if x["accuracy"] > first["accuracy"] - NOISE]
            right, flops = (f"{100 * first[name]:.0f} %" for name in ("accuracy", "flops"))
            low, high = (f"{100 * value:.0f}" for value in first["interval"])
            rows.append([
                "" if number else have, words, link(first["method"]), f"{first['keep']:g}",
                f"{right} ({low} to {high})", flops,
                ", ".join(f"`{x['method']}` {x['keep']:g}" for x in near[:2])
                + (f"; {len(near) - 2} more" if len(near) > 2 else ""),
            ])  # fmt: skip
    return rows


def link(name: str) -> str:
    """A method, and where it is described."""
    return f"[`{name}`](methods.md#{name})"


# -- speed


def speed_table() -> list[list[str]]:
    """What is faster by how much, at two lengths of prompts, of methods that were timed at both."""
    short, long = (load(f"speed_wide{size}")["cells"][0] for size in ("", "_long"))
    rows = [["method", "first token, 576", "first token, 2,880", "each later token, 2,880",
             "KV cache, 2,880"], ["---", *["---:"] * 4]]  # fmt: skip
    for name, row in long["rows"].items():
        if "speed_up" not in row:
            continue
        cache = row["kv_bytes"] / long["rows"]["all tokens"]["kv_bytes"]
        rows.append([
            f"{link(name)} {kept(row['method'])}", _times(short["rows"][name]["speed_up"]["ttft"]),
            _times(row["speed_up"]["ttft"]), _times(row["speed_up"]["decode"]), f"{cache:.0%}",
        ])  # fmt: skip
    return rows


def kept(method: dict[str, Any]) -> str:
    """The budget of a method that was timed."""
    keep = method["keep"]
    return "as published" if isinstance(keep, list) else f"{keep:g}"


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x"


# -- other uses


def other_table() -> list[list[str]]:
    """A row for each other use: what to take, what was measured, and the page."""
    return [["for", "use", "measured", "page"], ["---"] * 4, *_encoders(), *_systems()]


def _encoders() -> Iterator[list[str]]:
    encoder = load("encoders")["results"]["rows"]["tome, r = 13"]["speed-up"]
    yield ["a classification or embedding encoder", f"{link('tome')} `r=13`",
           f"{_times(encoder)} on a ViT-S", "[dense.md](dense.md)"]  # fmt: skip
    depth = load("dense")["results"][0]["rows"]["r = 100"]["model"]
    yield ["a depth, detection or pose model", f"{link('tome')} `r=100`",
           f"{_times(depth)} on Depth Anything V2 Small, outputs changed",
           "[dense.md](dense.md)"]  # fmt: skip
    linear = load("dtop")["results"][0]["rows"]
    all_in = linear[0]["miou"]
    row = max(
        (x for x in linear if x["miou"] > all_in - 0.03), key=lambda x: x["speed-up"]["median"]
    )
    yield ["a segmentation ViT, with heads to train",
           f"{link('dtop')} `threshold={row['threshold']}`",
           f"{_times(row['speed-up'])}, {100 * (all_in - row['miou']):.1f} points of mIoU lost",
           "[segmentation.md](segmentation.md)"]  # fmt: skip
    drawn = load("pixelprune")["results"]
    page, screen = (_times(drawn[name]["speed-up"]) for name in ("a page", "a screen"))
    yield ["pages and screenshots", link("pixelprune"),
           f"{page} and {screen} to encode a drawn page and screen",
           "[benchmarks.md](benchmarks.md#pixelprune-before-the-encoder)"]  # fmt: skip
    reading = load("large_memory")["reading"]
    yield ["images thousands of pixels wide", f"{link('lrs-vqa')} in `foveate.large`",
           f"{reading['side']:,} pixels a side read in {reading['peak_mib']} MiB",
           "[large-images.md](large-images.md)"]  # fmt: skip


def _systems() -> Iterator[list[str]]:
    steps = [_times(row["step speed-up"]) for row in load("training")["results"]]
    yield ["a model to train", f"{link('pyramiddrop')} as published",
           f"{steps[0]} and {steps[1]} per step, at 576 and 2,880 visual tokens",
           "[training.md](training.md)"]  # fmt: skip
    served = [r["speedup"]["median"] for r in load("vllm_serving")["rows"] if r["keep"] == 0.25]
    yield ["a server with many requests", f"{link('fastervlm')} 0.25 in vLLM",
           f"{min(served):.1f}x to {max(served):.1f}x the requests per second",
           "[serving.md](serving.md)"]  # fmt: skip
    both = {(r["tokens"], r["weights"]): r for r in load("combine")["results"]["rows"]}
    row = both["divprune 25 %", "int8 weights and activations"]
    yield ["quantised weights", f"{link('divprune')} 0.25",
           f"{_times(row['speed-up by both'])} together, {_times(row['speed-up by weights'])} from "
           "int8 alone", "[combine.md](combine.md)"]  # fmt: skip
    gains = [share["gain_over_published"][0] for share in load("tune")["shares"]]
    yield ["your own questions", "`foveate tune`",
           f"{min(gains):+.1f} and {max(gains):+.1f} points over the best published recipe",
           "[tune.md](tune.md)"]  # fmt: skip


# -- the figure


def figure() -> str:
    """Accuracy over FLOPs of every method at a quarter of the tokens, as an SVG."""
    lines = load("quality")["lines"]
    entries = json.loads(SUPPORT.read_text(encoding="utf-8"))
    stages = {name: stage for stage, names in _stages(set(entries)).items() for name in names}
    points = [
        Point(line["method"], 100 * line["flops"], 100 * line["accuracy"],
              COLOURS["baseline" if line["method"] in BASELINES else stages[line["method"]]][1])
        for line in lines
        if line["keep"] == SHOWN
    ]  # fmt: skip
    middle = next(line for line in lines if (line["method"], line["keep"]) == ("divprune", SHOWN))
    low, high = (100 * value for value in middle["interval"])
    whole = next(100 * line["accuracy"] for line in lines if line["method"] == "none")
    legend = [(colour, name) for name, colour in COLOURS.values()]
    caption = "FLOPs of a prompt, per cent of those with all tokens; accuracy in per cent"
    return scatter(points, (25, 85), (35, 95), whole, (low, high), legend, caption)


def _stages(known: set[str]) -> dict[str, set[str]]:
    """Stage -> the methods of that section of docs/methods.md."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    titles = {"vision": "Inside the encoder", "pre_llm": "Before the language model",
              "llm": "Between decoder layers"}  # fmt: skip
    found = {}
    for stage, title in titles.items():
        part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        found[stage] = known & set(re.findall(r"^### `([\w-]+)`", part, re.MULTILINE))
    return found


def page(text: str) -> str:
    """The page with its tables brought up to date."""
    tables = {"accuracy": accuracy_table, "speed": speed_table, "other": other_table}
    for name, made in tables.items():
        begin, end = f"<!-- {name}: benchmarks/choose.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        rows = "".join(f"| {' | '.join(row)} |\n" for row in made())
        text = f"{before}{begin}\n{rows}{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    FIGURE.write_text(figure())
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
