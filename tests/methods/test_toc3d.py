"""ToC3D: who goes through a layer, what stands for the others, scores, and what it costs."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import VisualTokens, get_method
from foveate.errors import BudgetError, FoveateError, InputError, LayerError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.methods import ToC3D, ToMe
from foveate.methods.toc3d import TwoSpeeds
from tests.methods.conftest import Facts
from tests.vision.encoders import ENCODERS, SPECIAL, build, images, row_of

GRIDDED = ["vit", "deit", "dinov2", "dinov2-registers", "clip", "siglip"]


def layer_by_hand(layer, states, special, scores, share):
    """A layer at two speeds, of (B, N, D) states: one image after another."""
    out = []
    for rows, score in zip(states, scores, strict=True):
        patches, count = rows[special:], int(len(score) * share)
        order = sorted(range(len(score)), key=lambda n, score=score: (-float(score[n]), n))
        slow, fast = sorted(order[:count]), sorted(order[count:])
        weights = torch.tensor([float(score[n]) for n in fast])
        one = sum(w * patches[n] for w, n in zip(weights / weights.sum(), fast, strict=True))
        passed = layer(torch.cat((rows[:special], patches[slow], one[None]))[None], None)[0]
        after = patches + (passed[-1] - one)
        after[slow] = passed[special:-1]
        out.append(torch.cat((passed[:special], after)))
    return torch.stack(out)


def class_attention(layer, states, special, heads=4):
    """(B, V) attention of the first row to patches, the mean over heads, by whole maps."""
    names = [n for n in ("layernorm_before", "norm1", "layer_norm1") if hasattr(layer, n)]
    attention = getattr(layer, "attention", None) or layer.self_attn
    normed = getattr(layer, names[0])(states)
    query, key = (
        part(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj)
    )
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return weights[:, :, 0, special:].mean(1)


def distinct(patches):
    mean = patches.mean(1, keepdim=True)
    return 1 - (patches * mean).sum(-1) / patches.norm(dim=-1) / mean.norm(dim=-1)


@pytest.mark.parametrize("score", ["cls", "distinct"])
@pytest.mark.parametrize("name", GRIDDED)
def test_layers_equal_those_by_hand(name, score):
    """Scored before layers 1 and 3, and layer 2 as before layer 1."""
    special = SPECIAL.get(name, 0)
    if score == "cls" and not special:
        with pytest.raises(UnsupportedModelError, match="no class token"):
            foveate.use(build(ENCODERS, name), ToC3D(score="cls"))
        return
    model, inputs = build(ENCODERS, name, "eager"), images(name=name)
    method = ToC3D(share=(0.6, 0.3), scored=(1, 3), score=score)
    with torch.no_grad(), foveate.use(model, method) as run:
        states = model(**inputs, output_hidden_states=True).hidden_states
    layers = find_family(model).encoder.layers
    scores = {}
    with torch.no_grad():
        for number, share in ((1, 0.6), (2, 0.6), (3, 0.3)):
            before = states[number]
            if number != 2:
                scores = (
                    class_attention(layers[number], before, special)
                    if score == "cls"
                    else distinct(before[:, special:])
                )
            want = layer_by_hand(layers[number], before, special, scores, share)
            torch.testing.assert_close(states[number + 1], want, rtol=0, atol=5e-5)
    assert all(len(kept) == 36 for image in run.kept for kept in image.values())
    rows = [special + 36, special + 22, special + 22, special + 11]
    assert run.record.encoder_tokens == [(n, n) for n in rows]


def shown(x, step, memory=None, **signals):
    index = torch.arange(x.shape[1]).expand(len(x), -1)
    return VisualTokens(
        lambda: x, index, (1, x.shape[1]), step=step, signals=signals,
        memory={} if memory is None else memory,
    )  # fmt: skip


def test_the_representative_weighs_the_best_of_the_others_most():
    """Unlike in the release, where log-probabilities divided by their sum do the opposite."""
    x = torch.eye(5)[None]
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]])
    tokens = shown(
        x, TwoSpeeds("vision", 0, share=0.4, scored=True), cls_attention=scores[:, None, None]
    )
    entered = ToC3D().enter(tokens, x)
    assert entered.shape == (1, 3, 5)
    assert torch.equal(entered[0, :2], x[0, [1, 3]])
    want = torch.tensor([0.1, 0.0, 0.2, 0.0, 0.05]) / 0.35
    torch.testing.assert_close(entered[0, 2], want)
    log = scores.log()[0, [0, 2, 4]]
    assert (log / log.sum()).argmax() == 2, "as the release has it, the least weighs most"


def test_others_gain_what_their_representative_does():
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    tokens = shown(x, TwoSpeeds("vision", 0, share=0.5, scored=True))
    method = ToC3D(score="distinct")
    entered = method.enter(tokens, x)
    gain = torch.randn(2, 4, 4)
    after = method.leave(tokens, x, entered + gain)
    index = distinct(x).topk(3).indices.sort().values
    for image in range(2):
        slow = index[image].tolist()
        for n in range(6):
            own = gain[image, slow.index(n)] if n in slow else gain[image, 3]
            torch.testing.assert_close(after[image, n], x[image, n] + own)


def test_no_score_is_below_zero():
    """One less a cosine may round to less, and its weight would then be of another sign."""
    x = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(0)).expand(64, 20, 24)
    x = x + 1e-5 * torch.randn(64, 20, 24, generator=torch.Generator().manual_seed(1))
    index = torch.arange(20).expand(64, -1)
    assert ToC3D(score="distinct").scores(VisualTokens(lambda: x, index, (4, 5))).min() == 0


def test_scores_of_nothing_weigh_all_others_alike():
    x = torch.randn(1, 4, 3)
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    tokens = shown(
        x, TwoSpeeds("vision", 0, share=0.25, scored=True), cls_attention=scores[:, None, None]
    )
    entered = ToC3D().enter(tokens, x)
    torch.testing.assert_close(entered[0, 1], x[0, 1:].mean(0))


@pytest.mark.parametrize("name", GRIDDED)
def test_everything_through_changes_no_bit(name):
    model, inputs = build(ENCODERS, name), images(name=name)
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        with foveate.use(model, ToC3D(share=1.0)):
            assert torch.equal(model(**inputs).last_hidden_state, want)
        with foveate.use(model, ToC3D()):
            assert (model(**inputs).last_hidden_state - want).abs().max() > 0.01


@pytest.mark.parametrize("name", ["deit", "siglip"])
def test_batch_equals_rows(name):
    model, inputs = build(ENCODERS, name), images(4, name=name)
    with torch.no_grad(), foveate.use(model, ToC3D(share=0.4)):
        together = model(**inputs).last_hidden_state
        for row in range(4):
            alone = model(**row_of(inputs, row)).last_hidden_state
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=2e-5)


METHODS = [
    ToC3D(), ToC3D(share=0.4, score="distinct"), ToC3D(share=(0.5,), scored=(0,)),
    ToC3D(share=0.01), ToC3D(share=0.3, layers=(1, 3)), ToC3D(share=1.0),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "clip", "siglip"])
def test_predicted_flops_equal_the_ones_torch_counts(name, method):
    model, inputs = build(ENCODERS, name, "eager"), images(2, name=name)
    counter = FlopCounterMode(display=False)
    with foveate.use(model, method) as run, torch.no_grad(), counter:
        model(**inputs)
    assert account(run.record, run.family, run.methods).total == counter.get_total_flops()


# -- queries


def test_queries_of_the_caller_score():
    model, inputs = build(ENCODERS, "vit", "eager"), images(2)
    queries = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)) * 3
    method = ToC3D(share=(0.5,), scored=(2,), queries=lambda: queries)
    with torch.no_grad(), foveate.use(model, method):
        states = model(**inputs, output_hidden_states=True).hidden_states
        before = states[2]
        scores = torch.zeros(2, 36)
        for image in range(2):
            for query in queries[image]:
                scores[image] += (before[image, 1:] @ query / 32**0.5).softmax(0) / 5
        layer = find_family(model).encoder.layers[2]
    with torch.no_grad():
        want = layer_by_hand(layer, before, 1, scores, 0.5)
    torch.testing.assert_close(states[3], want, rtol=0, atol=5e-5)


def test_queries_may_change_from_pass_to_pass_and_be_shared_by_images():
    model, inputs, now = build(ENCODERS, "siglip"), images(2, name="siglip"), []
    method = ToC3D(share=0.3, queries=lambda: now[-1])
    found = []
    with torch.no_grad(), foveate.use(model, method):
        for seed in (0, 1, 0):
            now.append(torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * 3)
            found.append(model(**inputs).last_hidden_state)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("shape", [(4, 31), (3, 4, 32), (32,)])
def test_queries_that_do_not_fit_are_refused(shape):
    model = build(ENCODERS, "vit")
    with (
        foveate.use(model, ToC3D(queries=lambda: torch.zeros(shape))),
        pytest.raises(InputError, match="needs queries of"),
    ):
        model(**images(2))


def test_queries_are_named_in_what_is_written_down():
    said = ToC3D(queries=lambda: torch.zeros(1, 8)).to_dict()
    assert said["queries"] == "given by the caller"
    assert json.loads(json.dumps(said)) is not None
    assert ToC3D().to_dict()["queries"] is None


# -- steps


def test_published_layers_and_shares():
    facts = Facts(vision_layers=24, feature_layer=23)
    steps = ToC3D().steps(facts)
    assert [step.layer for step in steps] == list(range(6, 24))
    assert [step.layer for step in steps if step.scored] == [6, 12, 18]
    assert [step.share for step in steps] == [0.7] * 6 + [0.5] * 12
    assert [bool(step.needs) for step in steps] == [step.scored for step in steps]
    assert ToC3D().entering(100, steps[0]) == 71
    some = ToC3D(scored=(1, 4), share=(0.5, 0.2), layers=(2, 3, 6)).steps(facts)
    assert [(s.layer, s.scored, s.share) for s in some] == [
        (2, True, 0.5), (3, False, 0.5), (6, True, 0.2),
    ]  # fmt: skip


def test_gradients_reach_every_layer():
    model = build(ENCODERS, "vit").train()
    with foveate.use(model, ToC3D(share=0.4)):
        model(**images()).last_hidden_state.square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "layers" in n and p.dim() > 1]
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(UnsupportedModelError, match="may differ from image to image"):
        foveate.use(build(ENCODERS, "siglip2"), ToC3D())
    with pytest.raises(LayerError, match="tome"):
        foveate.use(build(ENCODERS, "vit"), [ToMe(r=(0, 3)), ToC3D()])
    with pytest.raises(BudgetError, match="removes no tokens"):
        ToC3D(keep=0.5)
    with pytest.raises(LayerError, match="scored must be ascending"):
        ToC3D(scored=(3, 1), share=0.5)
    with pytest.raises(FoveateError, match="one for each of 3 scorings"):
        ToC3D(share=(0.5, 0.5))
    with pytest.raises(FoveateError, match="share must be"):
        ToC3D(share=1.5)


def test_defaults_and_registration():
    method = get_method("toc3d")()
    assert isinstance(method, ToC3D)
    assert (method.share, method.scored, method.score) == ((0.7, 0.5, 0.5), None, None)
    assert not method.removes


def test_queries_are_a_function():
    with pytest.raises(FoveateError, match="queries must be a function"):
        ToC3D(queries=torch.zeros(2, 4))
