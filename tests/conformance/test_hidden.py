"""Visual tokens and text that the caller hides in the attention mask are unseen; nothing else goes.

The oracle is the bare model with the same mask at full length, in which removed tokens are masked.
"""

import pytest
import torch

import foveate
from foveate.families import find_family
from tests.conformance import oracle
from tests.conformance.test_families import case, model_of
from tests.conformance.tolerance import tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.oracle import Spec

ROWS = [[5, 7], [2, 3, 9], [6]]
KINDS = ("pyramiddrop", "fastv", "pre_llm", "composed", "renumbered", "pre_llm-renumbered")
HIDDEN = {"some": slice(1, None, 5), "all": slice(None), "last": slice(-3, None)}


def hidden_columns(ids, member, which):
    """Some visual tokens of a row's first image, and a text token after it."""
    visual = (ids == member.image_id).nonzero()[:, 0]
    first = visual[: member.visual][HIDDEN[which]]
    return torch.cat((first, visual[-1:] + 3)) if len(visual) else first


def with_positions(member, model, row):
    """Inputs of a row with positions that do not depend on what is hidden."""
    if find_family(model).one_dimensional:
        return row
    names = ("mm_token_type_ids", "image_grid_thw", "target_sizes", "attention_mask")
    arguments = {n: row[n] for n in names if n in row}
    positions, _ = member.base(model).get_rope_index(row["input_ids"], **arguments)
    return {**row, "position_ids": positions}


def batched(member, model, which):
    """A padded batch in which tokens are hidden, its 2-D mask, and each row alone."""
    inputs = member.inputs(ROWS)
    alone = [with_positions(member, model, member.row(inputs, row)) for row in range(len(ROWS))]
    width = inputs["input_ids"].shape[1]
    mask = inputs["attention_mask"].clone()
    for number, row in enumerate(alone):
        columns = hidden_columns(row["input_ids"][0], member, which)
        row["attention_mask"][0, columns] = 0
        mask[number, columns + width - row["input_ids"].shape[1]] = 0
    if "position_ids" in alone[0]:
        inputs["position_ids"] = torch.cat(
            [
                torch.nn.functional.pad(p, (width - p.shape[-1], 0))
                for p in (row["position_ids"] for row in alone)
            ],
            1,
        )
    return {**inputs, "attention_mask": mask}, alone


CELLS = [(kind, "some") for kind in KINDS] + [("composed", "all"), ("composed", "last")]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "which"), CELLS)
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_hidden_tokens_are_unseen_and_all_others_stay(name, kind, which):
    member, model = MEMBERS[name](), model_of(name)
    if kind.endswith("renumbered") and not find_family(model).one_dimensional:
        return
    inputs, alone = batched(member, model, which)
    with foveate.use(model, case(name, kind, 1)[0]) as run:
        got = member.run(model, **fresh(inputs)).last_hidden_state
    kept, worst = iter(run.kept), 0.0
    for row, own in enumerate(alone):
        length, images = own["input_ids"].shape[1], len(ROWS[row]) - 1
        eager, (_, spec) = model_of(name, "eager"), case(name, kind, max(images, 1))
        want, history = oracle.run(member, eager, fresh(own), spec if images else Spec(), length)
        text = own["attention_mask"][0].bool() & (own["input_ids"][0] < 80)
        worst = max(worst, (want - got[row, -length:])[text].abs().max().item())
        for image in range(images):
            for place, indices in zip(next(kept).values(), history, strict=True):
                assert torch.equal(place, indices[image])
    assert worst <= tolerance_of(name, model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pyramiddrop", "pre_llm-renumbered", "renumbered"])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_they_stay_unseen_in_decoding(name, kind):
    """Also where positions count what is not hidden, as in `generate`."""
    member, model = MEMBERS[name](), model_of(name)
    plain = find_family(model).one_dimensional
    if kind.endswith("renumbered") and not plain:
        return
    alone = member.row(member.inputs([[5, 7]]), 0)
    more = torch.tensor([[11, 12, 13]])
    whole = with_positions(member, model, member.continued(alone, more))
    mask, prompt = whole["attention_mask"], alone["input_ids"].shape[1]
    mask[0, hidden_columns(alone["input_ids"][0], member, "some")] = 0
    if plain:
        counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        places = torch.arange(mask.shape[1])[None]
        whole["position_ids"] = places if kind.endswith("renumbered") else counted
    positions = whole["position_ids"]
    want, _ = oracle.run(
        member, model_of(name, "eager"), fresh(whole), case(name, kind, 1)[1], prompt
    )
    told = {"attention_mask": mask[:, :prompt], "position_ids": positions[..., :prompt]}
    with foveate.use(model, case(name, kind, 1)[0]):
        out = member.run(model, **{**fresh(alone), **told}, **member.cached(model))
        states = [out.last_hidden_state[0, -1]]
        for step in range(more.shape[1]):
            now = prompt + step
            token = more[:, step : step + 1]
            told = {
                "attention_mask": mask[:, : now + 1],
                "position_ids": positions[..., now : now + 1],
            }
            told |= {n: v for n, v in member.extras(token, 0).items() if "grid" not in n}
            out = member.run(model, input_ids=token, past_key_values=out.past_key_values, **told)
            states.append(out.last_hidden_state[0, -1])
    bound = tolerance_of(name, model)
    torch.testing.assert_close(torch.stack(states), want[prompt - 1 :], rtol=0, atol=bound)


@torch.no_grad()
@pytest.mark.parametrize("itself", [False, True], ids=["as built", "each sees itself"])
@pytest.mark.parametrize("kind", ["composed", "fastv", "pre_llm"])
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_masks_of_two_and_four_dimensions_agree(name, kind, itself):
    member, model = MEMBERS[name](), model_of(name)
    if find_family(model).recurrent_layers:
        return  # their layers take two dimensions alone: the bare model differs from itself
    _, alone = batched(member, model, "some")
    row = alone[0]
    seen = row["attention_mask"][0].bool() & (row["input_ids"][0] < 80)
    recorded = oracle.Recorded(member, model, fresh(row)).kwargs
    masks = [kwargs["attention_mask"] for kwargs in recorded]
    masks = [mask if mask.dtype == torch.bool else mask > -1 for mask in masks]
    if itself:
        masks = [mask | torch.eye(mask.shape[-1]).bool() for mask in masks]
    four = masks[0]
    if any(not torch.equal(mask, four) for mask in masks):
        four = dict(zip(member.text(model).config.layer_types, masks, strict=True))
    in_four = {**fresh(row), "attention_mask": four}
    plain = [member.run(model, **fresh(x)).last_hidden_state[0, seen] for x in (row, in_four)]
    if name == "paligemma2":  # which takes no masks by layer: the bare model differs from itself
        assert (plain[0] - plain[1]).abs().max() > 1e-3
        return
    torch.testing.assert_close(*plain, rtol=0, atol=1e-5)
    with foveate.use(model, case(name, kind, 1)[0]) as run:
        want, kept = member.run(model, **fresh(row)).last_hidden_state[0, seen], run.kept
        got = member.run(model, **fresh(in_four)).last_hidden_state[0, seen]
        for place, index in run.kept[0].items():
            assert torch.equal(index, kept[0][place])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
