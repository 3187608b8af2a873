"""What is written beside a checkpoint is read back, or refused with what to do."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import foveate
from foveate.core import Method, Reduction, Scorer, Step
from foveate.core.saving import Saved, from_dict
from foveate.errors import (
    AttachError,
    BudgetError,
    InputError,
    UnknownMethodError,
    UnsupportedModelError,
)
from foveate.methods import DivPrune, FastV, PyramidDrop
from foveate.training.prepare import session_of
from tests.methods_for_tests import EveryThird
from tests.training.batches import Llava, batch, called

METHODS = (DivPrune(keep=0.5), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))


@dataclasses.dataclass(frozen=True)
class Gated(Method):
    """Keep what a linear map of the features ranks first, each times its gate."""

    keep: float = 0.25
    positions: str | None = None

    def steps(self, model):
        return (Step("pre_llm"),)

    def learned(self, model):
        return nn.Linear(64, 1)

    def reduce(self, tokens, count):
        gate = (tokens.learned(tokens.x)[..., 0] / 50).sigmoid()
        index = gate.topk(count, dim=-1).indices.sort(dim=-1).values
        chosen = torch.nn.functional.one_hot(index, tokens.count).to(gate)
        return Reduction(index, weights=chosen * gate.gather(1, index)[..., None])


@pytest.fixture
def gated():
    """The method, registered for a test."""
    from foveate.core import registry

    foveate.register("gated", stage="pre_llm")(Gated)
    yield Gated()
    registry._REGISTRY.pop("gated")


@pytest.fixture
def model():
    return Llava().build()


def logits(model):
    with torch.no_grad():
        return model.eval()(**called(batch(Llava())[0])).logits


@pytest.mark.parametrize("name", foveate.list_methods())
def test_every_method_is_what_its_dict_says(name):
    method = foveate.get_method(name)()
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_budgets_of_all_forms_are_read_back():
    for keep in (0.25, 7, (0.5, 0.25), (20, 3), foveate.per_request([(0.5, 0.25), (9, 4)])):
        method = PyramidDrop(keep=keep)
        again = from_dict(json.loads(json.dumps(method.to_dict())))
        assert again == method
        assert repr(again) == repr(method)  # 1 is no share and 1.0 no count


def test_a_saved_model_loads_with_its_methods_and_without_them(model, tmp_path):
    plain = logits(model)
    foveate.prepare(model, list(METHODS), head="labels")
    foveate.save(model, tmp_path)
    again = foveate.load(tmp_path)
    session = session_of(again)
    assert session.methods == METHODS
    assert session.labelled_logits
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path)), plain)
    assert not torch.equal(logits(model), plain)


def test_save_pretrained_of_a_prepared_model_writes_its_methods(model, tmp_path):
    foveate.prepare(model, FastV(layer=3))
    model.save_pretrained(tmp_path / "with")
    assert Saved.read(tmp_path / "with" / "foveate.json") == Saved((FastV(layer=3),))
    session_of(model).remove()
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "foveate.json").exists()
    assert "save_pretrained" not in vars(model)


def test_what_a_method_learns_is_trained_saved_and_loaded(model, gated, tmp_path):
    before = set(dict(model.named_parameters()))
    foveate.prepare(model.train(), gated)
    added = set(dict(model.named_parameters())) - before
    assert added == {"foveate.0.weight", "foveate.0.bias"}
    model(**called(batch(Llava())[0])).loss.backward()
    weight = model.foveate["0"].weight
    assert float(weight.grad.abs().max()) > 0
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    foveate.save(model, tmp_path)
    again = foveate.load(tmp_path)
    assert torch.equal(again.foveate["0"].weight, weight)
    assert torch.equal(logits(again), logits(model))
    session_of(model).remove()
    assert set(dict(model.named_parameters())) == before
    (tmp_path / "foveate.safetensors").unlink()
    with pytest.raises(InputError, match=r"gated learns, but there is no foveate\.safetensors"):
        foveate.load(tmp_path)


# -- what holds for a whole session


def test_a_total_is_loaded_and_saved_and_is_not_for_training(model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    foveate.save(foveate.prepare(model, DivPrune(keep=12)), first)
    assert json.loads((first / "foveate.json").read_text())["format"] == 1
    again = foveate.load(first, keep_total=7)
    assert session_of(again).plan.total == 7
    foveate.save(again, second)
    said = json.loads((second / "foveate.json").read_text())
    assert (said["format"], said["keep_total"]) == (2, 7)
    inputs = called(batch(Llava())[0])
    for loaded, total in ((foveate.load(second), 7), (foveate.load(second, keep_total=5), 5)):
        with torch.no_grad():
            loaded(**inputs)
        run = session_of(loaded)
        assert all(of["visual_tokens"] <= total for of in run.report()["keep_total"])
        assert any(of["visual_tokens"] == total for of in run.report()["keep_total"])
        with pytest.raises(BudgetError, match="each image has one size; train without it"):
            loaded.train()(**inputs)
        loaded.eval()(**inputs)


def test_a_total_goes_with_what_a_method_has_learned(model, gated, tmp_path):
    foveate.save_adapter(foveate.prepare(model, gated), tmp_path)
    weight = model.foveate["0"].weight.clone()
    loaded = foveate.load_adapter(Llava().build(), tmp_path, keep_total=5)
    assert session_of(loaded).plan.total == 5
    assert torch.equal(loaded.foveate["0"].weight, weight)


def test_a_total_is_refused_where_a_model_is_to_be_trained(model, tmp_path):
    with pytest.raises(BudgetError, match="train without it"):
        foveate.prepare(model, "divprune", keep_total=7)
    Saved((DivPrune(),), keep_total=7).write(tmp_path)
    with pytest.raises(BudgetError, match="train without it"):
        foveate.prepare(model, tmp_path / "foveate.json")
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    foveate.save(foveate.prepare(adapted, "divprune"), tmp_path / "adapters")
    session_of(foveate.load(tmp_path / "adapters", keep_total=7)).remove()
    with pytest.raises(BudgetError, match="train without it"):
        foveate.load(tmp_path / "adapters", trainable=True, keep_total=7)


@pytest.mark.parametrize("total", [0, 2.5, True, "7", [3, 4], [3]], ids=str)
def test_a_total_that_cannot_be_saved_is_refused(total, tmp_path):
    with pytest.raises(BudgetError, match="keep_total"):
        Saved((DivPrune(),), keep_total=total)
    file = {"format": 2, "methods": [{"method": "divprune"}], "keep_total": total}
    (tmp_path / "foveate.json").write_text(json.dumps(file))
    with pytest.raises(BudgetError, match="keep_total"):
        foveate.load(tmp_path)


@pytest.mark.parametrize(
    ("audio", "message"),
    [("yes", "audio must be true"), ([], "audio must be true"), ([{"method": "x"}], "unknown")],
    ids=str,
)
def test_audio_that_is_damaged_is_refused(audio, message):
    with pytest.raises(foveate.FoveateError, match=message):
        Saved.from_dict({"format": 2, "methods": [{"method": "divprune"}], "audio": audio})


@pytest.mark.parametrize(
    "saved", [Saved((DivPrune(),), audio=True), Saved((DivPrune(),), audio=(FastV(),))], ids=str
)
def test_audio_is_read_back(saved, tmp_path):
    assert Saved.read(saved.write(tmp_path)) == saved
    assert json.loads((tmp_path / "foveate.json").read_text())["format"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no `format`"),
        ('{"format": 99, "foveate": "9.0"}', "format 99, written by foveate 9.0.*upgrade"),
        ('{"format": 1}', "names no `methods`"),
        ('{"format": 1, "methods": []}', "names no `methods`"),
        ('{"format": 1, "methods": ["fastv"]}', "mapping with its name under `method`"),
        ('{"format": 1, "methods": [{"method": "fastv", "ratio": 1}]}', "no field 'ratio'"),
        ('{"format": 1, "methods": [{"method": "fastv"}], "head": "tail"}', "'all' or 'labels'"),
        ('{"format": 2, "methods": [{"method": "m3"}], "total": 9}', "says 'total', which is none"),
    ],
)
def test_a_damaged_or_newer_file_is_refused(tmp_path, text, message):
    (tmp_path / "foveate.json").write_text(text)
    with pytest.raises(InputError, match=message):
        foveate.load(tmp_path)


def test_an_unknown_method_or_a_bad_budget_is_refused(tmp_path):
    for method, kind in (("fastw", UnknownMethodError), ("fastv", foveate.FoveateError)):
        file = {"format": 1, "methods": [{"method": method, "keep": 7.5}]}
        (tmp_path / "foveate.json").write_text(json.dumps(file))
        with pytest.raises(kind):
            foveate.load(tmp_path)


def test_a_folder_without_the_file_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"has no foveate\.json.*foveate\.prepare\(model, method\)"
    ):
        foveate.load(tmp_path)


def test_saving_needs_a_prepared_model_and_registered_methods(model, tmp_path):
    with pytest.raises(AttachError, match=r"call foveate\.prepare"):
        foveate.save(model, tmp_path)
    foveate.prepare(model, EveryThird())
    with pytest.raises(InputError, match="EveryThird is not registered"):
        foveate.save(model, tmp_path)


def test_what_cannot_be_prepared_is_refused(model):
    with pytest.raises(foveate.FoveateError, match="head must be 'all' or 'labels'"):
        foveate.prepare(model, "fastv", head="none")
    with pytest.raises(foveate.errors.BudgetError, match="any size and order"):
        foveate.prepare(model, "fastv", keep=foveate.per_request([0.5]))
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        foveate.prepare(nn.Linear(2, 2), "fastv")
    with pytest.raises(UnsupportedModelError, match="head='labels' needs a model that makes"):
        foveate.prepare(model.model, "fastv", head="labels")
    foveate.prepare(model, "fastv")
    with pytest.raises(AttachError, match="already carries"):
        foveate.prepare(model, "fastv")


class Later(Scorer):
    """Acts on generated tokens alone."""

    slug, stage, needs, paper, keep, positions = "later", "llm", (), "", 1.0, None

    def steps(self, model):
        return (Step("llm", 2, effects=("decode",)),)

    def scores(self, tokens):
        raise AssertionError


def test_methods_for_decoding_alone_are_refused(model):
    with pytest.raises(UnsupportedModelError, match="training generates none"):
        foveate.prepare(model, Later())
