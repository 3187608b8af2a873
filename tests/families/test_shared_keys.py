"""Layers that read the keys of earlier ones, from which fewer tokens were removed."""

import pytest
import torch

import foveate
from foveate.errors import UnsupportedModelError
from foveate.methods import PyramidDrop
from tests.conformance import oracle
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.oracle import Drop, Spec

CUTS = [("gemma3n", 5), ("gemma4", 3)]  # between the last two layers with keys of their own


def wide(name):
    """A member whose windows are longer than its prompts, so that attention needs no mask."""
    kind = MEMBERS[name]
    text = {**kind.text_config, "sliding_window": 64}
    return type(kind.__name__, (kind,), {"text_config": text})()


@torch.no_grad()
@pytest.mark.parametrize("rows", [[[5, 7]], [[5, 7], [2, 3, 9]]], ids=["one", "ragged"])
@pytest.mark.parametrize(("name", "layer"), CUTS)
def test_queries_see_no_later_keys_of_layers_that_kept_more(name, layer, rows):
    """The layer after the cut reads the keys of the one before it, of all tokens."""
    member = wide(name)
    model, eager = member.build(), member.build("eager")
    model.set_attn_implementation("sdpa")  # members share configs
    inputs = member.inputs(rows)
    with foveate.use(model, PyramidDrop((layer,), 4, "original")):
        got = model.model(**fresh(inputs)).last_hidden_state
    for row, pieces in enumerate(rows):
        alone = member.row(inputs, row)
        length = alone["input_ids"].shape[1]
        drops = [Drop(layer, layer, [4] * (len(pieces) - 1))]
        want, _ = oracle.run(member, eager, alone, Spec(drops=drops), length)
        text = alone["input_ids"][0] != member.image_id
        torch.testing.assert_close(got[row, -length:][text], want[text], rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "layer"), CUTS)
def test_flash_kernels_cannot_tell_which_of_them_come_later(name, layer, flash_emulated):
    member = wide(name)
    model = member.build(flash_emulated)
    with foveate.use(model, PyramidDrop((layer,), 4, "original")):
        for rows in ([[5, 7]], [[5, 7], [28]]):  # alone, and beside a row that is as long
            with pytest.raises(UnsupportedModelError, match=f"keys of layer {layer - 1}, from"):
                model.model(**fresh(member.inputs(rows)))
    with foveate.use(model, PyramidDrop((1,), 4, "original")):
        model.model(**fresh(member.inputs([[5, 7]])))
