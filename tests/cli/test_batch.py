"""`foveate batch` goes on where it was killed, and says what is wrong in one line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import foveate
from tests.batch.tables import read, write_lines
from tests.cli.calling import call

ROOT = Path(foveate.__file__).parent.parent
OPTIONS = ("--model", "tiny", "-m", "fastv", "--set", "layer=3", "--keep", "0.25")
FEW = ("--max-new-tokens", "3", "--batch", "2")


def test_a_run_is_answered_and_told(tmp_path):
    source, out = write_lines(tmp_path, 4), tmp_path / "out"
    line = ("batch", str(source), str(out), *OPTIONS, *FEW)
    dry = call(*line, "--dry-run")
    assert dry.stdout == "1 shard, 4 rows, 0 shards done\n"
    assert not out.exists()
    done = call(*line)
    assert done.exit_code == 0, done.output
    assert "visual tokens: 1,024 before, 256 after (25%)" in done.stdout
    assert "4 of 4 rows" in done.stderr
    again = call(*line)
    assert "1 shard, 4 rows, 1 shard done" in again.stdout
    assert "4 answers" in again.stdout
    assert again.stderr == ""
    other = call(*line, "--prefix", "x_")
    assert other.exit_code == 2
    assert "prefix was '' and is 'x_'" in other.stderr


def test_a_kill_loses_nothing_and_doubles_nothing(tmp_path):
    source, out = write_lines(tmp_path, 16), tmp_path / "out"
    line = ["batch", str(source), str(out), *OPTIONS, *FEW, "--shard-rows", "2"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "foveate", *line],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(out.glob("q-*.parquet")) and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("q-*.parquet")}
    assert 1 <= len(before) < 8
    again = call(*line)
    assert again.exit_code == 0, again.output
    assert f"8 shards, 16 rows, {len(before)} shard" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole = tmp_path / "whole"
    assert call(*line[:2], str(whole), *line[3:]).exit_code == 0
    assert read(out) == read(whole)
    assert [row["id"] for row in read(out)] == list(range(16))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.jsonl", "OUT"], ["no such file or folder", "none.jsonl"]),
        (["IN/text.txt", "OUT"], [".jsonl or .parquet"]),
        (["IN/empty", "OUT"], ["no file that ends in"]),
        (["IN/blank.jsonl", "OUT"], ["holds no rows"]),
        (["IN/broken.jsonl", "OUT"], ["cannot read", "no JSON"]),
        (["IN/broken.parquet", "OUT"], ["cannot read", "broken.parquet"]),
        (["IN/q.jsonl", "OUT", "--question-column", "ask"], ["no column 'ask'", "question, want"]),
        (["IN/plain.jsonl", "OUT"], ["no column images or image", "--image-column"]),
        (["IN/numbers.parquet", "OUT"], ["'image'", "int64", "paths, bytes"]),
        (["IN/both.jsonl", "OUT"], ["column 'answer' already", "--prefix"]),
        (["IN/q.jsonl", "IN/q.jsonl"], ["is a file, not a folder"]),
        (["IN", "IN/empty", "--question-column", "question"], ["within the input"]),
        (["IN/q.jsonl", "IN"], ["Parquet files of something else"]),
        (["IN/twice", "OUT"], ["both be answered in a.parquet"]),
        (["IN/q.jsonl", "OUT", "--set", "depth=1"], ["depth"]),
        (["IN/q.jsonl", "OUT", "--device", "toaster"], ["toaster"]),
        (["IN/q.jsonl", "OUT", "--gpus-per-worker", "1"], ["need --workers"]),
    ],
)
def test_errors_are_one_line_and_code_2(arguments, words, tmp_path):
    folder = tmp_path / "in"
    (folder / "empty").mkdir(parents=True)
    (folder / "twice").mkdir()
    write_lines(folder, 1)
    row = {"image": "0.png", "question": "?"}
    texts = {
        "text.txt": "?", "blank.jsonl": "\n\n", "broken.jsonl": "{", "broken.parquet": "PAR1",
        "plain.jsonl": '{"question": "?"}', "both.jsonl": json.dumps({**row, "answer": "red"}),
        "twice/a.jsonl": json.dumps(row),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    parquet.write_table(pa.table({"image": [1], "question": ["?"]}), folder / "numbers.parquet")
    parquet.write_table(pa.table({"image": ["a"], "question": ["?"]}), folder / "twice/a.parquet")
    if arguments[0] == "IN":
        for name in ("broken.jsonl", "broken.parquet", "both.jsonl", "numbers.parquet",
                     "plain.jsonl", "blank.jsonl"):  # fmt: skip
            (folder / name).unlink()
        for path in (folder / "twice").iterdir():
            path.unlink()
    places = {"IN": str(folder), "OUT": str(tmp_path / "out")}
    given = [places.get(a, a.replace("IN/", f"{folder}/")) for a in arguments]
    result = call("batch", *given, *OPTIONS)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_without_any_answer_the_command_fails(tmp_path):
    source = tmp_path / "q.jsonl"
    source.write_text('{"image": "none.png", "question": "?"}\n')
    result = call("batch", str(source), str(tmp_path / "out"), "--model", "tiny")
    assert result.exit_code == 2
    assert "no row could be answered" in result.stderr
