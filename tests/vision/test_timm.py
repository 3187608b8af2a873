"""Inside ViTs of timm, as transformers wraps them. `make timm` runs these tests."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import InputError, UnsupportedModelError
from foveate.measure.account import account
from foveate.methods import ClsDrop, FlowCut, ToMe
from tests.methods_for_tests import Listed, Mix
from tests.vision import oracle
from tests.vision.encoders import LAYERS, PATCHES, images, row_of
from tests.vision.test_encoders import CASES, TOLERANCE, distance

pytest.importorskip("timm", reason="needs timm: make timm")
from tests.vision.timms import VITS, TimmLayer, embedded, make

PAIRS = [
    (name, case)
    for name in VITS
    for case in CASES
    if name not in ("average", "mapped") or not CASES[case][2]
]
FEW = [pair for pair in PAIRS if pair[1] in ("tome", "cls-drop-3", "before")]


def expected(name, model, inputs, steps):
    """The plain output of a model, and the oracle of each image."""
    plain, rows = embedded(model, inputs)
    return plain, oracle.run(model, VITS[name][1], rows, steps, kind=TimmLayer)


def read(output):
    """Everything in an output, in order."""
    return [
        output[key] for key in ("last_hidden_state", "pooler_output", "logits") if key in output
    ]


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_the_oracle_itself_equals_the_encoder(name):
    model = make(name)
    plain, results = expected(name, model, images(), [])
    for row, full in enumerate(results):
        assert distance(plain.last_hidden_state[row], model.timm_model.norm(full.x)) <= TOLERANCE


@pytest.mark.parametrize(("name", "case"), PAIRS)
@torch.no_grad()
def test_all_that_is_returned_equals_the_full_length_oracle(name, case):
    model, inputs, special = make(name), images(), VITS[name][1]
    method, steps, _ = CASES[case]
    plain, results = expected(name, model, inputs, steps)
    with foveate.use(model, method) as run:
        got, maps = model(**inputs), model(**inputs, output_hidden_states=True)
    norm = model.timm_model.norm
    for row, full in enumerate(results):
        worst = distance(got.last_hidden_state[row], norm(full.filled()))
        for number, of in enumerate(maps.hidden_states):
            want = full.states[number + 1][special:].T.view(32, 6, 6)
            worst = max(worst, distance(of[row], want))
        bite = distance(plain.last_hidden_state[row], got.last_hidden_state[row])
        print(f"distance to the oracle {worst:.1e}, to the unpruned encoder {bite:.2f}")
        assert worst <= TOLERANCE
        assert bite > 0.05, "the test does not bite"
        assert list(run.kept[row]) == list(full.kept)
        for place, kept in full.kept.items():
            assert torch.equal(run.kept[row][place], kept)
    assert torch.equal(got.last_hidden_state, maps.last_hidden_state)
    pooled = model.timm_model.forward_head(got.last_hidden_state)
    assert torch.equal(got.pooler_output, pooled)


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_classifiers_read_all_rows(name):
    """timm's head over the states of the encoder alone, which the oracle vouches for."""
    model, encoder, inputs = make(name, head=True), make(name), images()
    encoder.load_state_dict(model.state_dict(), strict=False)
    plain = model(**inputs).logits
    for method in (ToMe(r=5), Listed(layer=2)):
        with foveate.use(model, method), foveate.use(encoder, method):
            got, states = model(**inputs).logits, encoder(**inputs).last_hidden_state
            as_tuple = model(**inputs, return_dict=False)[0]
        assert torch.equal(got, model.timm_model.forward_head(states))
        assert torch.equal(got, as_tuple)
        assert (got - plain).abs().max() > 1e-3, "the test does not bite"
    assert torch.equal(model(**inputs).logits, plain), "the model is not as it was"


@pytest.mark.parametrize("method", [ToMe(r=0), Listed(keep=1.0), Listed(0, 1.0, inside=True)])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_keeping_everything_changes_no_bit(name, head, method):
    model, inputs = make(name, head), images()
    want = model(**inputs, output_hidden_states=True)
    with foveate.use(model, method) as run:
        got = model(**inputs, output_hidden_states=True)
        assert [image.total for image in run.record.images] == [PATCHES] * 3
    assert all(map(torch.equal, read(got), read(want)))
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))


