"""The page about large images says what was measured."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "large-images.md").read_text().split())


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_memory():
    took = results("large_memory")["reading"]
    grown = took["peak_mib"] - took["before_mib"]
    assert f"{took['side']:,} pixels" in PAGE
    assert f"{took['pixels_mib']:,} MiB" in PAGE
    assert f"grew by {grown} MiB" in PAGE
    assert grown <= 128, "the stated bound"
    assert f"{took['seconds']:.0f} s" in PAGE
    assert took["rounds"][-1]["size"] == took["levels"][-1], "the finest level is reached"
    tiles = 1 + sum(r["tiles"] for r in took["rounds"])
    assert f"{tiles} tiles" in PAGE


def test_training():
    result = results("large_focus")
    assert f"{result['scenes']['questions']} questions" in PAGE
    assert f"{result['training']['cpu_s']:.0f} CPU seconds" in PAGE
    for name, told in result["modules"].items():
        found = " | ".join(f"{share:.1%}" for share in told["found"].values())
        right = f"{told['reading']['right']:.0%}"
        tiles = f"{told['reading']['tiles']:.0f}"
        read = f"{told['reading']['found']:.0%}"
        assert f"| {name} | {found} | {read} | {right} | {tiles} |" in PAGE
    untrained, _, trained = (told["found"]["0.1"] for told in result["modules"].values())
    assert trained > untrained + 0.2
