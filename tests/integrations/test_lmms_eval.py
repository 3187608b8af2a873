"""lmms-eval runs its tasks on foveate's models.

What needs the package runs where it is installed (`scripts/lmms_eval.sh`); elsewhere the few
classes that the adapter uses are stood in for.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest

from foveate import tiny
from foveate.errors import FoveateError, InputError
from foveate.integrations.chat import ChatModel
from foveate.methods import Random

MODULE = "foveate.integrations.lmms_eval"
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="lmms-eval: see scripts/lmms_eval.sh")
Request = namedtuple("Request", "args")
SETTINGS = {"max_new_tokens": 3}


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module, on the package or on what stands in for it."""
    if not INSTALLED:
        names = {
            "lmms_eval.api.instance": ("GenerationResult", "TokenCounts"),
            "lmms_eval.models.registry_v2": ("ModelManifest",),
            "lmms_eval.api.model": (),
        }
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *names):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for name, classes in names.items():
            for kind in classes:
                setattr(sys.modules[name], kind, types.SimpleNamespace)
        base = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
        sys.modules["lmms_eval.api.model"].lmms = base
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE)
        sys.modules.pop(MODULE, None)
    else:
        yield importlib.import_module(MODULE)


@pytest.fixture(scope="module")
def scenes():
    return [tiny.draw_scene(seed) for seed in range(20, 25)]


@pytest.fixture
def documents(scenes):
    return [{"image": s.image, "question": s.questions[0].text} for s in scenes]


def model(adapter, kind, documents, **given):
    made = getattr(adapter, kind)("tiny", device="cpu", **given)
    made.task_dict["task"] = {"test": documents}
    return made


def want(documents, method=None):
    chat = ChatModel(*tiny.load(), method)
    turns = [{"type": "image", "image": d["image"]} for d in documents]
    return [
        chat.answer(
            [[{"role": "user", "content": [turn, {"type": "text", "text": d["question"]}]}]],
            **SETTINGS,
        )[0]
        for turn, d in zip(turns, documents, strict=True)
    ]


def messages(document):
    parts = [
        {"type": "image", "url": document["image"]},
        {"type": "text", "text": document["question"]},
    ]
    return [{"role": "user", "content": parts}]


def visual(document):
    return [document["image"]]


