"""`foveate tune`, as a user calls it, on the embedded model."""

import json
import shutil

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate import tiny
from foveate.calibration.search import last_state
from foveate.cli import app
from foveate.core.from_text import make_methods
from foveate.core.resolve import methods_of
from foveate.families import find_family
from foveate.training.prepare import session_of
from foveate.tune.asking import Asker
from foveate.tune.data import Split, read_rows


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
    asked, ask = [], Asker.ask

    def noted(self, methods, numbers):
        asked.append(tuple(numbers))
        return ask(self, methods, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asker, "ask", noted)
        done = tune(questions, *options, "--out", out, "--first", 6, "--max-new-tokens", 3)
    assert done.exit_code == 0, done.output
    return out, done.stdout, [questions, *options], asked


def test_the_recipe_is_taken_by_all(tuned, questions, tmp_path):
    out, printed, _, _ = tuned
    path = out / "foveate.json"
    assert str(path) in " ".join(printed.split())
    model, _ = tiny.load()
    recipe = methods_of(str(path))
    assert foveate.use(model, str(path)).methods == recipe
    image = questions.with_name("0.png")
    ran = CliRunner().invoke(app, ["run", "tiny", str(image), "what?", "--method", str(path)])
    assert ran.exit_code == 0, ran.output
    assert make_methods([str(path)]) == recipe  # what `serve` and `batch` make of --method
    beside = tmp_path / "model"
    shutil.copytree(tiny.PATH, beside)
    shutil.copyfile(path, beside / path.name)
    assert session_of(foveate.load(beside)).methods == recipe


def test_the_report_says_what_was_measured(tuned, questions):
    out, _, _, _ = tuned
    report = json.loads((out / "report.json").read_text())
    (chosen,) = [c for c in report["candidates"] if c["trial"] == report["chosen"]]
    assert methods_of(chosen["methods"]) == methods_of(str(out / "foveate.json"))
    assert chosen["search"]["costs"]["flops"] <= 0.3
    low, high = chosen["held_out"]["interval"]
    assert low - 1e-9 <= chosen["held_out"]["quality"] <= high + 1e-9
    counts = report["questions"]
    assert counts["search"] + counts["held_out"] == len(read_rows(questions))
    assert chosen["held_out"]["asked"] == counts["held_out"]
    assert chosen["recipe"] in (out / "report.html").read_text()


def test_held_out_questions_come_last(tuned, questions):
    *_, asked = tuned
    split = Split.of(read_rows(questions), 0.4, seed=0)
    held = [set(numbers) == set(split.held_out) for numbers in asked]
    first = held.index(True)
    assert all(held[first:])
    assert not {n for numbers in asked[:first] for n in numbers} & set(split.held_out)


def test_called_again_it_asks_nothing_anew(tuned, monkeypatch):
    out, _, options, _ = tuned
    before = (out / "foveate.json").read_bytes(), (out / "asked.jsonl").read_bytes()
    monkeypatch.setattr(Asker, "ask", lambda *a: pytest.fail("asked anew"))
    done = tune(*options, "--out", out, "--first", 6, "--max-new-tokens", 3)
    assert done.exit_code == 0, done.output
    assert before == ((out / "foveate.json").read_bytes(), (out / "asked.jsonl").read_bytes())


def test_a_policy_is_fitted_to_what_was_asked(tuned, questions, tmp_path, monkeypatch):
    """Afterwards as well: it asks held-out questions alone."""
    out, _, options, _ = tuned
    again, asked, ask = tmp_path / "again", [], Asker.ask
    shutil.copytree(out, again)

    def noted(self, methods, numbers):
        asked.extend(numbers)
        return ask(self, methods, numbers)

    monkeypatch.setattr(Asker, "ask", noted)
    more = ["--out", again, "--first", 6, "--max-new-tokens", 3, "--adaptive", 0.5]
    done = tune(*options, *more)
    assert done.exit_code == 0, done.output
    assert set(asked) <= set(Split.of(read_rows(questions), 0.4, seed=0).held_out)
    assert (out / "foveate.json").read_bytes() == (again / "foveate.json").read_bytes()
    report = json.loads((again / "report.json").read_text())["adaptive"]
    low, gain, high = (report["gain_over_fixed"][n] for n in (1, 0, 2))
    assert low <= gain <= high
    assert gain == pytest.approx(100 * (report["quality"] - report["fixed_quality"]))
    policy = foveate.adaptive(again / "policy.json")
    assert sum(report["chosen"]) == report["asked"]
    assert len(report["chosen"]) == len(policy.options)
    image = questions.with_name("0.png")
    words = ["tiny", str(image), "what?", "--adaptive", str(again / "policy.json")]
    ran = CliRunner().invoke(app, ["run", *words, "--json", str(tmp_path / "said.json")])
    assert ran.exit_code == 0, ran.output
    said = json.loads((tmp_path / "said.json").read_text())["methods"]
    chosen = policy.choose("what?", [Image.open(image)])
    assert [method["method"] for method in said] == [method.slug for method in chosen]
    for wrong in (["--method", "fastv"], ["--keep", "0.5"]):
        refused = CliRunner().invoke(app, ["run", *words, *wrong])
        assert refused.exit_code == 2


