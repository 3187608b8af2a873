"""EoMT: methods act before queries are put in, and all patches are back then."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import LayerError, UnsupportedModelError
from foveate.measure.account import account
from foveate.methods import ClsDrop, ToMe
from tests.methods_for_tests import Listed
from tests.vision import oracle
from tests.vision.encoders import LAYERS
from tests.vision.kinds import EOMTS, LAST, REGISTERS, eomt
from tests.vision.oracle import Drop, Merge
from tests.vision.test_encoders import TOLERANCE, distance

SPECIAL = 1 + REGISTERS
CASES = {
    "tome": (ToMe(r=5), [Merge(n, 5) for n in range(LAYERS)]),
    "tome-unweighted": (ToMe(r=5, prop_attn=False), [Merge(n, 5, False) for n in range(LAYERS)]),
    "cls-drop": (ClsDrop(layers=(1,), keep=10), [Drop(1, 10)]),
    "before": (Listed(layer=2), [Drop(2, listed=list(range(0, 36, 3)))]),
}


class EomtLayer(oracle.Full):
    """A layer of DINOv2."""

    def __init__(self, *args):
        super().__init__(*args)
        output = "out_proj" if self.rotary is None else "o_proj"
        self.names = ("norm1", "attention", "norm2", output)


class First:
    """A model of which only the first layers are run."""

    def __init__(self, model):
        self.config, self.layers = model.config, model.layers[:LAYERS]


def rotary_of(model, given):
    """Cosines and sines of the patches, if there are any."""
    rotary = getattr(model, "rope_embeddings", None)
    return None if rotary is None else rotary(given)


def pixels():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 48, 48, generator=generator)


def by_hand(model, states, given):
    """What the plain model makes of (B, N, D) states once its first layers have run."""
    hook = model.layers[LAYERS - 1].register_forward_hook(lambda module, args, out: states)
    try:
        return model(given)
    finally:
        hook.remove()


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EOMTS)
def test_queries_read_all_patches_of_the_full_length_oracle(name, case, masks):
    model, given = eomt(queries_attend_to_masks=masks, name=name), pixels()
    method, steps = CASES[case]
    with torch.no_grad():
        plain = model(given, output_hidden_states=True, output_attentions=True)
        embedded = plain.hidden_states[0]
        rotary = rotary_of(model, given)
        results = oracle.run(First(model), SPECIAL, embedded, steps, None, rotary, EomtLayer)
        with foveate.use(model, method) as run:
            got = model(given, output_hidden_states=True, output_attentions=True)
        states = torch.stack([full.states[-1] for full in results])
        want = by_hand(model, states, given)
    for number in range(LAYERS + 1):
        for row, full in enumerate(results):
            assert distance(got.hidden_states[number][row], full.states[number]) <= TOLERANCE
    for one, other in zip(got.hidden_states, plain.hidden_states, strict=True):
        assert one.shape == other.shape
    for one, other in zip(got.attentions, plain.attentions, strict=True):
        assert one.shape == other.shape
    for name in ("masks_queries_logits", "class_queries_logits"):
        assert distance(got[name], want[name]) <= 10 * TOLERANCE
        assert distance(got[name], plain[name]) > 0.01, "the test does not bite"
    assert {image.grid for image in run.record.images} == {(6, 6)}
    assert len(run.record.encoder_tokens) == LAYERS


@pytest.mark.parametrize("method", [ToMe(r=0), ToMe(keep=1.0), Listed(keep=1.0)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EOMTS)
def test_keeping_everything_changes_no_bit(name, method, attention):
    model, given = eomt(attention, name=name), pixels()
    with torch.no_grad():
        want = model(given)
        with foveate.use(model, method) as run:
            got = model(given)
            assert {image.total for image in run.record.images} == {36}
    assert torch.equal(got.masks_queries_logits, want.masks_queries_logits)
    assert torch.equal(got.class_queries_logits, want.class_queries_logits)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EOMTS)
def test_batch_equals_rows(name, case):
    model, given = eomt("sdpa", name=name), pixels()
    with torch.no_grad(), foveate.use(model, CASES[case][0]):
        together = model(given).masks_queries_logits
        alone = torch.cat([model(row[None]).masks_queries_logits for row in given])
    assert distance(together, alone) <= 10 * TOLERANCE


@pytest.mark.parametrize(
    "method", [Listed(keep=1.0), Listed(layer=0), Listed(layer=LAYERS - 1, inside=True)]
)
@pytest.mark.parametrize("name", EOMTS)
def test_predicted_flops_equal_the_ones_torch_counts(name, method):
    model, given = eomt(name=name), pixels()
    with torch.no_grad(), foveate.use(model, method) as run:
        with FlopCounterMode(display=False) as counter:
            model(given)
        assert account(run.record, run.family, run.methods).total == counter.get_total_flops()


def test_layers_with_queries_are_refused():
    with pytest.raises(LayerError, match=r"queries are put in before layer 4 .* layers 0 to 3"):
        foveate.use(eomt(), Listed(layer=LAYERS))
    with pytest.raises(UnsupportedModelError, match="before its first layer"):
        foveate.use(eomt(blocks=LAYERS + LAST), ToMe())
