"""`foveate calibrate` searches, goes on where it stopped, and saves what `run` reads."""

import json

import pytest

from foveate import tiny
from foveate.calibration.vflowopt import calibrate
from foveate.core.from_text import make_method
from foveate.errors import FoveateError, InputError
from foveate.methods.vflowopt import VFlowOpt
from tests.cli.calling import call
from tests.disks import fill, mounted


@pytest.fixture
def prompts(tmp_path):
    """A file of two prompts, with images beside it."""
    lines = []
    for seed in range(2):
        scene = tiny.draw_scene(seed)
        scene.image.save(tmp_path / f"{seed}.png")
        name = {"image": f"{seed}.png"} if seed else {"images": [f"{seed}.png"]}
        lines.append(json.dumps({**name, "question": scene.questions[0].text}))
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_a_search_is_saved_resumed_and_run(prompts, tmp_path, monkeypatch):
    out, searched = tmp_path / "strategy.json", []

    def watched(model, samples, *args, **options):
        searched.append(len(samples))
        return calibrate(model, samples, *args, **options)

    monkeypatch.setattr("foveate.cli.calibrate.search", watched)
    options = ("--startup", "2", "--average", "0.4", "--out", str(out))
    first = call("calibrate", "tiny", str(prompts), "--trials", "2", *options)
    assert first.exit_code == 0, first.output
    assert "resuming from" not in first.output
    again = call("calibrate", "tiny", str(prompts), "--trials", "3", *options)
    assert "resuming from" in again.output
    assert searched == [2, 2]
    found = make_method(str(out))
    assert isinstance(found, VFlowOpt)
    assert json.loads(json.dumps(found.to_dict())) == json.loads(out.read_text())
    assert len(found.keep) == 3
    shown = again.output.split("or with ")[1].replace("\n", " ").split()
    sets = [shown[i + 1] for i, word in enumerate(shown) if word == "--set"]
    assert make_method("vflowopt", shown[shown.index("--keep") + 1], sets) == found
    picture = str(prompts.parent / "0.png")
    ran = call("run", "tiny", picture, "what color is the star ?", "--method", str(out))
    assert ran.exit_code == 0, ran.output
    other = call("calibrate", "tiny", str(prompts), "--average", "0.5", "--out", str(out))
    assert other.exit_code == 2
    assert "other settings" in other.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:1 is not JSON"),
        ('{"image": "0.png"}', "no question"),
        ('{"images": [], "question": "?"}', "no question"),
        ("[]", "no question"),
        ("", "contains no prompt"),
        ('{"image": "none.png", "question": "?"}', "no such image file"),
    ],
)
def test_prompts_that_cannot_be_read_are_told(line, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    found = call("calibrate", "tiny", str(path), "--out", str(tmp_path / "x.json"))
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_a_saved_method_can_be_changed_and_must_be_one(tmp_path):
    path = tmp_path / "method.json"
    path.write_text('{"method": "fastv", "layer": 3}')
    method = make_method(str(path), "0.25", ["positions=original"])
    assert (method.layer, method.keep, method.positions) == (3, 0.25, "original")
    for text in ("{", "[]", '{"method": "fastv", "depth": 3}'):
        path.write_text(text)
        with pytest.raises(FoveateError):
            make_method(str(path))
    with pytest.raises(InputError, match="cannot be read as a method"):
        make_method(str(tmp_path / "none.json"))


def test_a_full_disk_and_a_kill_leave_a_search_that_goes_on(prompts, tmp_path):
    with mounted(tmp_path / "disk", 64) as disk:
        out = disk / "s.json"
        line = ("calibrate", "tiny", str(prompts), "--startup", "1", "--average", "0.4")
        fill(disk, 4)
        full = call(*line, "--trials", "30", "--out", str(out))
        assert full.exit_code == 2, full.exception
        (said,) = [x for x in full.stderr.splitlines() if x.startswith("error")]
        assert said == f"error: cannot save {disk}/s.trials: No space left on device"
        assert not out.exists()
        (disk / "filler").unlink()
        with (disk / "s.trials").open("ab") as file:
            file.write(b'{"op_code": 4, "wor')  # a kill in the middle of a line
        again = call(*line, "--trials", "2", "--out", str(out))
        assert again.exit_code == 0, again.exception
        assert make_method(str(out)).slug == "vflowopt"
