"""PaliGemma called directly, without the arguments that `generate` adds."""

import torch

import foveate
from foveate.core.budget import per_request
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.tolerance import TOLERANCE
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird


@torch.no_grad()
def states(inputs, method, **fields):
    """(B, T, D) last states with a method; those of removed tokens repeat others."""
    model = model_of("paligemma")
    with foveate.use(model, method, **fields):
        return model.model(**fresh(inputs)).last_hidden_state


def near(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_without_token_types_and_padding_all_tokens_see_all():
    """No mask is made then, and the kernel is told that attention goes both ways."""
    inputs, alone = batch_of(MEMBERS["paligemma"](), model_of("paligemma"), (1, 1))
    for part in (inputs, *alone):
        del part["token_type_ids"]
    keeps = 0.25, 0.75
    together = states(inputs, EveryThird(per_request(keeps)))
    for got, row, keep in zip(together, alone, keeps, strict=True):
        near(got, states(row, EveryThird(keep))[0])
    assert not torch.equal(states(alone[0], EveryThird(1.0)), states(alone[0], EveryThird(0.25)))


def test_padding_does_not_change_what_rotated_keys_say():
    """Positions begin at 1 and count padding, where they are left to the model."""
    inputs, alone = batch_of(MEMBERS["paligemma"](), model_of("paligemma"), (1, 2))
    together = states(inputs, "dart")
    for got, row in zip(together, alone, strict=True):
        want = states(row, "dart")[0]
        near(got[-len(want) :], want)
