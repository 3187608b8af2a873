"""Write docs/benchmarks.md from the result files.

    python benchmarks/table.py

`tests/test_benchmarks.py` fails when the page is older than the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _gpu_targets import judged
from gpu import LIMITS, results_of
from gpu import read as read_gpu
from selection import remarks
from speed import ON_CPU, ON_GPU

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRO = """# Benchmarks

Every table comes from a script in `benchmarks/` and its result file in `benchmarks/results/`, which
records the machine and the versions. The machine was shared and noisy. Rely on the ratios, which
compare contenders that took turns in one run, and treat them as accurate to a few per cent.
Predictions are FLOP ratios (multiply-add = 2, causal attention counted exactly, the methods' scores
included).
"""


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: list[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def about(result: dict[str, Any]) -> str:
    """What the numbers were measured on."""
    m = result["machine"]
    return (
        f"{m['cpu']}; {m['dtype']}, {m['attention']}, torch {m['torch']}, "
        f"transformers {m['transformers']}; {m['time']}."
    )


def prefill() -> str:
    """Speed-ups of the prefill."""
    result = load("prefill")
    parts = ["## Prefill", f"{result['model']}. {about(result)}"]
    for size in result["results"]:
        rows = [
            [
                name,
                f"{row['speed-up']['median']:.2f}x",
                f"{row['speed-up']['q25']:.2f} to {row['speed-up']['q75']:.2f}",
                f"{row['predicted']:.2f}x",
                f"{row['measured / predicted']:.2f}",
            ]
            for name, row in size["rows"].items()
        ]
        native = size["rows"]["pre_llm to 64"]["time / native 64"]
        parts += [
            f"### {size['visual tokens']:,} visual tokens, {size['rounds']} rounds",
            table(["", "speed-up", "quartiles", "predicted", "measured / predicted"], rows),
            f"Reducing to 64 tokens before the LLM takes {native['median']:.3f} "
            f"({native['q25']:.3f} to {native['q75']:.3f}) of the time of a prompt that has only "
            "64 to begin with.",
        ]
    return "\n\n".join(parts)


def decode() -> str:
    """Overhead of decoding."""
    result = load("decode")
    rows = [
        [name, f"{r['overhead_us']:.0f}", f"{r['q25']:.0f} to {r['q75']:.0f}"]
        for name, r in result["rows"].items()
    ]
    return "\n\n".join([
        "## Decoding",
        f"Microseconds that a session adds per layer and generated token, on a {result['model']}, "
        f"batch 1. {about(result)}",
        table(["", "median", "quartiles"], rows),
    ])  # fmt: skip


def scoring() -> str:
    """Share of selection in the pruned prefill."""
    result = load("scoring")
    sizes = result["results"]
    rows = [
        [name, *(f"{size['rows'][name]['share']['median']:.2%}" for size in sizes)]
        for name in sizes[0]["rows"]
    ]
    return "\n\n".join([
        "## Cost of selection",
        f"Selection time as a share of the remaining prefill, at 7B widths ({result['model']}). "
        f"{about(result)}",
        table(["", *(f"{size['visual tokens']:,} visual tokens" for size in sizes)], rows),
    ])  # fmt: skip


def pixelprune() -> str:
    """PixelPrune before an encoder."""
    result = load("pixelprune")
    rows = [
        [
            name,
            f"{row['rows'][-1][1] / (4 * row['tokens']):.0%}",
            f"{row['speed-up']['median']:.2f}x",
            f"{row['speed-up']['q25']:.2f} to {row['speed-up']['q75']:.2f}",
            f"{row['flops']['vision'] / row['flops']['vision_after']:.2f}x",
            ", ".join(f"{share:.0%}" for share in row["kept"].values()),
        ]
        for name, row in result["results"].items()
    ]
    sides = ", ".join(next(iter(result["results"].values()))["kept"])
    head = ["image", "rows left", "speed-up", "quartiles", "predicted", f"left at {sides} px"]
    return "\n\n".join([
        "## PixelPrune before the encoder",
        f"Time to encode an image of {result['side']} x {result['side']} px, merger and selection "
        "included, on a random vision tower with two layers of Qwen2.5-VL-7B's width. The script "
        f"draws the images. The threshold is 0. {result['rounds']} rounds. {about(result)}",
        table(head, rows),
        same_answers(),
    ])  # fmt: skip


def same_answers() -> str:
    """Whether PixelPrune changes answers."""
    result = load("pixelprune_answers")
    rows = []
    for ground, row in result["results"].items():
        for name in ("all", "pixelprune", "uniform", "divprune"):
            shares = (row[name]["accuracy"], row[name]["same"])
            said = [f"{100 * m:.1f} ({100 * a:.1f} to {100 * b:.1f})" for m, a, b in shares]
            kept = 1.0 if name == "all" else row["left"]
            rows.append([
                ground if name == "all" else "", "all tokens" if name == "all" else f"`{name}`",
                f"{kept:.0%}", said[0], "" if name == "all" else said[1],
            ])  # fmt: skip
    head = ["background", "method", "tokens left", "accuracy, %", "same answer, %"]
    asked = next(iter(result["results"].values()))["questions"]  # of each, about the same scenes
    return "\n\n".join([
        "### Whether answers change",
        f"The tiny model is asked {asked} questions about scenes on each "
        "background of one colour, where cells repeat exactly. `uniform` and `divprune` keep as "
        "many tokens of each image. The intervals are 95 % (Wilson). Dropping exact repetitions is "
        "not without effect: other tokens attend to those that are left, and this model was "
        "trained with all of them.",
        table(head, rows),
    ])  # fmt: skip


def encoders() -> str:
    """Methods in a plain encoder."""
    result = load("encoders")
    size = result["results"]
    rows = []
    for name, row in size["rows"].items():
        speed, predicted = row["speed-up"], row.get("predicted")
        rows.append([
            name, f"{speed['median']:.2f}x", f"{speed['q25']:.2f} to {speed['q75']:.2f}",
            f"{predicted:.2f}x" if predicted else "",
            f"{row['measured / predicted']:.2f}" if "measured / predicted" in row else "",
            f"{row['over the transcription']['median']:.2f}x"
            if "over the transcription" in row else "",
        ])  # fmt: skip
    return "\n\n".join([
        "## Methods in an encoder",
        f"{result['model']}, batch {size['batch']}, {size['rounds']} rounds. The last column "
        "is the speed-up over a plain transcription of the paper's equations, which gives the same "
        "logits. "
        f"{about(result)}",
        table(["", "speed-up", "quartiles", "predicted", "measured / predicted",
               "over a transcription"], rows),
    ])  # fmt: skip


def attending() -> str:
    """Methods that compute the attention of an encoder layer in another way."""
    result = load("attending")
    rows = []
    for name, row in result["rows"].items():
        for contender, speed in row["speed-up"].items():
            ours = contender == "foveate"
            rows.append([
                f"{name}, {row['tokens']:,} tokens" if ours else contender,
                f"{speed['median']:.2f}x", f"{speed['q25']:.2f} to {speed['q75']:.2f}",
                f"{row['predicted']:.2f}x" if ours else "",
                f"{row['predicted with projections']:.2f}x" if ours else "",
            ])  # fmt: skip
    return "\n\n".join([
        "## Attention in encoder layers",
        f"Speed-ups over the plain kernel, for one layer of width {result['width']:,} with "
        f"{result['heads']} heads, batch 1. Projections are left out; the last column is the "
        "prediction with them. Below each method is a transcription of the paper's equations that "
        "processes one image at a time and gives the same result. "
        f"{about(result)}",
        table(["", "speed-up", "quartiles", "predicted", "with projections"], rows),
    ])  # fmt: skip


def _label(name: str, result: dict[str, Any], row: dict[str, Any]) -> str:
    """A family's name, and what its row was measured with where that is not the table's."""
    effort = {what: row.get(what, result[what]) for what in ("runs", "rounds")}
    same = all(effort[what] == result[what] for what in effort)
    notes = [] if same else [f"{effort['runs']} x {effort['rounds']}"]
    notes += [value for what, value in row.get("machine", {}).items() if what != "commit"]
    return f"`{name}`" + (f" ({', '.join(notes)})" if notes else "")


def _beside(row: dict[str, Any]) -> str:
    """What a session added to a layer of LLaVA in the run that measured a row."""
    other = row.get("beside", {}).get("llava")
    return "" if other is None else f"{100 * other['overhead_us'] / other['plain_us']:.1f} %"


def families() -> str:
    """Cost of a session in every family."""
    result = load("families")
    rows = []
    for name, row in result["rows"].items():
        kept = [
            f"{row[what]['median']:.3f} ({row[what]['q25']:.2f} to {row[what]['q75']:.2f})"
            for what in ("prefill", "decode")
        ]
        extra = row["overhead_us"]
        rows.append([
            _label(name, result, row), *kept,
            f"{extra['median']:.0f} ({extra['q25']:.0f} to {extra['q75']:.0f})",
            f"{extra['runs'][0]:.0f} to {extra['runs'][-1]:.0f}", f"{row['plain_us']:.0f}",
            f"{100 * extra['median'] / row['plain_us']:.1f} %", _beside(row),
        ])  # fmt: skip
    head = [
        "", "prefill, keep all", "decode, keep all", "pruned decode, us", "in each process",
        "layer without a session", "added share", "LLaVA in the same run",
    ]  # fmt: skip
    return "\n\n".join([
        "## Every family",
        f"{result['model']}, batch 1, precomputed features, medians and quartiles. The first two "
        "columns divide the time with a session that removes nothing by the time without a "
        "session. The next columns show the microseconds that a PyramidDrop session adds per layer "
        "and generated token to a model without a session whose cache layers are cut to the same "
        "length, and the time of a layer in that model. In Dots 3 Note, where no layer can rank "
        "tokens, a random quarter is kept instead. Rows were measured on machines of different "
        "speed, so compare the added time with the time of a layer; some families were measured "
        "together with LLaVA. Models for decoding are so narrow that Python overhead dominates. "
        f"Each family was measured in {result['runs']} processes with {result['rounds']} rounds "
        f"each, unless its name is followed by other numbers. {about(result)}",
        table(head, rows),
    ])  # fmt: skip


def selection() -> str:
    """Choosing, beside plain transcriptions."""
    result = load("selection")
    rows, head = [], ["method"]
    for name, sizes in result["methods"].items():
        head = ["method", *(f"{size['visual']} x {size['batch']}" for size in sizes), "FLOPs"]
        cells = [f"{size['ours_ms']:.1f} ms, {size['faster']['median']:.1f}x" for size in sizes]
        share = max(size["share_of_7b_prefill"] for size in sizes)
        differs = "" if all(size["agree"] for size in sizes) else " (results differ)"
        rows.append([f"{name}{differs}", *cells, f"{100 * share:.2f} %"])
    return "\n\n".join([
        "## Selection compared with a plain transcription",
        "Each cell shows two numbers. The first is the time to choose tokens and reduce the "
        "features, at the widths of a 7B model; signals that the method reads were made before. "
        "The second is the speed-up over a plain transcription of the paper's equations, which "
        "works image by image, as published code does. Both give the same tokens, unless the row "
        "says that results differ.",
        bullets([
            "A column such as 576 x 16 means 576 visual tokens per image, and 16 images.",
            "The last column is the share of the FLOPs of a 7B model's prefill, at most.",
            "A quarter of the tokens is kept, if the method accepts a budget.",
            "Video methods get 16 frames.",
            "A transcription that takes seconds ran once, on some of the images.",
            *remarks(result),
        ]),
        about(result),
        table(head, rows),
    ])  # fmt: skip


def speed() -> str:
    """Speed by batch size, on a CPU and on a GPU."""
    parts = [
        "## By batch size",
        "Measured with `foveate bench --speed`. TTFT includes the vision tower, token selection, "
        "prefill and the head; prefill is TTFT without the tower. *Of FLOPs* divides the prefill "
        "speed-up by the one that FLOPs predict. Speed-ups are over all tokens, round by round, "
        "with quartiles; the row *all tokens* shows the absolute values. Bold means slower than "
        "with all tokens in three rounds out of four.",
    ]
    for name, job in {**ON_CPU, **ON_GPU}.items():
        path = RESULTS / f"{name}.json"
        heading = f"### {job.model.removeprefix('random:')}, {job.tokens} visual tokens"
        if path.exists():
            parts += [heading, *_speed_part(json.loads(path.read_text()))]
        else:
            device = "GPU" if name in ON_GPU else "CPU"
            parts += [
                f"{heading}, {device}",
                f"**not measured**: {job.methods} at batch {job.batch} on random weights of this "
                f"size ({'bfloat16' if name in ON_GPU else 'float32'}); "
                f"`python benchmarks/speed.py{' --gpu' if name in ON_GPU else ''}` measures it.",
            ]
    return "\n\n".join(parts)


def _speed_part(result: dict[str, Any]) -> list[str]:
    machine, settings = result["machine"], result["settings"]
    rows: list[list[str]] = []
    cut = []
    for cell in result["cells"]:
        size = f"{cell.get('visual_tokens', cell['tokens']):,} x {cell['batch']}"
        if "error" in cell:
            rows.append([size, cell["error"], *[""] * 7])
            continue
        cut += [f"{size}: {cell['cut']}."] if "cut" in cell else []
        rows += [[size, name, *_speed_cells(row)] for name, row in cell["rows"].items()]
    answer = f"with {settings['new_tokens'] + 1} tokens"
    head = ["tokens x batch", "", "TTFT", "prefill", "of FLOPs", "decode", answer, "peak", "KV"]
    slower = [
        f"{name} at {cell['visual_tokens']:,} x {cell['batch']} ({', '.join(row['slower'])})"
        for cell in result["cells"]
        for name, row in cell.get("rows", {}).items()
        if row.get("slower")
    ]
    where = machine.get("gpu", machine["cpu"])
    return [
        f"Random weights, {settings['text']} text tokens, {settings['repeats']} rounds. {where}; "
        f"{settings['dtype']}, {settings['attention']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {settings['time']}; heap {settings['heap']}. Peak memory: "
        f"{settings['memory']}.",
        table(head, rows),
        *cut,
        f"Slower than with all tokens: {'; '.join(slower) or 'none'}.",
    ]


def _speed_cells(row: dict[str, Any]) -> list[str]:
    mib = [f"{row[key] / 2**20:,.0f} MiB" for key in ("peak_bytes", "kv_bytes")]
    if "speed_up" not in row:
        rate = [f"{row[k]['median']:,.0f}/s" for k in ("decode_tokens_per_s", "tokens_per_s")]
        times = [f"{row[k]['median']:,.0f} ms" for k in ("ttft_ms", "prefill_ms")]
        return [*times, "", *rate, *mib]
    speed = {
        key: _bold(f"{v['median']:.2f}x ({v['q25']:.2f} to {v['q75']:.2f})", key in row["slower"])
        for key, v in row["speed_up"].items()
    }
    share = f"{row['prefill_of_predicted']:.2f}"
    return [speed["ttft"], speed["prefill"], share, speed["decode"], speed["throughput"], *mib]


def gpu() -> str:
    """Targets of a GPU beside what was measured there."""
    parts = read_gpu(RESULTS)
    about = (
        "`make gpu` runs everything that needs a CUDA GPU, in at most "
        f"{sum(LIMITS.values()):.0f} minutes: each stage's outputs with flash kernels compared "
        "with the CPU's, host synchronisations, decoding, selection, a training step, and the "
        "batch-size sweeps above. Weights are random, except those of the embedded model.\n\n"
        "A host synchronisation is what `torch.cuda.set_sync_debug_mode` warns of: a value that "
        "Python reads, a result whose size the data decide, or a copy to the GPU that is not "
        "`non_blocking`. Where there is no GPU, `benchmarks/_waits.py` counts the same on a "
        "stand-in device, and `tests/test_waits.py` holds methods to it: a session reads the "
        "prompt once, and once what was removed before the language model. So it is with the most "
        "used methods on every vision-language model, with SDPA attention. It waits three times "
        "with ToMe and FlowCut where newlines stand between patches, and three or four times with "
        "VisionZip and SCOPE where LLaVA-OneVision interpolates tiles. The few methods that wait "
        "more are listed there with their reasons; most of them decide by themselves how many "
        "tokens survive."
    )
    if "machine" in parts:
        m = parts["machine"]
        where = f"{m.get('gpu', m['cpu'])}, torch {m['torch']}, transformers {m['transformers']}."
    else:
        where = "**Nobody has run it yet**, so the *measured* column is empty."
    failed = [
        f"{name}: {part['error']}." for name, part in parts["parts"].items() if "error" in part
    ]
    rows = [verdict.cells for verdict in judged(results_of(RESULTS))]
    return "\n\n".join([
        "## One GPU", about, where, *failed, table(["", "target", "measured", "met"], rows),
    ])  # fmt: skip


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def page() -> str:
    """The whole page."""
    parts = [prefill(), speed(), gpu(), decode(), families(), scoring(), selection(), encoders()]
    parts.append(pixelprune())
    parts.append(attending())
    return "\n\n".join([INTRO.strip(), *parts]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}")