def test_the_entry_point_names_both_classes(adapter):
    found = adapter.manifest()
    assert found.model_id == "foveate"
    for path, simple in ((found.simple_class_path, True), (found.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        assert module == MODULE
        assert getattr(adapter, name).is_simple is simple


@pytest.mark.parametrize("size", [1, 2, "8"])
def test_chat_requests_are_answered_in_order(adapter, documents, size):
    made = model(
        adapter, "FoveateChat", documents, method="random", keep=0.3, seed=4, batch_size=size
    )
    requests = [
        Request(("", messages, dict(SETTINGS), number, "task", "test"))
        for number in range(len(documents))
    ]
    got = made.generate_until(requests)
    assert [(a.text, a.token_counts.output_tokens) for a in got] == want(
        documents, Random(keep=0.3, seed=4)
    )


def test_simple_requests_are_answered_in_order(adapter, documents):
    made = model(adapter, "FoveateSimple", documents, batch_size=3)
    settings = [dict(SETTINGS), dict(SETTINGS), {"max_new_tokens": 1}, *[dict(SETTINGS)] * 2]
    requests = [
        Request((d["question"], s, visual, number, "task", "test"))
        for number, (d, s) in enumerate(zip(documents, settings, strict=True))
    ]
    got = [answer.text for answer in made.generate_until(requests)]
    known = [text for text, _ in want(documents)]
    assert [*got[:2], *got[3:]] == [*known[:2], *known[3:]]


def test_likelihoods_prefer_what_is_answered(adapter, documents):
    made = model(adapter, "FoveateSimple", documents)
    answer = want(documents)[0][0].split()[0]
    request = documents[0]["question"], visual, 0, "task", "test"
    question, *rest = request
    pairs = [
        Request((question, f" {answer}", *rest)),
        Request((question, lambda document: " star", *rest)),
        Request(("", " red")),
    ]
    (good, greedy), (bad, _), (alone, _) = [found.text for found in made.loglikelihood(pairs)]
    assert greedy
    assert 0 <= good < min(bad, alone)


@pytest.mark.parametrize("kind", ["FoveateChat", "FoveateSimple"])
def test_rounds_go_on_until_the_task_ends_them(adapter, documents, kind):
    seen = []

    def next_round(document, *, round_idx, previous_output, previous_round_info):
        seen.append((round_idx, list(previous_output), previous_round_info))
        last, state = round_idx == 2, f"state {round_idx}"
        if kind == "FoveateChat":
            return messages(document), last, previous_output, state
        return [document["image"]], document["question"], last, previous_output, state

    def ask(document, **given):
        return next_round(document, **given) if given else messages(document)

    made = model(adapter, kind, documents)
    if kind == "FoveateChat":
        request = Request(("", ask, dict(SETTINGS), 1, "task", "test"))
    else:
        request = Request(
            (documents[1]["question"], dict(SETTINGS), visual, next_round, 1, "task", "test")
        )
    answer = want(documents)[1][0]
    assert made.generate_until_multi_round([request]) == [[answer, answer]]
    assert seen == [(1, [answer], None), (2, [answer, answer], "state 1")]


def test_model_arguments_make_a_method(adapter):
    assert adapter.method_of(None) is adapter.method_of("none") is None
    made = adapter.method_of("pyramiddrop", "0.5/0.25/0.125", {"layers": "2/4/6"})
    assert made.keep == (0.5, 0.25, 0.125)
    assert made.layers == (2, 4, 6)
    assert adapter.method_of("fastv", 16, {"layer": 3}).keep == 16
    both = adapter.method_of("fastv+divprune", "0.25+64", {"fastv.layer": 3})
    assert [(method.slug, method.keep) for method in both] == [("divprune", 64), ("fastv", 0.25)]
    with pytest.raises(InputError, match="has no field"):
        adapter.method_of("fastv", None, {"nonsense": 2})
    with pytest.raises(InputError, match="without method=NAME: keep, layer"):
        adapter.method_of(None, 0.5, {"layer": 2})


def test_a_request_keeps_to_a_total(adapter, documents):
    made = model(adapter, "FoveateChat", documents, method="divprune", keep=64, keep_total=20)
    assert made.chat.session().plan.total == 20
    with pytest.raises(InputError, match="keep_total needs a method"):
        model(adapter, "FoveateChat", documents, keep_total=20)


def test_what_cannot_be_served_is_refused(adapter, monkeypatch):
    with pytest.raises(InputError, match="no audio"):
        adapter.to_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])
    with pytest.raises(InputError, match="whole files"):
        adapter.user_turn([{"path": "a.mp4", "video_start": 1}], "?")
    parts = adapter.user_turn(["a.PNG", "b.mp4"], "?")[0]["content"]
    assert [part["type"] for part in parts] == ["image", "video", "text"]
    with pytest.raises(InputError, match="batch_size"):
        adapter.FoveateChat("tiny", batch_size="auto")
    with pytest.raises(FoveateError, match="force_simple"):
        adapter.FoveateChat("tiny", device="cpu").loglikelihood([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FoveateError, match="one process"):
        adapter.FoveateChat("tiny")


def test_the_error_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(FoveateError, match=r"pip install 'foveate\[lmms-eval\]'"):
        importlib.import_module(MODULE)


# -- the program itself

TASK = """
task: {name}
dataset_path: {data}
test_split: train
output_type: {kind}
doc_to_visual: !function scenes.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
{more}
"""
GENERATE = """
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOOSE = """
doc_to_choice: "choices"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Twelve scenes as a local data set, asked openly and by choices."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data"
    data.mkdir()
    rows = []
    for seed in range(40, 52):
        scene = tiny.draw_scene(seed)
        question = next(q for q in scene.questions if q.answer.isalpha())
        scene.image.save(data / f"{seed}.png")
        choices = sorted({question.answer, "red", "star"})
        rows.append(
            {"file_name": f"{seed}.png", "question": question.text, "answer": question.answer,
             "choices": choices}
        )  # fmt: skip
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scenes.py").write_text(
        "def visual(document):\n    return [document['image'].convert('RGB')]\n"
    )
    for name, kind, more in (
        ("scenes_open", "generate_until", GENERATE),
        ("scenes_choice", "multiple_choice", CHOOSE),
    ):
        text = TASK.format(name=name, data=data, kind=kind, more=more)
        (folder / f"{name}.yaml").write_text(text)
    return folder, rows


def evaluate(folder, task, arguments, *extra):
    """Run lmms-eval, offline, and return its results for a task."""
    out = folder / "out" / task
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "foveate", "--model_args", arguments,
        "--tasks", task, "--include_path", str(folder), "--batch_size", "4", "--device", "cpu",
        "--output_path", str(out), *extra,
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        command,
        env={**os.environ, **offline},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = sorted(Path(out).rglob("*results.json"))
    assert found, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(found[-1].read_text())["results"][task]


@needs_lmms_eval
@pytest.mark.lmms_eval
@pytest.mark.parametrize("arguments", ["pretrained=tiny", "pretrained=tiny,method=random,keep=0.1"])
def test_lmms_eval_scores_what_the_model_answers(task_folder, arguments):
    folder, rows = task_folder
    result = evaluate(folder, "scenes_open", arguments)
    chat = ChatModel(*tiny.load(), Random(keep=0.1) if "random" in arguments else None)
    right = 0
    for row in rows:
        content = [
            {"type": "image", "image": str(folder / "data" / row["file_name"])},
            {"type": "text", "text": row["question"]},
        ]
        [(text, _)] = chat.answer([[{"role": "user", "content": content}]], max_new_tokens=3)
        right += text.strip() == row["answer"]
    assert result["exact_match,none"] == pytest.approx(right / len(rows))
    if "random" not in arguments:
        assert right > len(rows) / 2


@needs_lmms_eval
@pytest.mark.lmms_eval
def test_lmms_eval_compares_likelihoods(task_folder):
    folder, _ = task_folder
    result = evaluate(
        folder, "scenes_choice", "pretrained=tiny,method=fastv,layer=3,keep=0.5", "--force_simple"
    )
    assert result["acc,none"] > 0.6