def test_a_policy_below_every_recipe_is_refused_and_the_recipe_kept(tuned, tmp_path):
    out, _, options, _ = tuned
    again = tmp_path / "again"
    shutil.copytree(out, again)
    more = ["--out", again, "--first", 6, "--max-new-tokens", 3, "--adaptive", 0.01]
    done = tune(*options, *more)
    assert done.exit_code == 2
    assert "takes 0.01x of the FLOPs or less" in done.stderr
    assert (again / "foveate.json").exists()
    assert not (again / "policy.json").exists()


def test_replies_are_those_of_a_plain_run(questions):
    model, processor = tiny.load()
    rows = read_rows(questions)[:6]
    asker = Asker(model, processor, rows, batch=4, max_new_tokens=3)
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


def test_all_tokens_are_asked_once_for_each_question(questions, monkeypatch):
    """However the questions are put together later."""
    model, processor = tiny.load()
    asker = Asker(model, processor, read_rows(questions)[:6], batch=4, max_new_tokens=2)
    asked, generate = [], Asker._generate

    def noted(self, methods, inputs, numbers):
        asked.append((methods[0].slug, *numbers))
        return generate(self, methods, inputs, numbers)

    monkeypatch.setattr(Asker, "_generate", noted)
    whole = asker.ask(methods_of("fastv"), range(6))
    parts = [asker.ask(methods_of("fastv"), numbers) for numbers in ((1, 3), (5,))]
    everything = [("uniform", 0, 1, 2, 3), ("uniform", 4, 5)]
    assert [one for one in asked if one[0] == "uniform"] == everything
    assert [r for part in parts for r in part.agrees] == [whole.agrees[n] for n in (1, 3, 5)]
    wanted = [whole.kl[n] for n in (1, 3, 5)]
    assert [k for part in parts for k in part.kl] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "flops<=2x"], "flops lies from 0 to 1"),
        (["--target", "flops<=0.5x", "--methods", "fastvv"], "did you mean"),
        (["--target", "flops<=0.5x", "--held-out", "1.5"], "--held-out must be in (0, 1)"),
        (["--target", "flops<=0.5x", "--adaptive", "1.5"], "--adaptive must be in (0, 1]"),
        ([], "nothing to save"),
    ],
)
def test_wrong_options_are_one_line(questions, tmp_path, options, said):
    done = tune(questions, *options, "--out", tmp_path / "out")
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert said in line


def test_states_can_be_the_objective(questions, tmp_path):
    """What VFlowOpt's calibration maximises, on questions whose answers do not count."""
    options = ["--target", "flops<=0.5x", "--methods", "vflowopt", "--objective", "state"]
    done = tune(questions, *options, "--trials", 3, "--out", tmp_path, "--first", 6)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    (chosen,) = [c for c in report["candidates"] if c["trial"] == report["chosen"]]
    assert chosen["methods"][0]["method"] == "vflowopt"
    assert report["unpruned"]["search"] == pytest.approx(1.0)
    full = [c["search"] for c in report["candidates"] if not c["why_out"]]
    assert chosen["search"]["quality"] == max(score["quality"] for score in full)
    model, processor = tiny.load()
    asker = Asker(model, processor, read_rows(questions)[:3], states=True)
    replies = asker.ask(methods_of(chosen["methods"]), range(3))
    family = find_family(model)
    states = [last_state(family, asker.inputs(range(3)))]
    with foveate.use(model, methods_of(chosen["methods"])):
        states.append(last_state(family, asker.inputs(range(3))))
    wanted = torch.nn.functional.cosine_similarity(*states, dim=1)
    assert replies.state == pytest.approx(wanted.tolist(), abs=1e-5)
    assert min(replies.state) < 0.999
