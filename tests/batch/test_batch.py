"""Shards are answered whole, once, and as their rows alone would be."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from foveate import tiny
from foveate.batch.job import Job
from foveate.batch.output import Totals
from foveate.batch.run import look, run_here, writing
from foveate.errors import InputError
from foveate.integrations.chat import ChatModel
from foveate.methods import FastV, PyramidDrop, Uniform
from tests.batch.tables import data_url, png, read, scenes, write_lines

METHODS = (FastV(layer=3, keep=0.25),)


def job(source, output, **given):
    given = {"methods": METHODS, "max_new_tokens": 3, "batch": 4, **given}
    return Job(source, output, "tiny", **given)


def answer(one):
    """Run a job; its totals."""
    found = look(one)
    with writing(one, found.plan):
        return found.done + run_here(one, found.plan, found.left, lambda rows: None)


@pytest.fixture(scope="module")
def alone():
    """What the model says to each scene by itself."""
    chat = ChatModel(*tiny.load(), METHODS)
    found = []
    for image, question, _ in scenes(10):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        found += chat.ask([[{"role": "user", "content": parts}]], max_new_tokens=3)
    return found


def test_rows_are_answered_as_they_are_alone(tmp_path, alone):
    source = write_lines(tmp_path, 10)
    totals = answer(job(source, tmp_path / "out", shard_rows=4))
    names = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert names == [f"q-{n:05}-of-00003.parquet" for n in range(3)]
    rows = read(tmp_path / "out")
    assert [row["id"] for row in rows] == list(range(10))
    assert [row["answer"] for row in rows] == [a.text.strip() for a in alone]
    assert [row["new_tokens"] for row in rows] == [a.tokens for a in alone]
    assert [row["want"] for row in rows] == [want for _, _, want in scenes(10)]
    assert {row["error"] for row in rows} == {None}
    assert {(r["visual_tokens_before"], r["visual_tokens_after"]) for r in rows} == {(256, 64)}
    assert totals == Totals(10, 0, 2560, 640, sum(a.tokens for a in alone))


@pytest.mark.parametrize("kind", ["bytes", "struct", "lists", "data URLs"])
def test_parquet_holds_images_in_several_ways(tmp_path, alone, kind):
    made = scenes(5)
    values = {
        "bytes": lambda image: png(image),
        "struct": lambda image: {"bytes": png(image), "path": None},
        "lists": lambda image: [png(image)],
        "data URLs": lambda image: data_url(image),
    }[kind]
    table = pa.table({
        "image": [values(image) for image, _, _ in made],
        "ask": [question for _, question, _ in made],
        "answer": [want for _, _, want in made],
    })  # fmt: skip
    (tmp_path / "in" / "deep").mkdir(parents=True)
    parquet.write_table(table.slice(0, 3), tmp_path / "in" / "a.parquet", row_group_size=1)
    parquet.write_table(table.slice(3, 2), tmp_path / "in" / "deep" / "b.parquet")
    one = job(
        tmp_path / "in", tmp_path / "out", question="ask", prefix="our_", drop=("image",),
        shard_rows=2,
    )  # fmt: skip
    answer(one)
    rows = read(tmp_path / "out")
    assert [row["our_answer"] for row in rows] == [a.text.strip() for a in alone[:5]]
    assert [row["answer"] for row in rows] == [want for _, _, want in made]
    assert "image" not in rows[0]
    names = {p.relative_to(tmp_path / "out").as_posix() for p in one.output.rglob("*.parquet")}
    assert names == {"a-00000-of-00002.parquet", "a-00001-of-00002.parquet", "deep/b.parquet"}


def test_what_is_wrong_with_a_row_stands_in_it(tmp_path, alone):
    """And the rows beside it are answered."""
    source = write_lines(tmp_path, 8)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    (tmp_path / "0.png").write_bytes(png(scenes(1)[0][0])[:100])
    rows[1]["image"] = "none.png"
    del rows[2]["question"]
    rows[3]["image"] = None
    rows[4]["image"] = "https://example.org/a.png"
    rows[5]["image"] = [rows[5]["image"], rows[6]["image"]]
    lines = [json.dumps(row) for row in rows]
    lines[7] = '{"id": 7, "image": '
    source.write_text("\n\n".join(lines))
    totals = answer(job(source, tmp_path / "out"))
    found = read(tmp_path / "out")
    wanted = [
        "cannot read", "no such image file", "no question", "no image",
        "not fetched from example.org", None, None, "no JSON",
    ]  # fmt: skip
    for row, words in zip(found, wanted, strict=True):
        assert (row["answer"] is None) == (words is not None)
        assert row["error"] is None if words is None else words in row["error"]
    assert found[6]["answer"] == alone[6].text.strip()
    assert found[5]["visual_tokens_before"] == 2 * found[6]["visual_tokens_before"]
    assert totals.errors == 6
    assert json.loads(found[5]["image"]) == rows[5]["image"]  # of several kinds: JSON text


def test_a_row_that_the_model_chokes_on_does_not_take_others_along(tmp_path, alone, monkeypatch):
    source, asked = write_lines(tmp_path, 6), ChatModel.ask

    def choking(self, batch, **settings):
        texts = [one[0]["content"][-1]["text"] for one in batch]
        if any(text == "why ?" for text in texts):
            raise RuntimeError("it broke\nbadly")
        return asked(self, batch, **settings)

    monkeypatch.setattr(ChatModel, "ask", choking)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[2]["question"] = "why ?"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer(job(source, tmp_path / "out"))
    found = read(tmp_path / "out")
    assert found[2]["error"] == "RuntimeError: it broke badly"
    others = [row["answer"] for row in found if row["id"] != 2]
    assert others == [a.text.strip() for n, a in enumerate(alone[:6]) if n != 2]


def test_questions_without_images_are_answered(tmp_path):
    source = tmp_path / "q.jsonl"
    source.write_text('{"images": [], "question": "what color is the star ?"}\n')
    answer(job(source, tmp_path / "out"))
    (row,) = read(tmp_path / "out")
    assert row["error"] is None
    assert row["visual_tokens_before"] == 0


def test_columns_keep_their_types_over_shards(tmp_path):
    made = write_lines(tmp_path, 4)
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    extra = [{"n": 1}, {"n": 2.5, "big": 2**60}, {"t": ["a"], "big": 1}, {"m": {"x": 1}, "n": None}]
    made.write_text(
        "\ufeff" + "".join(json.dumps({**a, **b}) + "\n" for a, b in zip(rows, extra, strict=True))
    )
    answer(job(made, tmp_path / "out", shard_rows=1))
    tables = [parquet.read_table(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert len({str(t.schema.remove_metadata()) for t in tables}) == 1
    found = read(tmp_path / "out")
    assert [row["n"] for row in found] == [1.0, 2.5, None, None]
    assert [row["big"] for row in found] == [None, 2**60, 1, None]
    assert found[2]["t"] == ["a"]
    assert json.loads(found[3]["m"]) == {"x": 1}


def test_done_shards_are_passed_over_and_errors_can_be_retried(tmp_path):
    source = write_lines(tmp_path, 6)
    image = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").unlink()
    one = job(source, tmp_path / "out", shard_rows=2)
    assert str(look(one)) == "3 shards, 6 rows, 0 shards done"
    assert answer(one).errors == 1
    assert str(look(one)) == "3 shards, 6 rows, 3 shards done"
    (tmp_path / "5.png").write_bytes(image)
    again = job(source, tmp_path / "out", shard_rows=2, retry_errors=True)
    assert [shard.first for shard in look(again).left] == [4]
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert answer(again).errors == 0
    after = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [a == b for a, b in zip(times, after, strict=True)] == [True, True, False]
    assert Counter(row["id"] for row in read(tmp_path / "out")) == Counter(range(6))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 4}, "max_new_tokens was 3 and is 4"),
        ({"methods": (PyramidDrop(),)}, "methods was"),
        ({"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16'"),
        ({"prefix": "a_"}, "prefix was '' and is 'a_'"),
        ({"shard_rows": 3}, "shard_rows was 2 and is 3"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, words):
    source = write_lines(tmp_path, 2)
    one = job(source, tmp_path / "out", shard_rows=2)
    with writing(one, look(one).plan):
        pass
    look(job(source, tmp_path / "out", shard_rows=2, batch=1))
    with pytest.raises(InputError, match=words):
        look(job(source, tmp_path / "out", **{"shard_rows": 2, **changes}))


def test_an_input_that_changed_is_refused_and_new_files_are_welcome(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = write_lines(folder, 3, "a.jsonl")
    one = job(folder, tmp_path / "out")
    answer(one)
    (folder / "b.jsonl").write_text(source.read_text())
    assert [shard.name for shard in look(one).left] == ["b.parquet"]
    source.write_text(source.read_text() * 2)
    with pytest.raises(InputError, match=r"a\.parquet has changed"):
        look(one)
    source.unlink()
    with pytest.raises(InputError, match=r"a\.parquet is gone"):
        look(one)


def test_two_runs_do_not_write_to_one_output(tmp_path):
    one = job(write_lines(tmp_path, 1), tmp_path / "out")
    plan = look(one).plan
    with writing(one, plan), pytest.raises(InputError, match="another run"), writing(one, plan):
        pass


def test_what_a_killed_run_left_is_cleared(tmp_path):
    one = job(write_lines(tmp_path, 1), tmp_path / "out")
    one.output.mkdir()
    (one.output / ".0123456789abcdef.parquet").write_bytes(b"half")
    (one.output / "q.parquet").write_bytes(b"half")
    with pytest.raises(InputError, match="something else"):
        look(one)
    (one.output / "q.parquet").unlink()
    answer(one)
    assert [path.name for path in one.output.rglob("*.parquet")] == ["q.parquet"]


class Host(BaseHTTPRequestHandler):
    """A web server that fails at first, and knows one image."""

    image = b""
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        status = 200 if self.path == "/a.png" else 302
        if self.path == "/late.png":
            status = 503 if self.asked.count("/late.png") < 3 else 200
        if self.path == "/none.png":
            status = 404
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/a.png")
        self.end_headers()
        self.wfile.write(self.image if status == 200 else b"")

    def log_message(self, *args):
        """Say nothing."""


def test_images_are_fetched_from_hosts_that_are_named(tmp_path, alone, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    image, question, _ = scenes(1)[0]
    Host.image = png(image)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ("a.png", "late.png", "none.png", "moved.png")
    urls = [f"http://127.0.0.1:{server.server_port}/{name}" for name in names]
    source = tmp_path / "q.jsonl"
    source.write_text(
        "".join(json.dumps({"image": url, "question": question}) + "\n" for url in urls)
    )
    answer(job(source, tmp_path / "refused"))
    assert not Host.asked
    answer(job(source, tmp_path / "out", hosts=frozenset({"127.0.0.1"})))
    server.shutdown()
    rows = read(tmp_path / "out")
    assert [row["answer"] for row in rows] == [alone[0].text.strip()] * 2 + [None] * 2
    assert "404" in rows[2]["error"]
    assert "is not followed" in rows[3]["error"]
    assert [Host.asked.count(f"/{name}") for name in names] == [1, 3, 1, 1]
    assert all("127.0.0.1" in row["error"] for row in read(tmp_path / "refused"))


def test_no_row_exceeds_a_total(tmp_path):
    source = write_lines(tmp_path, 2)
    answer(job(source, tmp_path / "out", methods=(Uniform(keep=0.5),), keep_total=50))
    rows = read(tmp_path / "out")
    assert {(r["visual_tokens_before"], r["visual_tokens_after"]) for r in rows} == {(256, 50)}
