"""Paths are refused before the work; a full disk leaves the earlier file and one line."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import foveate
from foveate import tiny
from foveate.bench.store import Store
from foveate.bench.sweep import _begin
from foveate.core.saving import Saved
from foveate.errors import FoveateError, InputError
from foveate.io.writing import (
    check_file,
    check_folder,
    filling,
    replacing,
    write_bytes,
    write_image,
    write_json,
    write_text,
)
from foveate.methods import FastV, PyramidDrop
from foveate.report.report import Report
from tests.cli.calling import call
from tests.disks import fill, mounted
from tests.training.batches import Llava

NOISE = Image.effect_noise((400, 400), 80)


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 kB."""
    with mounted(tmp_path / "disk", 64) as folder:
        yield folder


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def listed(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- the writer


def test_a_new_file_has_the_usual_permissions_and_nothing_else_is_left(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {"é": 1})
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": 1}
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_permissions_and_links_are_kept(tmp_path):
    (tmp_path / "deep").mkdir()
    real, link = tmp_path / "deep" / "real.txt", tmp_path / "link.txt"
    real.write_text("before")
    real.chmod(0o606)
    link.symlink_to(real)
    write_text(link, "after")
    assert link.is_symlink()
    assert real.read_text() == "after"
    assert stat.S_IMODE(real.stat().st_mode) == 0o606
    assert len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_is_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    os.chown(path, 1234, 1234)
    write_text(path, "after")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1234)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError("bug"), OSError(5, "I/O error")])
def test_what_dies_while_it_writes_leaves_the_earlier_file(tmp_path, fault):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def die():
        with replacing(path) as part:
            part.write_text("half")
            raise fault

    with pytest.raises((InputError, RuntimeError, KeyboardInterrupt)) as caught:
        die()
    assert isinstance(caught.value, InputError) == isinstance(fault, OSError)
    assert listed(tmp_path) == {"a.txt": b"before"}


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "pathlib.Path.write_bytes"])
def test_a_disk_that_is_full_at_any_step_leaves_the_earlier_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    path.write_text("before")
    monkeypatch.setattr(step, full)
    with pytest.raises(InputError, match=r"cannot save .*a\.json: No space left on device"):
        write_json(path, {})
    monkeypatch.undo()
    assert listed(tmp_path) == {"a.json": b"before"}


def test_a_file_that_no_other_can_replace_is_written_in_place(tmp_path, monkeypatch):
    def busy(*args):
        raise OSError(errno.EBUSY, "Device or resource busy")  # a file that is a mount point

    (tmp_path / "a.txt").write_text("before, and longer")
    monkeypatch.setattr("os.replace", busy)
    write_text(tmp_path / "a.txt", "after")
    assert listed(tmp_path) == {"a.txt": b"after"}


def test_streams_are_written_to_and_stay_what_they_are(tmp_path):
    reading, writing = os.pipe()
    check_file(f"/dev/fd/{writing}")
    write_text(f"/dev/fd/{writing}", "one")
    os.write(writing, b"two")
    assert os.read(reading, 99) == b"onetwo"
    with (tmp_path / "out.txt").open("a") as file:
        write_text(f"/dev/fd/{file.fileno()}", "one")
        file.write("two")
    assert (tmp_path / "out.txt").read_text() == "onetwo"  # not parted from its file
    for end in (reading, writing):
        os.close(end)
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    check_file(tmp_path / "pipe")
    write_text(tmp_path / "pipe", "through")
    assert reader.communicate(timeout=60)[0] == b"through"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    write_text(os.devnull, "nothing")
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_device_is_one_line():
    check_file("/dev/full")
    with pytest.raises(InputError, match="cannot save /dev/full: No space left on device"):
        write_text("/dev/full", "a")


