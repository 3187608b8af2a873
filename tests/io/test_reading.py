"""Files of any content are read or refused with one short line, in bounded time and memory."""

import gc
import json
import time
import tracemalloc

import pytest

from foveate.cli.bounded_yaml import parse_yaml
from foveate.cli.calibrate import read_prompts
from foveate.cli.recipe import parse_recipe, read_recipe
from foveate.core.resolve import methods_of
from foveate.core.saving import Saved
from foveate.errors import FoveateError, InputError
from foveate.io.quoting import LONGEST
from foveate.io.reading import parse_json, read_lines
from foveate.methods import FastV, PyramidDrop, VisionZip
from foveate.training.finetune import Conversations
from foveate.training.finetune.recipe import Data, Recipe

MEGABYTE = 2**20


def filled(unit, before="", after=""):
    return (before + unit * ((MEGABYTE - len(before) - len(after)) // len(unit)) + after).encode()


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "m: &m0 {k: v}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{','.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
CONTENTS = {
    "empty": b"",
    "blank": b" \n\n",
    "nul": b"\0" * 50,
    "not-utf8": b"model: \xff\xfe\n",
    "half": b'{"method": "fastv", "positions": "\\ud800"}',
    "top-list": b"[1, 2]",
    "top-text": b'"fastv"',
    "top-number": b"3",
    "top-null": b"null",
    "twice": b'{"method": "fastv", "method": "divprune"}',
    "nan": b'{"method": "fastv", "keep": NaN}',
    "infinite": b'{"method": "fastv", "keep": 1e999}',
    "digits": b'{"method": "fastv", "layer": ' + b"9" * 5000 + b"}",
    "name": json.dumps({"method": "x" * 5000, "model": "y" * 5000}).encode(),
    "keys": json.dumps({"x" * 5000: 1}).encode(),
    "format": json.dumps({"format": 10**400, "foveate": "v" * 5000}).encode(),
    "methods": json.dumps(
        {"format": 1, "methods": [{"method": "fastv", "layer": {}}] * 9}
    ).encode(),
    "nested": b"[" * 5000,
    "nested-map": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "brackets": filled("["),
    "closed": b"[" * (MEGABYTE // 2) + b"]" * (MEGABYTE // 2),
    "lists": filled("[],", "[", "0]"),
    "maps": filled("{},", "[", "0]"),
    "pairs": filled('{"":0},', "[", "0]"),
    "numbers": filled("1,", "[", "0]"),
    "text": filled("x", '{"method": "', '"}'),
    "keys-many": ("{" + ",".join(f'"{n}":0' for n in range(99999)) + "}").encode(),
    "places": filled("<image>a", '{"messages":[{"role":"user","content":"', '"}]}'),
    "dashes": filled("- a\n"),
    "colons": filled("a:\n "),
    "questions": filled("? "),
    "comments": filled("# x\n"),
    "newlines": filled("\n"),
    "tags": filled("!!x "),
    "anchors": filled("&a "),
    "sixties": filled(":1", "model: 1"),
    "laughs": LAUGHS.encode(),
    "merges": MERGES.encode(),
    "itself": b"a: &a [*a]\n",
    "itself-map": b"&a {b: *a}\n",
    "dates": b"model: 2020-99-99\n",
    "constructors": b"model: !!timestamp x\nout: !!bool y\n",
    "objects": b"!!python/object/apply:os.system ['true']\n",
    "documents": b"a: 1\n---\nb: 2\n",
    "unhashable": b"{[1]: 2}\n",
    "few-nodes": b"[" + b"a," * 30000 + b"a]",
    "deep-yaml": b"".join(b" " * n + b"a:\n" for n in range(300)),
}
READERS = {
    "recipe.yaml": read_recipe,
    "method.json": methods_of,
    "foveate.json": Saved.read,
    "rows.jsonl": Conversations,
    "prompts.jsonl": read_prompts,
}


@pytest.fixture
def own_garbage():
    """The collector looks at what a test makes, not at all that earlier tests have left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", CONTENTS)
def test_any_content_ends_in_one_short_line(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(CONTENTS[content])
    start = time.process_time()
    try:
        READERS[name](path)
    except FoveateError as error:
        message = str(error)
    else:
        pytest.fail("such a file is read")
    assert time.process_time() - start < 1.0
    assert len(message) <= LONGEST
    assert message.isprintable()
    assert name in message


@pytest.mark.parametrize(
    "content", ["lists", "pairs", "places", "keys-many", "laughs", "few-nodes"]
)
@pytest.mark.parametrize("name", ["recipe.yaml", "method.json", "rows.jsonl"])
def test_any_content_is_read_in_bounded_memory(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(CONTENTS[content])
    tracemalloc.start()
    with pytest.raises(FoveateError):
        READERS[name](path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("reader", READERS.values())
@pytest.mark.parametrize("name", ["missing", "a\0b", "x" * 5000, "a\nb", ""])
def test_names_that_no_file_has_are_one_short_line(reader, name, tmp_path):
    with pytest.raises(InputError) as found:
        reader(tmp_path / (name + ".json" if name else name))
    assert len(str(found.value)) <= LONGEST
    assert str(found.value).isprintable()


def test_only_newlines_end_a_line(tmp_path):
    said = "a\u2028b\x0bc\x85d\x1ce\u2029f"
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "x"}]}
    path = tmp_path / "rows.jsonl"
    line = json.dumps(row, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\n{line}\n".encode())
    rows = Conversations(path)
    assert [example.messages[0].text for example in rows] == [said, said]
    assert rows[1].where.endswith("line 3")
    assert [number for number, _ in read_lines(path)] == [1, 3]


def test_small_anchors_still_serve():
    text = "base: &b {layer: 3}\nmore: {<<: *b, keep: 0.5}\nlist: [*b, *b]\n"
    assert parse_yaml(text)["more"] == {"layer": 3, "keep": 0.5}
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


GOOD = {"model": "tiny", "out": "runs", "data": {"scenes": 4}}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "a\0b"}, {"model": {"a": 1}}, {"model": "x" * 5000, "out": ["y" * 5000]},
        {"out": "a\0"}, {"data": {"scenes": 2.0}}, {"data": {"scenes": True}},
        {"data": {"scenes": 10**5000}}, {"data": {"scenes": float("inf")}},
        {"data": {"scenes": 1, "seed": 1.5}}, {"data": {"scenes": 1, "turns": "4"}},
        {"data": {"file": "a\0b"}}, {"data": {"x" * 5000: 1}}, {"freeze": {"a": 1}},
        {"freeze": ["x" * 5000, 3]}, {"dtype": []}, {"dtype": "x" * 5000}, {"x" * 5000: 1},
        {"method": 3}, {"method": []}, {"method": [["fastv"]]}, {"method": ["fastv", 3]},
        {"method": {"name": "fastv", "layer": 2.0}}, {"method": {"name": "fastv", "layer": {}}},
        {"method": {"name": "fastv", "keep": float("nan")}}, {"method": "x" * 5000},
        {"method": {"name": "fastv", "x" * 5000: 1}}, {"method": {"name": "fastv", "layer": -1}},
        {"trainer": {"learning_rate": "1e-4"}}, {"trainer": {"learning_rate": float("nan")}},
        {"trainer": {"num_train_epochs": []}}, {"trainer": {"save_steps": {"a": 1}}},
        {"trainer": {"x" * 5000: 1}}, {"lora": {"r": "x" * 5000}}, {"lora": {"lora_alpha": 1.5}},
    ],
)  # fmt: skip
def test_recipes_of_wrong_values_are_one_short_line(change):
    with pytest.raises(FoveateError) as found:
        parse_recipe({**GOOD, **change})
    assert len(str(found.value)) <= LONGEST - 40  # the file's name goes before it
    assert str(found.value).isprintable()


def test_recipes_take_several_methods():
    given = ["visionzip", {"name": "pyramiddrop", "layers": [2], "keep": [0.5]}]
    recipe = parse_recipe({**GOOD, "method": given})
    assert recipe.method == (VisionZip(), PyramidDrop((2,), (0.5,)))
    assert [entry["method"] for entry in recipe.to_dict()["method"]] == ["visionzip", "pyramiddrop"]
    assert parse_recipe({**GOOD, "method": {"name": "fastv", "keep": "0.25"}}).method == FastV(
        keep=0.25
    )


@pytest.mark.parametrize("fields", [{"scenes": -1}, {"turns": 0}, {"seed": 1.5}, {"file": 3}])
def test_recipes_made_in_python_are_checked_too(fields, tmp_path):
    with pytest.raises(InputError, match=f"{next(iter(fields))} must be"):
        Data(**fields)
    with pytest.raises(InputError, match="model must be a string"):
        Recipe(model=3, out=tmp_path, data=Data(scenes=1))


ROW = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}


@pytest.mark.parametrize(
    "row",
    [
        {**ROW, "images": [3]}, {**ROW, "images": {"a": 1}}, {**ROW, "images": ["a\0b"]},
        {**ROW, "images": ["x" * 5000]}, {**ROW, "image": True}, {"messages": {"a": 1}},
        {"messages": ["x" * 5000]}, {"messages": [{"role": ["user"], "content": "?"}]},
        {"messages": [{"role": "x" * 5000, "content": "?"}]}, {"x" * 5000: 1},
        {"messages": [{"role": "user", "content": {"a": "x" * 5000}}]},
        {"messages": [{"role": "user", "content": [{"type": ["image"]}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": [3]}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
    ],
)  # fmt: skip
def test_rows_of_wrong_values_are_one_short_line(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match="line 1") as found:
        Conversations(path)
    assert len(str(found.value)) <= LONGEST
    assert str(found.value).isprintable()
