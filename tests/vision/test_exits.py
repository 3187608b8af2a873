"""Tokens that leave an encoder early: a loop over images, batches, accounts, training, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import FoveateError, InputError, LayerError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.methods import DToP, ToMe
from foveate.methods.dtop import canvas_of
from foveate.ops.token_heads import LinearHead, QueryHead, probabilities
from foveate.training.prepare import session_of
from tests.tinies import tiny_llava
from tests.vision import dense
from tests.vision.encoders import ENCODERS, HEADS, PATCHES, SPECIAL, SQUARE, build, images, row_of

CLASSES, WIDTH, EXITS = 5, 32, (0, 2)
KINDS = {"linear": LinearHead, "queries": QueryHead}


def heads_of(kind="linear", exits=EXITS):
    torch.manual_seed(3)
    heads = [KINDS[kind](WIDTH, CLASSES).requires_grad_(False) for _ in exits]
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)  # or all classes are as likely
    return heads


def method_of(kind="linear", threshold=0.6, context=2, exits=EXITS):
    return DToP(exits=exits, threshold=threshold, context=context, heads=heads_of(kind, exits))


def threshold_of(kind):
    return {"linear": 0.75, "queries": 0.3}[kind]


def layers_of(model):
    return find_family(model).encoder.layers


def chosen(shares, threshold, context):
    """Which of (n, C) probabilities are sure, less the surest of each class: by plain loops."""
    leave = set()
    for of in range(shares.shape[1]):
        rows = [n for n in range(len(shares)) if shares[n].argmax() == of]
        sure = [n for n in rows if shares[n, of] > threshold]
        sure.sort(key=lambda n: -shares[n, of].item())
        leave |= set(sure[context:])
    return leave


def walk(model, method, states, special):
    """One image, token by token: states that leave and states of the last layer, in their places.

    Args:
        states: (N, D) input of the first layer.

    Returns:
        (N, D) states, (V, C) what heads said, and (V) layers after which tokens left.
    """
    full, rows = states.clone(), list(range(len(states)))
    logits = torch.zeros(len(states) - special, CLASSES)
    layers = torch.full((len(states) - special,), -1)
    for number, layer in enumerate(layers_of(model)):
        out = layer(full[rows][None], None)
        full[rows] = (out if isinstance(out, torch.Tensor) else out[0])[0]
        if number not in method.exits:
            continue
        patches = [row for row in rows if row >= special]
        said = method.heads[method.exits.index(number)](full[patches][None])
        of_tokens, present = (said[0].mT, said[1]) if isinstance(said, tuple) else (said, None)
        logits[[row - special for row in patches]] = of_tokens[0]
        shares = probabilities(of_tokens, present)[0]
        left = [patches[n] for n in chosen(shares, method.threshold, method.context)]
        layers[[row - special for row in left]] = number
        rows = [row for row in rows if row not in left]
    return full, logits, layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SQUARE)
def test_states_and_canvas_are_those_of_a_loop_over_images(name, kind):
    model, inputs = build(ENCODERS, name), images()
    method, special = method_of(kind, threshold_of(kind)), SPECIAL.get(name, 0)
    norm = getattr(model, "layernorm", getattr(model, "post_layernorm", None))
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with foveate.use(model, method) as run:
            got = model(**inputs).last_hidden_state
            canvas = canvas_of(run)
        for row, states in enumerate(plain.hidden_states[0]):
            want, logits, layers = walk(model, method, states, special)
            want = want if name == "clip" else norm(want)
            torch.testing.assert_close(got[row], want, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(canvas.logits[row], logits, rtol=1e-4, atol=5e-5)
            assert torch.equal(canvas.layer[row], layers)
            kept = [(layers < 0) | (layers > exit) for exit in EXITS]
            assert [part.tolist() for part in run.kept[row].values()] == [
                part.nonzero()[:, 0].tolist() for part in kept
            ]
    for exit in EXITS:
        assert 0 < int((canvas.layer == exit).sum()) < PATCHES * 3, "the test does not bite"
    assert len(set(canvas.finished.sum(1).tolist())) > 1, "images lose equally many"


def test_states_of_layers_hold_tokens_as_they_left():
    model, inputs = build(ENCODERS, "vit"), images()
    with torch.no_grad(), foveate.use(model, method_of(threshold=0.75)) as run:
        out = model(**inputs, output_hidden_states=True)
        layer = canvas_of(run).layer
    states = [of[:, 1:] for of in out.hidden_states]
    for exit in EXITS:
        left = layer == exit
        for later in states[exit + 2 : -1]:
            assert torch.equal(later[left], states[exit + 1][left])
    stayed = layer < 0
    assert not torch.isclose(states[4][stayed], states[3][stayed]).all(-1).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SQUARE)
def test_at_threshold_one_no_bit_changes_and_heads_see_all(name, kind):
    model, inputs, method = build(ENCODERS, name), images(), method_of(kind, 1.0)
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
        with foveate.use(model, method) as run:
            got = model(**inputs, output_hidden_states=True)
            canvas = canvas_of(run)
        special = SPECIAL.get(name, 0)
        for exit, head, stage in zip(EXITS, method.heads, canvas.stages, strict=True):
            said = head(want.hidden_states[exit + 1][:, special:])
            torch.testing.assert_close(stage, said[0].mT if isinstance(said, tuple) else said)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))
    assert torch.equal(got.pooler_output, want.pooler_output)
    assert not canvas.finished.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SQUARE)
def test_batch_equals_rows(name, kind):
    model, inputs = build(ENCODERS, name), images(4)
    with torch.no_grad(), foveate.use(model, method_of(kind, threshold_of(kind))) as run:
        together, canvas = model(**inputs), canvas_of(run)
        for row in range(4):
            alone, own = model(**row_of(inputs, row)), canvas_of(run)
            assert torch.equal(own.layer[0], canvas.layer[row])
            torch.testing.assert_close(own.logits[0], canvas.logits[row], rtol=1e-4, atol=5e-5)
            for key in ("last_hidden_state", "pooler_output"):
                if together[key] is not None:
                    torch.testing.assert_close(
                        together[key][row], alone[key][0], rtol=1e-4, atol=2e-5
                    )


def test_a_pooling_head_reads_tokens_as_they_left():
    model, inputs = build(ENCODERS, "siglip"), images()
    with torch.no_grad(), foveate.use(model, method_of(threshold=0.75)) as run:
        got = model(**inputs)
        assert canvas_of(run).finished.any()
    with torch.no_grad():
        want = model.head(got.last_hidden_state)
    torch.testing.assert_close(got.pooler_output, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "clip"])
def test_predicted_flops_equal_the_ones_torch_counts(name, count, kind):
    model, inputs = build(ENCODERS, name, "eager"), images(count)
    method = method_of(kind, threshold_of(kind))
    with foveate.use(model, method) as run, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        assert account(run.record, run.family, run.methods).total == counter.get_total_flops()


@pytest.mark.parametrize("threshold", [1.0, 0.9, 0.75, 0.5])
def test_flops_follow_from_the_share_that_leaves_at_each_exit(threshold):
    model, inputs = build(ENCODERS, "vit", "eager"), images(1)
    with foveate.use(model, method_of(threshold=threshold)) as run, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        layer = canvas_of(run).layer[0]
    rates = [(layer == exit).float().mean().item() for exit in EXITS]
    total, left = 0, 0.0
    for number in range(4):
        rows = 1 + round(PATCHES * (1 - left))
        total += 2 * rows * (4 * 32 * 32 + 2 * 32 * 64) + 4 * rows * rows * 32
        if number in EXITS:
            total += 2 * (rows - 1) * 32 * CLASSES
            left += rates[EXITS.index(number)]
    patches, pooler = 2 * PATCHES * 3 * 8 * 8 * 32, 2 * 32 * 32
    assert total + patches + pooler == counter.get_total_flops()


def test_canvas_is_filled_with_what_a_last_head_says():
    model, inputs = build(ENCODERS, "vit"), images()
    torch.manual_seed(0)
    last = LinearHead(WIDTH, CLASSES)
    with torch.no_grad(), foveate.use(model, method_of(threshold=0.75)) as run:
        final = last(model(**inputs).last_hidden_state[:, 1:])
        canvas = canvas_of(run)
    found = canvas.filled(final)
    assert torch.equal(found[canvas.finished], canvas.logits[canvas.finished])
    assert torch.equal(found[~canvas.finished], final[~canvas.finished])
    cells = canvas.map(final)
    assert torch.equal(cells[1, :, 2, 3], found[1, 2 * 6 + 3])
    assert canvas.map(final, (48, 48)).shape == (3, CLASSES, 48, 48)


@pytest.mark.parametrize("name", dense.DENSE)
def test_dense_models_read_tokens_as_they_left(name):
    model = dense.build(dense.DENSE[name])
    given = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(given)
        with foveate.use(model, method_of(threshold=0.75)) as run:
            got = model(given)
            assert canvas_of(run).finished.any()
        with foveate.use(model, method_of(threshold=1.0)):
            whole = model(given)
    key = next(k for k in ("predicted_depth", "logits") if k in plain)
    assert torch.equal(whole[key], plain[key])
    assert got[key].shape == plain[key].shape
    assert not torch.equal(got[key], plain[key])


# -- training


def test_heads_of_its_own_are_trained_saved_and_loaded(tmp_path):
    model, inputs = build(HEADS, "vit"), images()
    method = DToP(exits=EXITS, threshold=0.3, context=2, classes=CLASSES)
    before = set(dict(model.named_parameters()))
    foveate.prepare(model.train(), method)
    added = set(dict(model.named_parameters())) - before
    assert {name.split(".")[:3][-1] for name in added} == {"0", "1"}
    assert all(name.startswith("foveate.0.") for name in added)
    labels = torch.randint(0, CLASSES, (3, PATCHES), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(12):
        loss = model(**inputs).logits.square().mean()
        for stage in canvas_of(session_of(model)).stages:
            loss = loss + nn.functional.cross_entropy(stage.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert all(p.grad.abs().max() > 0 for p in model.foveate.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    foveate.save(model.eval(), tmp_path)
    again = foveate.load(tmp_path)
    assert session_of(again).methods == (method,)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    stages = [canvas_of(session_of(of)).logits for of in (again, model)]
    assert torch.equal(*stages)


def test_heads_that_were_given_are_trained_but_not_saved(tmp_path):
    model, method = build(HEADS, "vit"), method_of()
    foveate.prepare(model, method)
    assert {id(p) for head in method.heads for p in head.parameters()} <= set(
        map(id, model.parameters())
    )
    with pytest.raises(InputError, match=r"dtop cannot be saved.*heads must be a module"):
        foveate.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- refusals, removal


def test_what_cannot_be_served_is_refused_with_the_reason():
    vit, heads = build(ENCODERS, "vit"), heads_of()
    given = DToP(exits=EXITS, heads=heads)
    with pytest.raises(UnsupportedModelError, match=r"for encoders alone, but '.*' has a lang"):
        foveate.use(tiny_llava(), DToP(exits=(0,), heads=heads[:1]))
    padded = images(name="siglip2")
    padded["pixel_attention_mask"][1, 30:] = 0
    siglip2 = build(ENCODERS, "siglip2")
    with (
        pytest.raises(UnsupportedModelError, match="dtop does not act on images that"),
        foveate.use(siglip2, given),
    ):
        siglip2(**padded)
    with pytest.raises(UnsupportedModelError, match=r"give heads=.*or classes="):
        foveate.use(vit, DToP(exits=EXITS))
    with pytest.raises(LayerError, match=r"after layer 3, but this vit has layers 0 to 3"):
        foveate.use(vit, DToP(exits=(3,), heads=heads[:1]))
    with pytest.raises(LayerError, match="tome acts at vision:0 of an encoder that dtop lets"):
        foveate.use(vit, [ToMe(), given])
    flash = copy.deepcopy(vit)
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"does not take; set .* 'sdpa'\. Methods"):
        foveate.use(flash, given)
    with pytest.raises(FoveateError, match="a module for each of the 2 exits"):
        DToP(exits=EXITS, heads=heads[:1])
    with pytest.raises(FoveateError, match="give one"):
        DToP(exits=EXITS, heads=heads, classes=3)
    with pytest.raises(LayerError, match="ascending"):
        DToP(exits=(3, 1))
    with pytest.raises(InputError, match="has not run"):
        canvas_of(foveate.use(vit, given))
    with pytest.raises(InputError, match="has not run"):
        canvas_of(foveate.use(vit, ToMe()))
    with (
        pytest.raises(FoveateError, match=r"returns logits \(G, n, C\).*returned \(3, 32\)"),
        foveate.use(vit, DToP(exits=(1,), heads=[Mean()])),
    ):
        vit(**images())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_the_model_is_as_it_was():
    model, inputs = build(ENCODERS, "vit"), images()
    before = [(name, dict(vars(module))) for name, module in model.named_modules()]
    want = model(**inputs).last_hidden_state
    with foveate.use(model, method_of()):
        model(**inputs)
    after = [(name, dict(vars(module))) for name, module in model.named_modules()]
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(set(a) == set(b) for (_, a), (_, b) in zip(after, before, strict=True))
    assert torch.equal(model(**inputs).last_hidden_state, want)
