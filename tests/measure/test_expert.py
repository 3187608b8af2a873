"""The account of a policy: what torch counts of a prompt, and of a step of its expert."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PI0Config, PI0ForConditionalGeneration

import foveate
from foveate.cli.flops import Question, count
from foveate.engine.planning import make_plan
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.loading import load_model, load_skeleton
from foveate.measure.account import account, unpruned
from foveate.measure.conventions import CONVENTIONS
from foveate.measure.memory import cache_bytes
from foveate.measure.planned import planned
from foveate.methods import DivPrune, PyramidDrop
from tests.methods_for_tests import EveryThird, Listed
from tests.policies import CHUNK, VISUAL, batch, build, observation, policy, rows_of

DENSE = CONVENTIONS["dense"]
METHODS = {
    "nothing": [EveryThird(1.0)],
    "pre_llm": [EveryThird(0.25)],
    "llm": [PyramidDrop((1, 4), (0.5, 0.25), "original")],
    "vision": [Listed(1, 0.25), EveryThird(0.5)],
}


def counted(run):
    """FLOPs of all matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = run()
    return counter.get_total_flops(), output


@pytest.mark.parametrize("kind", METHODS)
def test_accounts_equal_what_torch_counts(kind):
    """Of a whole prompt with one step, of one step alone, and of the cache in between; two cameras
    of a row that are padding go through the tower, and nowhere else.
    """
    model, row = policy("eager"), observation()
    row["pixel_values"] = row["pixel_values"].repeat(1, 2, 1, 1, 1)
    row["pixel_attention_mask"] = torch.tensor([[True, False, False, True]])
    given = {name: row[name] for name in ("state", "noise", "attention_mask")}
    time = torch.tensor([1.0])
    with foveate.use(model, METHODS[kind]) as run:
        whole, output = counted(lambda: model(**row, timestep=time))
        output.past_key_values.crop(-(CHUNK + 1))
        assert run.report()["kv_bytes"]["after"] == cache_bytes(output.past_key_values)[0]
        step, _ = counted(
            lambda: model(**given, timestep=time, past_key_values=output.past_key_values)
        )
    found = account(run.record, run.family, METHODS[kind], DENSE)
    assert (found.decode, found.total + found.decode) == (step, whole)
    assert found.head == 0
    plain, _ = counted(lambda: model(**row, timestep=time))
    full = account(unpruned(run.record), run.family, (), DENSE)
    assert full.total + full.decode == plain
    assert (found.total < full.total) is (found.decode < full.decode) is (kind != "nothing")


def test_a_report_draws_the_cameras_that_there_are():
    inputs = batch(rows_of())
    with foveate.use(policy(), EveryThird(0.25)) as run:
        policy().sample_actions(**inputs)
    shown = inputs["pixel_values"][inputs["pixel_attention_mask"]]
    assert torch.equal(run.record.pixels, shown)
    assert [image["after"] for image in run.report()["images"]] == [{"pre_llm": 4}] * 3


@pytest.mark.parametrize("kind", ["pre_llm", "llm"])
def test_what_is_planned_is_what_happens(kind):
    row = observation()
    with foveate.use(policy(), METHODS[kind]) as run:
        policy().sample_actions(**row)
    text = row["input_ids"].shape[1] - 2 * VISUAL
    plan = planned(run.family, run.plan, run.record.encoded["image"], text)
    for field in ("prompt_tokens", "layer_tokens", "cache_slots"):
        assert getattr(plan, field) == getattr(run.record, field)
    assert account(plan, run.family, METHODS[kind]) == account(
        run.record, run.family, METHODS[kind]
    )


def test_the_command_line_counts_a_policy_by_its_config(tmp_path, monkeypatch):
    build().config.save_pretrained(tmp_path)
    assert find_family(load_skeleton(str(tmp_path))).model_type == "pi0"
    pixels = torch.zeros(2, 3, 32, 32)
    monkeypatch.setattr(
        "foveate.cli.flops.load_image_processor", lambda name: lambda **_: {"pixel_values": pixels}
    )
    asked = Question(
        str(tmp_path), (DivPrune(0.25),), CONVENTIONS["foveate"], images=2, text_tokens=4
    )
    answer = count(asked)
    with foveate.use(policy(), DivPrune(0.25)) as run:
        policy().sample_actions(**observation())
    assert answer.after == account(run.record, run.family, [DivPrune(0.25)])
    assert answer.step == "one step of the expert"
    assert answer.after.decode < answer.before.decode


def test_a_policy_of_real_size_saves_what_the_page_says():
    with torch.device("meta"):
        family = find_family(PI0ForConditionalGeneration(PI0Config()))
    assert (family.text_layers, family.vision_layers, family.expert.tokens) == (18, 27, 51)
    method = DivPrune(0.25)
    cameras = {"pixel_values": torch.empty(3, 3, 224, 224, device="meta")}
    record = planned(family, make_plan(family, [method]), cameras, 48)
    before, after = account(unpruned(record), family), account(record, family, [method])
    page = (Path(__file__).parents[2] / "docs" / "robots.md").read_text(encoding="utf-8")
    whole, left = (f"{(of.total + 10 * of.decode) / 1e12:.2f}" for of in (before, after))
    assert f"takes {whole} TFLOPs with all tokens and {left} with a\nquarter" in page


def test_it_cannot_be_asked_on_the_command_line(tmp_path):
    build().config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"is a pi0, which answers with .*actions"):
        load_model(str(tmp_path))
