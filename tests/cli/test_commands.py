"""The commands do what the library does, and fail in one line."""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, LlamaConfig, LlavaConfig, SiglipVisionConfig

import foveate
from foveate import tiny
from foveate.bench.outcome import Outcome
from foveate.bench.runner import Runner
from foveate.cli.inputs import encode, load_image
from foveate.core.saving import Saved
from foveate.families import unsupported_families
from foveate.families.support import Matrix, support
from foveate.methods import DivPrune, FastV, PyramidDrop
from tests.cli.calling import call


@pytest.fixture(scope="module")
def embedded():
    return tiny.load()


@pytest.fixture
def photo(tmp_path):
    """A wide image with smooth colours, stored as JPEG."""
    path = tmp_path / "photo.jpg"
    coarse = torch.randint(0, 255, (4, 6, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(coarse.to(torch.uint8).numpy())
    picture.resize((200, 120), Image.Resampling.BICUBIC).save(path)
    return str(path)


def expected(embedded, paths, question, method):
    """What the library gives for the same question."""
    model, processor = embedded
    inputs = encode(processor, [load_image(path) for path in paths], question, model)
    with foveate.use(model, method) as session:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip(), session


@pytest.mark.parametrize("pictures", [1, 2])
def test_run_gives_what_the_library_gives(embedded, scene, photo, question, pictures, tmp_path):
    paths = [scene, photo][:pictures]
    saved = tmp_path / "out.json"
    options = ["--method", "fastv", "--keep", "0.25", "--set", "layer=3", "--max-new-tokens", "4"]
    result = call("run", "tiny", *paths, question, *options, "--json", str(saved))
    assert result.exit_code == 0, result.output
    answer, session = expected(embedded, paths, question, FastV(layer=3, keep=0.25))
    data = json.loads(saved.read_text())
    assert data.pop("question") == question
    assert data.pop("answer") == answer
    assert data == session.report()
    assert len(data["images"]) == pictures
    assert answer in result.stdout
    assert "from layer 3 on" in result.stdout


def test_run_keeps_to_a_total(scene, photo, question, tmp_path):
    saved = tmp_path / "out.json"
    line = ["run", "tiny", scene, photo, question, "--max-new-tokens", "1", "--keep-total", "50"]
    result = call(*line, "--method", "divprune", "--json", str(saved))
    assert result.exit_code == 0, result.output
    data = json.loads(saved.read_text())
    assert [image["after"]["pre_llm"] for image in data["images"]] == [25, 25]
    assert data["keep_total"] == [{"limit": 50, "visual_tokens": 50, "of_earlier_turns": 0}]
    assert "at most 50 visual tokens" in " ".join(result.stdout.split())
    refused = call(*line, "--method", "fastv")
    assert refused.exit_code == 2
    assert "fastv does not act" in " ".join(refused.output.split())


def test_run_keeps_to_the_total_of_a_file(scene, photo, question, tmp_path):
    """Unless the command has another; what a file says of audio is refused."""
    saved, path = tmp_path / "out.json", str(Saved((DivPrune(),), keep_total=40).write(tmp_path))
    line = ["run", "tiny", scene, photo, question, "--max-new-tokens", "1", "-m", path]
    for more, total in (([], 40), (["--keep-total", "30"], 30)):
        result = call(*line, *more, "--json", str(saved))
        assert result.exit_code == 0, result.output
        assert json.loads(saved.read_text())["keep_total"][0]["visual_tokens"] == total
    Saved((DivPrune(),), audio=True).write(tmp_path)
    for command in (
        line, ["serve", "tiny", "-m", path], ["flops", "tiny", "-m", path],
        ["batch", "q.jsonl", str(tmp_path / "o"), "--model", "tiny", "-m", path],
    ):  # fmt: skip
        refused = call(*command)
        assert refused.exit_code == 2
        assert "commands give a model images and videos alone" in one_line(refused)


def one_line(result):
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["bench"], "budgets of --keep, which are for each image"),
        (["bench", "--speed"], "--tokens and --keep say how many visual tokens a prompt has"),
        (["tune", "tiny", "q.jsonl"], "budgets are for each image"),
        (["calibrate", "tiny", "q.jsonl"], "vflowopt decides by itself how many"),
        (["train", "c.yaml"], "a training step reads all turns at once"),
        (["demo"], "about one image"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_without_a_total_say_why(command, why, tmp_path):
    result = call(*command, "--keep-total", "90")
    assert result.exit_code == 2
    assert "has no --keep-total: " in one_line(result)
    assert why in one_line(result)
    assert "No such option: --keep-totl" in one_line(call(*command, "--keep-totl", "90"))


@pytest.mark.parametrize("name", ["run", "serve", "batch", "bench", "tune", "train", "flops"])
def test_commands_take_no_audio(name):
    assert f"foveate {name} has no --audio: commands give a" in one_line(call(name, "--audio"))


@pytest.mark.parametrize("name", ["run", "serve", "batch", "flops"])
def test_help_says_what_a_total_is(name):
    shown = one_line(call(name, "--help", columns=200))
    assert "--keep-total" in shown
    assert "all shrink alike" in shown.replace("│ │ ", "")


def test_sound_is_refused(question):
    result = call("run", "tiny", "clip.WAV", question, "-m", "divprune")
    assert result.exit_code == 2
    assert "clip.WAV is sound, but commands give a model images and videos" in one_line(result)


@pytest.mark.parametrize("key", ["keep_total: 90", "audio: true"])
def test_files_of_commands_say_why_they_have_no_total_and_no_audio(key, tmp_path):
    name = key.partition(":")[0]
    path = tmp_path / "file.yaml"
    path.write_text(key)
    told = one_line(call("bench", "--config", str(path)))
    assert f"cannot set {name}: " in told
    path.write_text(f"{key}\nmodel: tiny")
    assert f"the recipe cannot set {name}: " in one_line(call("train", str(path)))
    recipe = f"model: tiny\nout: o\ndata: {{scenes: 2}}\nmethod: {{name: divprune, {key}}}"
    path.write_text(recipe)
    assert f"method cannot set {name}: " in one_line(call("train", str(path)))


def test_run_draws_what_was_kept(embedded, scene, photo, question, tmp_path):
    from foveate.report.panels import stack

    drawn = tmp_path / "kept.png"
    result = call(
        "run", "tiny", scene, photo, question, "-m", "pyramiddrop", "--show", str(drawn),
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert str(drawn) in result.stdout.replace("\n", "")
    _, session = expected(embedded, [scene, photo], question, PyramidDrop())
    want = stack(session.show([load_image(scene), load_image(photo)]))
    assert Image.open(drawn).convert("RGB").tobytes() == want.tobytes()


def test_run_compares_with_all_tokens(embedded, scene, question, tmp_path):
    saved = tmp_path / "out.json"
    result = call(
        "run", "tiny", scene, question, "--method", "pyramiddrop", "--compare", "--repeats", "2",
        "--max-new-tokens", "4", "--json", str(saved),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answer, session = expected(embedded, [scene], question, PyramidDrop())
    whole, _ = expected(embedded, [scene], question, FastV(layer=1, keep=1.0))
    compared = json.loads(saved.read_text())["comparison"]
    assert compared["answers"] == {"all tokens": whole, "pyramiddrop": answer}
    assert compared["ttft"]["pyramiddrop"]["repeats"] == 2
    kept = list(session.kept[0].values())
    for words in ("time to first token", "KV cache", "prefill", *(str(len(k)) for k in kept)):
        assert words in result.stdout


def test_commands_leave_no_progress_in_pipes(scene, question):
    result = call("run", "tiny", scene, question, "-m", "fastv", "--max-new-tokens", "2")
    assert result.stderr == ""
    assert "\x1b" not in result.stdout


def test_prompt_without_a_chat_template(embedded, scene):
    model, _ = embedded
    processor = AutoProcessor.from_pretrained(tiny.PATH)
    processor.chat_template = None
    inputs = encode(processor, [load_image(scene)] * 2, "what is red ?", model)
    vision = model.config.vision_config
    visual = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert visual == 2 * (vision.image_size // vision.patch_size) ** 2
    assert len(inputs["pixel_values"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "SCENE", "why ?", "-m", "fastvee"], ["unknown method 'fastvee'", "fastv"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--keep", "1.5"], ["(0, 1]", "1.5"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--keep", "most"], ["keep", "'most'"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--set", "depth=1"], ["'depth'", "layer=None"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--set", "layer=x"], ["layer=x", "int"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--set", "layer=99"], ["99"]),
        (["tiny", "none.png", "why ?", "-m", "fastv"], ["no such image file", "none.png"]),
        (["tiny", "TEXT", "why ?", "-m", "fastv"], ["cannot read", "notes.txt"]),
        (["tiny", "FOLDER", "why ?", "-m", "fastv"], ["a folder without images"]),
        (["tiny", "why ?", "-m", "fastv"], ["at least one image or video", "'why ?'"]),
        (["FOLDER", "SCENE", "why ?", "-m", "fastv"], ["no config.json"]),
        (["./no/model", "SCENE", "why ?", "-m", "fastv"], ["no such folder", "./no/model"]),
        (["a/b/c", "SCENE", "why ?", "-m", "fastv"], ["no such folder"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--device", "toaster"], ["toaster"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--dtype", "int3"], ["dtype", "bfloat16"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--show", "no/x.png"], ["no folder no"]),
        (["tiny", "SCENE", "why ?", "-m", "fastv", "--show", "kept"], ["cannot save kept", ".png"]),
    ],
)
def test_errors_are_one_line_and_code_2(arguments, words, scene, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    folder = tmp_path / "empty"
    folder.mkdir()
    names = {"SCENE": scene, "TEXT": str(notes), "FOLDER": str(folder)}
    result = call("run", *(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_unreachable_hub_is_explained(monkeypatch, scene):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    result = call("run", "some/model", scene, "why ?", "-m", "fastv")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "neither a folder here nor a hub model that can be reached (We couldn't" in line


def test_broken_torchvision_is_explained(monkeypatch, scene):
    def broken(*args, **kwargs):
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'LlavaProcessor'.") from error

    monkeypatch.setattr(AutoProcessor, "from_pretrained", broken)
    result = call("run", "tiny", scene, "why ?", "-m", "fastv")
    assert result.exit_code == 2
    assert "pip uninstall torchvision" in result.stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_list_is_one_line_for_each_method(columns):
    lines = call("list", columns=columns).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    rows = {line.split()[0]: line for line in lines[1:]}
    assert sorted(rows) == foveate.list_methods()
    for name, row in rows.items():
        cls = foveate.get_method(name)
        assert f" {cls.stage} " in row
        assert cls.does in row
        assert 2 <= len(cls.does.split()) <= 6
        assert set(re.findall(r"\d{4}\.\d{5}", cls.paper)) <= set(row.split())


def test_verbose_list_adds_signals_and_titles():
    told = " ".join(call("list", "--verbose").stdout.split())
    assert "reads encoder_keys Token Merging: Your ViT But Faster, Bolya et al. 2023" in told


def test_listings_as_json(tmp_path):
    saved = tmp_path / "list.json"
    assert call("list", "--json", str(saved)).exit_code == 0
    data = {entry["method"]: entry for entry in json.loads(saved.read_text())}
    assert list(data["fastv"]) == ["method", "stage", "does", "needs", "paper", "title"]
    assert sorted(data) == foveate.list_methods()
    printed = json.loads(call("list", "--families", "--json", "-").stdout)
    assert printed == {"supported": support(), "unsupported": unsupported_families()}
    judged = json.loads(call("list", "--model", "tiny", "--json", "-").stdout)
    works = [name for names in judged["works"].values() for name in names]
    assert sorted([*works, *judged["refused"]]) == foveate.list_methods()


def test_listings_of_two_kinds_at_once_are_refused():
    assert "give one of them" in call("list", "--families", "--model", "tiny").stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_list_families_groups_by_reason(columns):
    lines = call("list", "--families", columns=columns).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    told = " ".join(" ".join(lines).split())
    assert all(f" {family}" in told for family in [*foveate.list_families()])
    assert all(family in told for family in unsupported_families())
    (row,) = [line for line in lines if line.startswith("needs class-token attention ")]
    refused = {
        family
        for of in support().values()
        for family, entry in of.items()
        if "needs class-token attention" in str(entry)
    }
    assert row.split()[-1] == str(len(refused))
    assert len(lines) < 130


def test_verbose_list_of_families_has_every_cell():
    """A row for each family, the notes that its numbers stand for, and what is refused."""
    lines = call("list", "--families", "--verbose").stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:1] == " " and line.strip()}
    families = foveate.list_families()
    assert list(rows)[-len(families) :] == families
    letters = {
        line[0]: line[2:].split(", ") for line in lines if line[1:2] == " " and line[0].isupper()
    }
    assert sorted(name for names in letters.values() for name in names) == foveate.list_methods()
    assert list(letters) == rows["family"]
    matrix = Matrix.of(support(), foveate.list_methods())
    for model_type, marks in matrix.rows.items():
        assert ("✓" in rows[model_type]) == any(works for works, _ in marks)
    numbers = {mark for family in families for mark in rows[family]} - {"✓"}
    notes = dict(line.split(" ", 1) for line in lines if line[:1].isdigit())
    assert set(notes) == numbers
    assert sorted(notes.values()) == sorted(matrix.notes)
    ends = [line.split(" is not supported: ") for line in lines if " is not supported: " in line]
    assert dict(ends) == unsupported_families()


def test_list_families_does_without_ticks_where_they_cannot_be_printed(monkeypatch):
    monkeypatch.setattr("rich.console.Console.encoding", "cp1252")
    output = call("list", "--families", "--verbose").stdout
    assert "✓" not in output
    assert any(line.replace("|", " ").split()[1:2] == ["yes"] for line in output.splitlines())


def test_list_says_what_works():
    result = call("list", "--model", "tiny", columns=80)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    works, refused = result.stdout.split("methods that do not, and why")
    assert "pyramiddrop" in works
    assert "dtop, hot, stvit: each is for encoders alone, but this" in refused


def test_list_says_what_does_not_work_and_why(tmp_path):
    """A SigLIP tower has no class token. Only a config is there: no weights are read."""
    text = LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=9)
    vision = SiglipVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    LlavaConfig(vision_config=vision, text_config=text).save_pretrained(tmp_path)
    result = call("list", "--model", str(tmp_path))
    assert result.exit_code == 0, result.output
    works, refused = result.stdout.split("methods that do not, and why")
    assert "pyramiddrop" in works
    lines = [line for line in refused.splitlines() if "needs class-token attention" in line]
    assert len(lines) == 1  # the methods of one reason stand together
    assert {"fastervlm", "vtc-cls"} <= set(re.findall(r"[\w-]+", lines[0]))
    for name in foveate.list_methods():
        names = re.findall(r"[\w-]+", works), re.findall(r"[\w-]+", refused)
        assert (name in names[0]) != (name in names[1])


def test_list_refuses_a_text_model(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    result = call("list", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "as a vision-language model" in result.stderr


def test_demo_shows_both_answers_and_saves_the_image(tmp_path):
    out = tmp_path / "kept.png"
    result = call("demo", "--repeats", "1", "--quick", "--out", str(out))
    assert result.exit_code == 0, result.output
    for words in ("true answer", "all tokens", "pyramiddrop", "KV cache", "prefill", "median"):
        assert words in result.stdout
    assert Image.open(out).width > 1000
    assert str(out) in result.stdout.replace("\n", "")


def test_methods_compose_in_stream_order(embedded, scene, question, tmp_path):
    given = ["-m", "fastv", "--keep", "16", "-m", "divprune", "--keep", "0.5"]
    found = call("run", "tiny", scene, question, *given, "--json", str(tmp_path / "out.json"))
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert [method["method"] for method in report["methods"]] == ["divprune", "fastv"]
    assert report["images"][0]["after"] == {"pre_llm": 128, "llm:2": 16}


def test_composed_methods_are_compared_counted_and_shown(scene, question, tmp_path):
    both = ["-m", "divprune", "-m", "fastv", "--set", "fastv.layer=3", "--set", "divprune.keep=64"]
    found = call("run", "tiny", scene, question, *both, "--compare", "--repeats", "1")
    assert "divprune + fastv" in found.output
    found = call("flops", "tiny", *both, "--json", str(tmp_path / "f.json"))
    assert "divprune + fastv" in found.output
    counted = json.loads((tmp_path / "f.json").read_text())
    assert [method["method"] for method in counted["method"]] == ["divprune", "fastv"]
    assert counted["visual_tokens"][0] == 64
    found = call("demo", *both[:4], "--quick", "--repeats", "1", "--out", str(tmp_path / "d.png"))
    assert "divprune + fastv" in found.output


def test_methods_that_remove_nothing_say_so(scene, question):
    for given in (["run", "tiny", scene, question], ["flops", "tiny"]):
        told = " ".join(call(*given, "-m", "evs").output.split())
        assert "evs removed nothing: it compares the frames of a video" in told
        assert "100.0%" in told
    given = ["-m", "divprune", "-m", "fastv", "--keep", "0.25", "--keep", "64"]
    told = " ".join(call("run", "tiny", scene, question, *given).output.split())
    assert "fastv removed nothing: its keep=64" in told
    assert "divprune removed nothing" not in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--keep", "0.5", "--keep", "0.25"],
        ["bench", "--methods", "fastv", "--methods", "divprune"],
        ["run", "tiny", "a.png", "?", "-m", "fastv", "--device", "cpu", "--device", "cuda"],
        ["bench", "--speed", "--tokens", "1", "--tokens", "2"],
    ],
)
def test_an_option_of_which_only_the_last_would_count_is_refused(arguments):
    found = call(*arguments)
    assert found.exit_code == 2
    assert "is given twice" in " ".join(found.output.split())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tasks", "coco", "--data", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["--tasks", "counting", "--data", "/no/such/folder"], "there is no folder"),
        (["--tasks", "all", "--data", "/no/such/folder"], "there is no folder"),
        (["--tasks", "counting", "--data", "x" * 5000], "there is no folder"),
        (["--tasks", "coco"], "name its folder as data"),
        (["--tasks", "coco,counting", "--data", "."], "is missing"),
        (["--tasks", ","], "unknown task"),
        (["--tasks", "x" * 5000], "unknown task"),
        (["--methods", ","], "names by commas"),
        (["--methods", "x" * 5000], "unknown method"),
        (["--keep", "x" * 5000], "takes shares"),
        (["--keep", "nan"], "takes shares"),
        (["--minutes", "-1"], "--minutes takes a positive number"),
        (["--minutes", "nan"], "--minutes takes a positive number"),
        (["--split", "x" * 5000], "--split must be one of"),
    ],
)
def test_a_bench_that_could_do_nothing_is_refused_first(arguments, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.cli.bench.load_model", None)
    found = call("bench", "--out", str(tmp_path / "out"), *arguments)
    assert found.exit_code == 2
    assert reason in " ".join(found.output.split())
    assert len(found.output) <= 320
    assert not (tmp_path / "out").exists()


def test_a_bench_of_which_no_cell_runs_is_an_error(tmp_path, monkeypatch):
    refused = Outcome(status="refused", error="no such thing here")
    monkeypatch.setattr(Runner, "run", lambda self, cell: refused)
    given = ["--tasks", "counting", "--methods", "fastv", "--samples", "1", "--workers", "1"]
    found = call("bench", *given, "--no-timing", "--out", str(tmp_path))
    assert found.exit_code == 2
    assert "no cell could be run; the first error: no such thing here" in found.output
    assert (tmp_path / "report.html").exists()