@pytest.mark.parametrize(("name", "case"), FEW)
@torch.no_grad()
def test_batch_equals_rows(name, case):
    model, inputs = make(name), images(4)
    with foveate.use(model, CASES[case][0]) as run:
        together, kept = model(**inputs).last_hidden_state, run.kept
        for row in range(4):
            alone = model(**row_of(inputs, row)).last_hidden_state
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=5e-5)
            for place, index in kept[row].items():
                assert torch.equal(run.kept[0][place], index)


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_attention_that_is_not_fused_agrees(name):
    model, inputs, got = make(name), images(), []
    for fused in (True, False):
        for block in model.timm_model.blocks:
            block.attn.fused_attn = fused
        with foveate.use(model, ToMe(r=6)):
            got.append(model(**inputs).last_hidden_state)
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", [Listed(keep=1.0), Listed(layer=0), Listed(2, inside=True)])
@pytest.mark.parametrize("name", ["plain", "registers", "average"])
@torch.no_grad()
def test_predicted_flops_equal_the_ones_torch_counts(name, method):
    model, inputs = make(name, head=True), images(2)
    for block in model.timm_model.blocks:
        block.attn.fused_attn = False
    with foveate.use(model, method) as run:
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        counted = account(run.record, run.family, run.methods).total
    assert counted == counter.get_total_flops()


@torch.no_grad()
def test_a_dense_reduction_comes_back_to_full_length():
    model = make("registers")
    with foveate.use(model, Mix(layer=1, keep=9)) as run:
        out = model(**images(), output_hidden_states=True)
    assert {tuple(of.shape) for of in out.hidden_states} == {(3, 32, 6, 6)}
    assert out.last_hidden_state.isfinite().all()
    assert [n for n, _ in run.record.encoder_tokens] == [40, 40, 13, 13]


@pytest.mark.parametrize("wanted", [1, [0, 2]])
@torch.no_grad()
def test_maps_of_some_layers_are_those_of_all(wanted):
    model, inputs = make(), images()
    with foveate.use(model, ToMe(r=5)):
        every = model(**inputs, output_hidden_states=True).hidden_states
        some = model(**inputs, output_hidden_states=wanted).hidden_states
    chosen = range(LAYERS) if wanted == 1 else wanted
    assert all(map(torch.equal, some, [every[number] for number in chosen]))


@torch.no_grad()
def test_images_of_other_sizes_have_the_grid_that_timm_gives_them():
    model = make(dynamic_img_size=True, dynamic_img_pad=True)
    with foveate.use(model, ToMe(r=5)) as run:
        model(torch.randn(2, 3, 30, 64))
        assert [image.grid for image in run.record.images] == [(4, 8)] * 2


@pytest.mark.parametrize("head", [False, True])
def test_gradients_are_finite_and_checkpointing_is_refused(head):
    model, inputs = make(head=head).train(), images()
    with foveate.use(model, ToMe(r=5)):
        read(model(**inputs))[0].square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(of.isfinite().all() for of in grads.values())
        assert grads["timm_model.patch_embed.proj.weight"].abs().sum() > 0
        model.gradient_checkpointing_enable()
        with pytest.raises(UnsupportedModelError, match="runs layers again"):
            model(**inputs)
        model.eval()(**inputs)


@pytest.mark.parametrize("told", [{"attn_mask": torch.ones(37, 37).bool()}, {"is_causal": True}])
def test_masks_are_refused(told):
    model = make()
    with foveate.use(model, ToMe(r=5)), pytest.raises(InputError, match=f"{next(iter(told))}, wh"):
        model(**images(), **told)


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("resnet18", {}, "is of class ResNet"),
        ("eva02_tiny_patch14_224", {"depth": 2}, "is of class Eva"),
        ("vit_small_patch16_18x2_224", {"depth": 1}, "has a ParallelThingsBlock among"),
        ("vit_tiny_patch16_224", {"depth": 1, "qk_norm": True}, "norms queries and keys"),
        ("vit_tiny_patch16_224", {"depth": 1, "patch_drop_rate": 0.5}, "drops patches at random"),
        ("vit_tiny_patch16_224", {"depth": 1, "attn_layer": "diff"}, "attends by DiffAttention"),
    ],
)
def test_other_models_of_timm_are_refused(architecture, changes, why):
    model = make(architecture=architecture, **changes)
    with pytest.raises(UnsupportedModelError, match=f"holds a model of timm that {why}"):
        foveate.use(model, ToMe())


@pytest.mark.parametrize("method", [ToMe(r=5), ClsDrop(layers=(1,)), FlowCut(keep=9, every=2)])
@torch.no_grad()
def test_half_precision_stays_half(method):
    model = make().bfloat16()
    with foveate.use(model, method):
        got = model(**images()).last_hidden_state
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
