"""`foveate tune`, as a user calls it, on the embedded model."""

import json

import pytest
from typer.testing import CliRunner

import foveate
from foveate import tiny
from foveate.cli import app
from foveate.core.resolve import methods_of
from foveate.tune.asking import Asker
from foveate.tune.data import read_rows


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for n in range(24):
        scene = tiny.draw_scene(n)
        scene.image.save(folder / f"{n}.png")
        asked = scene.questions[0]
        lines.append({"image": f"{n}.png", "question": asked.text, "answer": asked.answer})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tune(*arguments):
    return CliRunner().invoke(app, ["tune", "tiny", *map(str, arguments)])


@pytest.fixture(scope="module")
def tuned(questions, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    options = ["--target", "flops<=0.3x", "--methods", "cls-drop,fastv", "--trials", 5]
    done = tune(questions, *options, "--out", out, "--first", 6, "--max-new-tokens", 3)
    assert done.exit_code == 0, done.output
    return out, done.stdout, [questions, *options]


def test_the_recipe_is_taken_by_all(tuned, questions):
    out, printed, _ = tuned
    path = out / "foveate.json"
    assert str(path) in " ".join(printed.split())
    model, _ = tiny.load()
    recipe = methods_of(str(path))
    assert foveate.use(model, str(path)).methods == recipe
    image = questions.with_name("0.png")
    ran = CliRunner().invoke(app, ["run", "tiny", str(image), "what?", "--method", str(path)])
    assert ran.exit_code == 0, ran.output


def test_the_report_says_what_was_measured(tuned, questions):
    out, _, _ = tuned
    report = json.loads((out / "report.json").read_text())
    (chosen,) = [c for c in report["candidates"] if c["trial"] == report["chosen"]]
    assert methods_of(chosen["methods"]) == methods_of(str(out / "foveate.json"))
    assert chosen["search"]["costs"]["flops"] <= 0.3
    low, high = chosen["held_out"]["interval"]
    assert low <= chosen["held_out"]["quality"] <= high
    counts = report["questions"]
    assert counts["search"] + counts["held_out"] == len(read_rows(questions))
    assert chosen["held_out"]["asked"] == counts["held_out"]


def test_called_again_it_asks_nothing_anew(tuned, monkeypatch):
    out, _, options = tuned
    before = (out / "foveate.json").read_bytes(), (out / "asked.jsonl").read_bytes()
    monkeypatch.setattr(Asker, "ask", lambda *a: pytest.fail("asked anew"))
    done = tune(*options, "--out", out, "--first", 6, "--max-new-tokens", 3)
    assert done.exit_code == 0, done.output
    assert before == ((out / "foveate.json").read_bytes(), (out / "asked.jsonl").read_bytes())


def test_replies_are_those_of_a_plain_run(questions):
    model, processor = tiny.load()
    rows = read_rows(questions)[:6]
    asker = Asker(model, processor, rows, batch=4, max_new_tokens=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asker, "_seen", lambda numbers: None)
        mine = asker.ask(methods_of("divprune", keep=0.05), range(6))
    unpruned = asker.ask((), range(6))
    right, agrees = [], []
    for number, row in enumerate(rows):
        inputs = asker.inputs([number])
        said = []
        for method in ("uniform", "divprune"):
            keep = 1.0 if method == "uniform" else 0.05
            with foveate.use(model, method, keep=keep):
                new = model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
            said.append(processor.decode(new, skip_special_tokens=True).strip())
        right.append([text == row.answer for text in said])
        agrees.append(said[0] == said[1])
    assert unpruned.right == tuple(first for first, _ in right)
    assert mine.right == tuple(second for _, second in right)
    assert mine.agrees == tuple(agrees)
    assert all(unpruned.agrees)
    assert max(unpruned.kl) == 0 < max(mine.kl)
    assert mine.before == unpruned.before == unpruned.after > mine.after


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "flops<=2x"], "flops lies from 0 to 1"),
        (["--target", "flops<=0.5x", "--methods", "fastvv"], "did you mean"),
        (["--target", "flops<=0.5x", "--held-out", "1.5"], "--held-out must be in (0, 1)"),
        ([], "nothing to save"),
    ],
)
def test_wrong_options_are_one_line(questions, tmp_path, options, said):
    done = tune(questions, *options, "--out", tmp_path / "out")
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert said in line