WRITERS = {
    "bytes": ("a.bin", lambda path: write_bytes(path, bytes(200_000))),
    "json": ("a.json", lambda path: write_json(path, list(range(60_000)))),
    "image": ("a.png", lambda path: write_image(path, NOISE)),
    "report": ("a.json", lambda path: Report(numbers=list(range(60_000))).to_json(path)),
    "weights": ("foveate.safetensors", lambda path: Saved((FastV(),)).write(
        path.parent, {"a": torch.zeros(60_000)})),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_a_small_disk_keeps_the_earlier_file(disk, kind):
    name, write = WRITERS[kind]
    (disk / name).write_bytes(b"before")
    with pytest.raises(InputError, match=r"cannot save .*[Nn]o space left on device") as caught:
        write(disk / name)
    assert "\n" not in str(caught.value)
    left = listed(disk)
    left.pop("foveate.json", None)
    assert left == {name: b"before"}
    check_file(disk / name)


def test_torch_checkpoints_on_a_small_disk(disk):
    (disk / "a.pt").write_bytes(b"before")
    with pytest.raises(InputError, match="cannot save"), replacing(disk / "a.pt") as part:
        torch.save({"a": torch.zeros(60_000)}, part)
    assert listed(disk) == {"a.pt": b"before"}


# -- folders of several files


def test_a_model_is_saved_whole_or_not_at_all(disk):
    model = foveate.prepare(Llava().build(), FastV(layer=2))
    disk.joinpath("model.safetensors").write_bytes(b"before")
    disk.joinpath("foveate.json").write_bytes(b"before")
    for folder in (disk, disk / "new"):
        with pytest.raises(InputError, match=r"cannot save .*[Nn]o space left on device"):
            foveate.save(model, folder)
        assert listed(disk) == {"model.safetensors": b"before", "foveate.json": b"before"}
        assert not (disk / "new").exists()


def test_saving_again_replaces_files_and_shards_and_keeps_what_else_is_there(tmp_path):
    model = foveate.prepare(Llava().build(), FastV(layer=2))
    foveate.save(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    foveate.save(model, tmp_path)
    assert list(tmp_path.glob("model-*")) == []
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "README.md").read_text() == "mine"
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    foveate.training.prepare.session_of(foveate.load(tmp_path))


def test_folders_within_folders_are_filled(tmp_path):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a").write_text("before")
    with filling(tmp_path / "out") as stage:
        (stage / "deep").mkdir()
        (stage / "deep" / "a").write_text("after")
        (stage / "b").write_text("new")
        assert (tmp_path / "out" / "deep" / "a").read_text() == "before"
    assert listed(tmp_path / "out") == {"deep/a": b"after", "b": b"new"}


def test_saving_into_a_file_is_refused_by_every_door(tmp_path):
    model = foveate.prepare(Llava().build(), FastV(layer=2))
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        for save in (lambda at: foveate.save(model, at), model.save_pretrained):
            with pytest.raises(InputError, match="file is a file, not a folder"):
                save(folder)
    assert (tmp_path / "file").read_text() == "mine"


# -- results of the benchmark


def test_finished_cells_survive_a_full_disk(disk):
    store = Store(disk / "results.parquet")
    row = {"key": "1", "model": "m" * 100}
    store.add(row)
    with pytest.raises(InputError, match=r"cannot save .*journal: No space left on device"):
        store.add({"key": "2", "model": "x" * 200_000})
    assert "2" not in store
    store.add({"key": "3"})  # what fits still goes in
    assert [row["key"] for row in Store(disk / "results.parquet").rows] == ["1", "3"]


def test_a_full_disk_leaves_the_results_file(disk):
    with Store(disk / "results.parquet").writing() as store:
        store.add({"key": "1"})
    before = (disk / "results.parquet").read_bytes()
    fill(disk, 16)
    again = Store(disk / "results.parquet")

    def go_on():
        with again.writing():
            for key in range(2, 400):
                again.add({"key": str(key), "model": os.urandom(500).hex()})

    with pytest.raises(InputError, match=r"cannot save .*No space left on device"):
        go_on()
    assert (disk / "results.parquet").read_bytes() == before
    os.remove(disk / "filler")
    assert len(Store(disk / "results.parquet")) >= 2
    assert not list(disk.glob(".*"))


def test_a_speed_result_that_cannot_be_read_back_is_begun_anew():
    assert _begin({"what": "speed"}, Path(os.devnull)) == {"what": "speed", "cells": []}


# -- paths, before the work


@pytest.fixture
def nowhere(tmp_path):
    """Paths at which no file can be, with what is said of them."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "closed.png").write_text("mine")
    (tmp_path / "closed.png").chmod(0o444)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "no" / "x.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    return {
        str(tmp_path / "no" / "x.png"): f"there is no folder {tmp_path}/no",
        str(tmp_path / "file" / "x.png"): f"{tmp_path}/file is a file",
        str(tmp_path / "folder.png"): "it is a folder",
        str(tmp_path / "closed.png"): "",  # "read-only", or what the system says
        str(tmp_path / "dangling.png"): f"there is no folder {tmp_path}/no",
        str(tmp_path / "loop.png"): "",
        str(tmp_path / ("x" * 300 + ".png")): "name too long",
        "/proc/x.png": "",
    }


COMMANDS = {
    "run": ("run", "tiny", "SCENE", "why ?", "-m", "fastv", "--json"),
    "run, image": ("run", "tiny", "SCENE", "why ?", "-m", "fastv", "--show"),
    "flops": ("flops", "tiny", "-m", "fastv", "--json"),
    "demo": ("demo", "--out"),
    "calibrate": ("calibrate", "tiny", "PROMPTS", "--out"),
    "speed": ("bench", "--speed", "--model", "tiny", "--json"),
}


def no_work(monkeypatch):
    def begun(*args, **kwargs):
        raise AssertionError("the work has begun")

    for name in ("run", "calibrate", "bench_speed", "demo", "bench", "train"):
        monkeypatch.setattr(f"foveate.cli.{name}.load_model", begun)
    monkeypatch.setattr("foveate.cli.flops.load_skeleton", begun)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_a_path_before_the_work(command, nowhere, tmp_path, monkeypatch):
    no_work(monkeypatch)
    tiny.draw_scene(3).image.save(tmp_path / "scene.png")
    (tmp_path / "prompts.jsonl").write_text('{"image": "scene.png", "question": "why ?"}')
    names = {"SCENE": str(tmp_path / "scene.png"), "PROMPTS": str(tmp_path / "prompts.jsonl")}
    arguments = [names.get(word, word) for word in COMMANDS[command]]
    before = listed(tmp_path)
    for path, reason in nowhere.items():
        result = call(*arguments, path)
        assert result.exit_code == 2, (path, result.output, result.exception)
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: cannot save ")
        assert reason in line
        assert len(line) <= 310
    assert listed(tmp_path) == before


@pytest.mark.parametrize("suffix", ["", ".xyz", ".psd", ".xbm", ".wmf", ".json"])
@pytest.mark.parametrize("option", [("run", "--show"), ("demo", "--out")])
def test_images_need_a_format_that_can_be_written(option, suffix, tmp_path, monkeypatch):
    no_work(monkeypatch)
    scene = tmp_path / "scene.png"
    tiny.draw_scene(3).image.save(scene)
    line = ["run", "tiny", str(scene), "why ?", "-m", "fastv"] if option[0] == "run" else ["demo"]
    result = call(*line, option[1], str(tmp_path / f"kept{suffix}"))
    assert result.exit_code == 2
    assert "name ends in .png or .jpg" in result.stderr


def test_two_results_cannot_have_one_path(tmp_path, monkeypatch):
    no_work(monkeypatch)
    scene = tmp_path / "scene.png"
    tiny.draw_scene(3).image.save(scene)
    both = ("--show", str(tmp_path / "a.png"), "--json", f"{tmp_path}/./a.png")
    result = call("run", "tiny", str(scene), "why ?", "-m", "fastv", *both)
    assert result.exit_code == 2
    assert "--show and --json are both" in result.stderr
    result = call("calibrate", "tiny", str(scene), "--out", str(tmp_path / "a.trials"))
    assert result.exit_code == 2
    assert "is for the trials" in result.stderr


def test_calibrate_checks_where_its_trials_go(tmp_path, monkeypatch):
    no_work(monkeypatch)
    (tmp_path / "a.trials").mkdir()
    result = call("calibrate", "tiny", "prompts.jsonl", "--out", str(tmp_path / "a.json"))
    assert result.exit_code == 2
    assert "a.trials: it is a folder" in result.stderr


def test_null_bytes_are_one_line(tmp_path):
    for check in (check_file, check_folder):
        with pytest.raises(InputError, match="a name cannot hold a null byte"):
            check(f"{tmp_path}/a\0b.png")


def bad_folders(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "no")
    return {
        str(tmp_path / "file"): "is a file, not a folder",
        str(tmp_path / "file" / "deep" / "er"): "is a file, not a folder",
        str(tmp_path / "dangling"): "leads nowhere",
        str(tmp_path / "dangling" / "x"): "leads nowhere",
        "/proc/x": "cannot save",
        str(tmp_path / ("x" * 300)): "name too long",
    }


def test_folders_are_refused_before_the_work_and_not_made(tmp_path, monkeypatch):
    no_work(monkeypatch)
    for folder, reason in bad_folders(tmp_path).items():
        with pytest.raises(InputError, match=reason):
            check_folder(folder)
        result = call("bench", "--tasks", "digits", "--methods", "fastv", "--out", folder)
        assert result.exit_code == 2, result.exception
        (line,) = result.stderr.strip().splitlines()
        assert reason in line
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps({"model": "tiny", "out": folder, "data": {"scenes": 1}}))
        result = call("train", str(recipe))
        assert result.exit_code == 2, result.exception
        assert reason in " ".join(result.stderr.split())
    check_folder(tmp_path / "to" / "be" / "made")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", ["results.parquet", "report.html"])
def test_bench_checks_its_files(tmp_path, name, monkeypatch):
    no_work(monkeypatch)
    (tmp_path / name).mkdir()
    result = call("bench", "--tasks", "digits", "--methods", "fastv", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert f"{name}: it is a folder" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folders_without_permission_are_refused(tmp_path):
    tmp_path.chmod(0o500)
    for check in (check_file, check_folder):
        with pytest.raises(FoveateError, match="Permission denied"):
            check(tmp_path / "a")
    tmp_path.chmod(0o700)


def test_checks_leave_what_is_there(tmp_path):
    (tmp_path / "a.json").write_text("mine")
    check_file(tmp_path / "a.json")
    check_file(tmp_path / "b.json")
    check_file(tmp_path / "c.png", image=True)
    check_file(None)
    check_folder(tmp_path)
    assert listed(tmp_path) == {"a.json": b"mine"}


def test_run_on_a_full_disk_is_one_line_and_keeps_both_files(disk, tmp_path):
    scene = tmp_path / "scene.png"
    tiny.draw_scene(3).image.save(scene)
    (disk / "kept.png").write_bytes(b"before")
    (disk / "out.json").write_bytes(b"before")
    fill(disk, 4)
    for option, name in (("--show", "kept.png"), ("--json", "out.json")):
        result = call(
            "run", "tiny", str(scene), "why ?", "-m", "fastv", "--max-new-tokens", "1",
            option, str(disk / name),
        )  # fmt: skip
        assert result.exit_code == 2, result.exception
        (line,) = result.stderr.strip().splitlines()
        assert line == f"error: cannot save {disk}/{name}: No space left on device"
        assert (disk / name).read_bytes() == b"before"
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "kept.png", "out.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_printing_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as file:
        told = subprocess.run(
            [sys.executable, "-m", "foveate", "list"], stdout=file, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    assert told.returncode == 2
    assert told.stderr.strip() == "error: cannot go on: No space left on device"


def test_safetensors_written_in_place_do_not_change_permissions(tmp_path):
    path = tmp_path / "a.safetensors"
    path.touch(mode=0o604)
    path.chmod(0o604)
    with replacing(path) as part:
        save_file({"a": torch.zeros(2)}, part)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_methods_and_weights_are_written_whole(tmp_path, monkeypatch):
    saved = Saved((PyramidDrop(layers=(2,), keep=(0.5,)),))
    saved.write(tmp_path)
    before = listed(tmp_path)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        saved.write(tmp_path, {"a": torch.zeros(2)})
    assert listed(tmp_path) == before
