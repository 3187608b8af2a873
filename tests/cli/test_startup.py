"""Help, listings and wrong command lines come without torch; the library loads what it needs."""

import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import foveate
from foveate.bench.workload import known_sizes
from foveate.cli.arguments.bench_speed import SIZES

HEAVY = {"torch", "transformers", "numpy", "PIL"}
ROOT = Path(foveate.__file__).parent.parent
TOLD = [
    "--help", "--version", "list", "list --families", "train --example",
    "run --help", "list --help", "flops --help", "bench --help", "bench --speed --help",
    "calibrate --help", "train --help", "demo --help", "batch --help",
]  # fmt: skip
WRONG = [
    "nonsense", "--nonsense", "run", "run tiny", "run --nonsense", "run tiny a.png -m fastv",
    "run tiny a.png why -m fastv --repeats x", "flops", "flops tiny --nonsense", "calibrate",
    "list --nonsense", "bench --samples x", "demo --repeats 0", "train",
    "batch", "batch a.jsonl out", "batch a.jsonl out --model tiny --keep 0.5",
    "serve tiny --max-replicas 2", "serve tiny --replicas 3 --max-replicas 2",
]  # fmt: skip


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def call(line):
    """Run a command; its result, and what modules it imported."""
    found = python("-X", "importtime", "-m", "foveate", *line.split())
    lines = [entry for entry in found.stderr.splitlines() if entry.startswith("import time:")]
    return found, {entry.rpartition("|")[2].strip() for entry in lines}


def loaded(code):
    """Modules that are loaded after some code."""
    found = python("-c", f"import sys\n{code}\nprint(*sys.modules)")
    assert found.returncode == 0, found.stderr
    return set(found.stdout.split())


@pytest.mark.parametrize("line", TOLD)
def test_what_is_told_comes_without_torch(line):
    found, modules = call(line)
    assert found.returncode == 0, found.stderr
    assert "foveate.cli.commands" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_lines_are_refused_without_torch(line):
    found, modules = call(line)
    assert found.returncode == 2
    assert not HEAVY & modules


def test_the_import_of_foveate_loads_nothing_heavy():
    assert not HEAVY & loaded("import foveate")


def test_models_of_transformers_are_loaded_when_one_is_at_hand():
    """All of foveate's names bring no model's code, but for what picks a model's class."""
    used = loaded("import foveate\nfor name in foveate.__all__: getattr(foveate, name)")
    models = {name for name in used if name.startswith("transformers.models.")}
    assert "transformers" in used
    assert not {n for n in models if ".modeling_" in n and not n.endswith(".modeling_auto")}


@pytest.mark.parametrize(
    "line", ["list", "flops llava-hf/llava-1.5-7b-hf -m fastv", "list --model tiny"]
)
def test_plain_commands_warn_of_nothing(line):
    found = python("-m", "foveate", *line.split())
    assert (found.returncode, found.stderr) == (0, "")


def test_every_public_name_is_there():
    """Names that are imported late are found, listed and refused as others are."""
    for package in (foveate, foveate.core, foveate.families):
        assert set(package.__all__) <= set(dir(package))
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'nope'"):
            attrgetter("nope")(package)


def test_the_help_of_speed_names_the_sizes_there_are():
    assert known_sizes() == SIZES
