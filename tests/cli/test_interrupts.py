"""Ctrl-C ends every command with one line that says what was kept, and with exit code 130."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from foveate.bench.runner import Runner
from foveate.cli.interrupts import CtrlC, Interrupted, answer_interrupt, keeping
from tests.cli.calling import call


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def interrupted(*arguments):
    found = call(*arguments)
    assert found.exit_code == 130
    *before, line = found.stderr.strip().splitlines()
    assert line.startswith("interrupted: ")
    assert all(line.endswith(" cells") for line in before)  # of a bench, without a terminal
    return line


def test_a_command_that_saves_nothing_says_so(monkeypatch, scene, question):
    monkeypatch.setattr("foveate.cli.run.answer", stop)
    assert "nothing new was saved" in interrupted("run", "tiny", scene, question, "-m", "fastv")


def test_bench_says_how_many_cells_are_kept(monkeypatch, tmp_path):
    run, calls = Runner.run, []

    def two_cells(self, cell):
        calls.append(cell)
        return run(self, cell) if len(calls) < 3 else stop()

    monkeypatch.setattr(Runner, "run", two_cells)
    given = ["--tasks", "counting", "--methods", "fastv", "--samples", "1", "--workers", "1"]
    line = interrupted("bench", *given, "--out", str(tmp_path / "out"))
    assert "2 finished cells are saved in" in line
    assert "run the same command again to continue" in line
    monkeypatch.undo()
    found = call("bench", *given, "--keep", "0.5", "--no-timing", "--out", str(tmp_path / "out"))
    assert "2 of 5 cells were already finished" in found.stderr


def test_calibrate_leaves_no_traceback(monkeypatch, scene, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"image": scene, "question": "what color is the star ?"}))
    monkeypatch.setattr("foveate.calibration.search.agreement", stop)
    out = tmp_path / "v.json"
    line = interrupted("calibrate", "tiny", str(prompts), "--out", str(out))
    assert "finished trials are saved in" in line
    assert "v.trials" in line


def swallow(handler):
    try:
        handler(signal.SIGINT, None)
    except KeyboardInterrupt:
        raise ImportError("could not import module") from None


def test_a_library_that_makes_something_else_of_it_is_seen_through():
    handler = CtrlC()
    handler.end = lambda: None  # what the timer calls
    before = signal.signal(signal.SIGINT, handler)
    try:
        with (
            pytest.raises(Interrupted, match="three rows are kept"),
            keeping(lambda: "three rows are kept"),
        ):
            swallow(handler)
        assert answer_interrupt(ImportError("could not import module"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_errors_are_left_alone():
    with pytest.raises(ValueError, match="mine"), keeping(lambda: "never"):
        raise ValueError("mine")
    assert not answer_interrupt(ValueError("mine"))


SWALLOWS = """
import sys, time
sys.argv = ["foveate", "list"]
from foveate.cli import main
from foveate.cli.arguments import list as command
import foveate.cli.listing as listing
def show(*args, **kwargs):
    print("begun", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
listing.show_methods = show
main()
"""


def test_a_library_that_goes_on_is_ended(tmp_path):
    """Within two seconds, whatever swallows the exception."""
    done = subprocess.Popen(
        [sys.executable, "-c", SWALLOWS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.stdout.readline() == "begun\n"
    begun = time.monotonic()
    os.kill(done.pid, signal.SIGINT)
    _, told = done.communicate(timeout=60)
    assert done.returncode == 130
    assert time.monotonic() - begun < 4  # 1.5 seconds, and a slow machine
    assert told.strip() == "interrupted: nothing new was saved"


def test_workers_of_a_bench_end_with_it(tmp_path):
    command = [
        sys.executable, "-m", "foveate", "bench", "--tasks", "counting,words", "--methods", "fastv",
        "--samples", "8", "--workers", "2", "--no-timing", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    journal = tmp_path / "out" / "results.journal"
    while not (journal.exists() and journal.read_bytes().count(b"\n")) and run.poll() is None:
        time.sleep(0.1)
    time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, told = run.communicate(timeout=60)
    assert run.returncode == 130
    (line,) = [line for line in told.splitlines() if "cells" not in line or "saved" in line]
    assert "finished cells are saved in" in line
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        wait_for_group(run.pid)


def wait_for_group(number):
    for _ in range(100):
        os.killpg(number, 0)
        time.sleep(0.1)
