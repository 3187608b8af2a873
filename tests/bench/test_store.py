"""The results file: nothing finished is lost."""

import os
import signal
import subprocess
import sys

import pytest

from foveate.bench.store import Store
from foveate.errors import InputError

WRITER = """
import sys, time
from foveate.bench.store import Store
with Store(sys.argv[1]).writing() as store:
    for n in range(5):
        store.add({"key": str(n), "method": "m", "n": n})
    store.journal.open("a").write('{"key": "half')
    print("written", flush=True)
    time.sleep(1800)
"""


def test_what_was_finished_survives_a_kill(tmp_path):
    path = tmp_path / "results.parquet"
    command = [sys.executable, "-c", WRITER, str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ}, text=True)
    assert child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not path.exists()
    store = Store(path)
    assert [row["n"] for row in store.rows] == list(range(5))
    with store.writing():
        store.add({"key": "5", "n": 5})
    assert not store.journal.exists()
    assert [row["n"] for row in Store(path).rows] == list(range(6))


def test_a_second_run_is_kept_out(tmp_path):
    path = tmp_path / "results.parquet"
    with Store(path).writing(), pytest.raises(InputError, match="another run"):
        Store(path).writing().__enter__()


def test_a_corrupt_file_is_named(tmp_path):
    path = tmp_path / "results.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match=r"results\.parquet.*--out"):
        Store(path)


def test_a_broken_line_of_the_journal_is_named(tmp_path):
    path = tmp_path / "results.parquet"
    path.with_suffix(".journal").write_text('{"key": "1"}\nrubbish\n{"key": "2"}\n')
    with pytest.raises(InputError, match="line 2"):
        Store(path)


def test_rows_come_back_as_they_were(tmp_path):
    path, row = tmp_path / "results.parquet", {"key": "k", "keep": None, "notes": ["a"]}
    with Store(path).writing() as store:
        store.add(row)
    (read,) = Store(path).rows
    assert {name: read[name] for name in row} == row
