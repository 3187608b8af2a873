"""A recipe's mistakes are found before anything is loaded, and named with what was meant."""

import pytest
import yaml
from typer.testing import CliRunner

from foveate.cli import app
from foveate.cli.arguments.train import EXAMPLE
from foveate.cli.recipe import parse_recipe, read_recipe
from foveate.errors import FoveateError, InputError
from foveate.methods import FastV, PyramidDrop

GOOD = {"model": "tiny", "out": "runs", "data": {"scenes": 4}}


def test_the_example_is_a_recipe():
    recipe = parse_recipe(yaml.safe_load(EXAMPLE))
    assert recipe.method == PyramidDrop(keep=(0.5, 0.25, 0.125))
    assert recipe.freeze == ("vision_tower",)
    assert recipe.data.scenes == 64
    assert recipe.trainer["learning_rate"] == 1e-4


def test_the_command_prints_the_example_and_explains_it():
    assert CliRunner().invoke(app, ["train", "--example"]).output == EXAMPLE
    told = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "120"}).output
    for line in EXAMPLE.splitlines():
        assert line.strip() in told
    assert CliRunner().invoke(app, ["train"]).exit_code == 2


def test_methods_are_read_by_the_types_of_their_fields():
    given = {"name": "fastv", "layer": 3, "keep": 0.25}
    assert parse_recipe({**GOOD, "method": given}).method == FastV(layer=3, keep=0.25)
    given = {"name": "pyramiddrop", "layers": [4], "keep": [0.5], "positions": None}
    assert parse_recipe({**GOOD, "method": given}).method == PyramidDrop(layers=(4,), keep=(0.5,))
    assert parse_recipe({**GOOD, "method": "pyramiddrop"}).method == PyramidDrop()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"modle": "x"}, "unknown key 'modle' in the recipe; did you mean 'model'"),
        ({"model": None}, "model must be a string"),
        ({"out": 3}, "out must be a string, got 3"),
        ({"data": {"scene": 4}}, "unknown key 'scene' in data; did you mean 'scenes'"),
        ({"data": {}}, "data needs either `file`"),
        ({"data": {"file": "a", "scenes": 1}}, "data needs either `file`"),
        ({"data": {"file": "a", "turns": 1}}, "data.turns goes with `scenes`"),
        ({"data": {"scenes": 0}}, "data.scenes must be a positive whole number, got 0"),
        ({"data": {"scenes": 1, "seed": -1}}, "data.seed must be"),
        ({"data": {"file": "a", "max_pixels": 0}}, "data.max_pixels must be a positive whole"),
        ({"data": {"scenes": 1, "max_pixels": 9}}, "data.max_pixels goes with `file`"),
        ({"data": [1]}, "data must be a mapping"),
        ({"method": "pyramidrop"}, "pyramiddrop"),
        ({"method": {"keep": 0.5}}, "method must be a name, or a mapping with the key `name`"),
        ({"method": {"name": "fastv", "layr": 2}}, "unknown key 'layr' in method; .*'layer'"),
        ({"method": {"name": "fastv", "keep": 1.7}}, "keep"),
        ({"method": {"name": "fastv", "layer": "two"}}, "fastv cannot read layer=two"),
        ({"freeze": [1]}, "freeze must be a list"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"train": "head"}, "train must be one of all, method"),
        ({"train": "method", "method": None}, "train: method needs a method that learns"),
        ({"train": "method", "method": "covipal", "freeze": ["x"]}, "so leave freeze out"),
        ({"lora": {"rank": 4}}, "unknown key 'rank' in lora"),
        ({"trainer": {"learning_rat": 1}}, "in trainer; did you mean 'learning_rate'"),
        ({"trainer": {"output_dir": "x"}}, "trainer.output_dir cannot be set: use the key `out`"),
        ({"trainer": 3}, "trainer must be a mapping"),
    ],
)
def test_mistakes_are_named(change, reason):
    with pytest.raises(FoveateError, match=reason):
        parse_recipe({**GOOD, **change})


@pytest.mark.parametrize("missing", ["model", "out", "data"])
def test_what_is_missing_is_named(missing):
    with pytest.raises(InputError, match=f"'{missing}' is missing"):
        parse_recipe({key: value for key, value in GOOD.items() if key != missing})


def test_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no such recipe: .*--example"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(InputError, match=r"bad\.yaml is not YAML"):
        read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match=r"list\.yaml: the recipe must be a mapping"):
        read_recipe(tmp_path / "list.yaml")


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "r.yaml").write_text(
        "model: weights\nout: o\ndata: {file: d.jsonl, max_pixels: 9}\n"
    )
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.model == str(tmp_path / "weights")
    assert recipe.out == tmp_path / "o"
    assert recipe.data.file == tmp_path / "d.jsonl"
    assert recipe.data.max_pixels == 9
