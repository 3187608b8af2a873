"""The section of docs/compare.md on what was measured, from benchmarks/results/kvpress.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "kvpress.json"
ABOUT = """## A common measurement

`benchmarks/beside_kvpress.py` sends the same prompts through foveate and kvpress in one run.
kvpress {kvpress} needs transformers below 5.3 and foveate needs 5.16.1 or later, so each runs in a
process of its own: foveate with transformers {ours}, kvpress with {theirs}. Weights and embeddings
are the same. foveate has the LLaVA, kvpress the Llama inside it, which is one of the models that it
supports. With nothing removed, their logits differ by at most {apart:.1g}.

What is compared is not the same thing. foveate's methods choose among visual tokens, for all heads
at once; layers after the cut do not compute the others, and all text stays. A press of kvpress lets
every layer compute the whole prompt, then drops keys and values of each head apart, those of text
too. Both were told to keep as many entries: all text and a quarter of the visual tokens. FastV cuts
after two layers, which keep all entries, so its cache is larger. SnapKV looks from the text after
the image; other settings are the defaults of each project. kvpress was made for long texts, and its
pipeline compresses a text before it reads the question; here, but for [answers](#answers), the
question is part of the prompt on both sides.
"""
SHORT = """In short: foveate's cuts shorten the prefill, and presses do not. For as many entries,
caches are equal, and kvpress gains a little more in decoding. Heads of kvpress keep foveate's
tokens little more often than chance would. With padding, kvpress runs without a warning, keeps
entries of padding, and gives rows other logits than they get alone.
"""
SPEED = """### Time and memory

Random weights, a Llama of {model}. Speed-ups are over all tokens on the same side, round by round,
with quartiles; rows of *all tokens* show times. Peak memory is that of tensors during the prefill,
weights left out. Other jobs ran on the machine.
"""
CHOICE = """### The same tokens?

On {prompts} questions to the tiny model, with 256 visual tokens each. *Text kept* is the mean over
layers and heads. *In some head* is the share of visual tokens that at least one head of one layer
keeps. The last columns are the share of foveate's visual tokens that a head keeps too; in brackets,
what a choice without regard to them would give.
"""
ANSWERS = """### Answers

The same questions, answered greedily. The first word of an answer comes from the prefill, which no
press shortens. So kvpress reads the question from the compressed cache of what stands before it, as
its pipeline does, without knowing it when it chooses; SnapKV looks from the last 16 tokens of the
image. foveate's `fastv` knows the question, `divprune` does not use it. The tiny model's first
layers hardly look at the image, which penalises `fastv`; [accuracy](results.md) says more. One
standard error is at most {error:.0f} points.
"""
BATCH = """### A batch of two

The logits of the second token that `generate` makes, in a batch and alone: the largest difference,
and how often the likeliest token is the same. Prompts of different length are padded on the left,
by {padding:.1f} tokens on average; {pairs} pairs, and {equal} of equal length. A press has one
budget for a batch, here that of the longer row. The answers have one word, so the second token is
an easy one.
"""
OTHERS = """### Other projects

Tried on a CPU, from the package index:

- AngelSlim: the wheel of version 0.5.0 does not contain its token pruning
  (`angelslim/compressor/token_compressor` is missing), and it requires torchvision.
- LightCompress: not on the index. `llmc` there is another project.
- OpenVINO GenAI: 2026.4.1 installs, but reads only models that were converted. The converter,
  optimum-intel 2.2.0, needs transformers below 5.6 and torchvision. We converted none.

The code that authors released was not run here either; recorded outputs of some of it are among the
tests of fidelity.
"""


def section() -> str:
    """The whole section."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    machine, other = result["machine"], result["other"]
    asked = result["prompts"]
    parts = [
        ABOUT.format(
            kvpress=other["kvpress"], ours=machine["transformers"], theirs=other["transformers"],
            apart=result["logits_apart"],
        ),
        SHORT,
        SPEED.format(model=result["model"].replace("x", " x ")),
        speed(result["speed"]),
        f"{', '.join(_rounds(result['speed']))}. {machine['cpu']}; {machine['dtype']}, "
        f"{machine['attention']}, torch {machine['torch']} and {other['torch']}; "
        f"{machine['time']}.",
        CHOICE.format(prompts=asked),
        choice(result["choices"]["rows"]),
        "FastV's choice can be made with kvpress' own score, SnapKV with a window and a kernel of "
        "one, averaged over heads: the tokens are the same in "
        f"{result['choices']['fastv_same']} of {asked} prompts.",
        ANSWERS.format(error=100 * (0.25 / asked) ** 0.5),
        answers(result["answers"], asked),
        BATCH.format(
            padding=result["padded"]["padding"], pairs=result["padded"]["pairs"],
            equal=result["equal"]["pairs"],
        ),
        batch(result["equal"]["rows"], result["padded"]["rows"]),
        OTHERS,
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts)


def table(head: Sequence[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(sizes: list[dict[str, Any]]) -> str:
    """A table for each size."""
    return "\n\n".join(
        f"{one['visual']:,} visual tokens, {one['batch']} in a batch, {one['entries']:,} of "
        f"{one['of']:,} entries kept:\n\n"
        + table(
            ["", "prefill", "decoding", "peak", "KV cache"],
            [[name, *_speed(name, row)] for name, row in one["rows"].items()],
        )
        for one in sizes
    )


def _speed(name: str, row: dict[str, Any]) -> list[str]:
    mib = [f"{row[key] / 2**20:,.0f} MiB" for key in ("peak_bytes", "kv_bytes")]
    if name.endswith("all tokens"):
        return [f"{row['prefill_ms']['median']:,.0f} ms", f"{row['decode_ms']['median']:.0f} ms",
                *mib]  # fmt: skip
    times = [row["prefill_speed_up"], row["decode_speed_up"]]
    return [*(f"{t['median']:.2f}x ({t['q25']:.2f} to {t['q75']:.2f})" for t in times), *mib]


def _rounds(sizes: list[dict[str, Any]]) -> list[str]:
    return sorted({f"{one['rounds']} rounds in turns" for one in sizes})


def choice(rows: dict[str, Any]) -> str:
    """How far heads of kvpress keep what foveate keeps."""
    methods = [name for name in next(iter(rows.values())) if name not in ("text", "somewhere")]
    return table(
        ["kvpress", "text kept", "in some head", *(f"`{name}`" for name in methods)],
        [
            [name, _share(row["text"]), _share(row["somewhere"])]
            + [f"{_share(row[m]['both'])} ({_share(row[m]['chance'])})" for m in methods]
            for name, row in rows.items()
        ],
    )


def answers(rows: dict[str, Any], asked: int) -> str:
    """Right answers, and what a cache holds."""
    return table(
        ["", "right", "KV cache of the first prompt"],
        [
            [name, _share(row["right"] / asked), f"{row['kv_bytes'] / 2**10:,.0f} KiB"]
            for name, row in rows.items()
        ],
    )


def batch(equal: dict[str, Any], padded: dict[str, Any]) -> str:
    """Rows of a batch beside the same prompts alone."""

    def cells(row: dict[str, float]) -> list[str]:
        return [f"{row['difference']:.2g}", _share(row["same_token"])]

    return table(
        ["", "equal lengths", "same token", "padded", "same token", "padding kept"],
        [[name, *cells(equal[name]), *cells(row), _padding(row)] for name, row in padded.items()],
    )


def _padding(row: dict[str, float]) -> str:
    return _share(row["padding_kept"]) if "padding_kept" in row else ""


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
