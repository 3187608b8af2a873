"""Methods that learn: what training computes, what inference does with it, and how it is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.core.learning import soft_top
from foveate.errors import BudgetError, FoveateError, InputError, UnsupportedModelError
from foveate.methods import (
    M3,
    ATPLLaVA,
    CoViPAL,
    DivPrune,
    FastV,
    OrderedQueries,
    TokenFLEX,
    VisionSelector,
)
from foveate.training.prepare import session_of
from tests.training.batches import Llava, batch, called

KIND = Llava()
LEARNING = (
    M3(scales=(36, 9, 1)),
    TokenFLEX(counts=(4, 9), chances=(0.5, 0.5)),
    VisionSelector(keep=9, inner=16),
    CoViPAL(inner=16),
    CoViPAL(stage_of_training="end_to_end", inner=16),
    ATPLLaVA(layers=(1, 3)),
    OrderedQueries(queries=16, keep=8),
)
WITH_PARAMETERS = LEARNING[1:]


def id_of(method):
    return f"{method.slug}-{getattr(method, 'stage_of_training', '')}".strip("-")


THRESHOLDS = ((0.45, 0.6), (0.6, 0.3))  # the second would take tokens back that the first drops


@pytest.fixture
def model():
    return KIND.build()


@pytest.fixture
def inputs():
    return called(batch(KIND, "text", "left")[0])


def stirred(model, scale=0.002):
    """Give what a method has learned other values, which are the same each time."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in session_of(model).learned.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def with_thresholds(model, *thresholds):
    """Give ATP-LLaVA's steps these thresholds of redundancy; nothing is kept for coverage."""
    with torch.no_grad():
        for step, threshold in zip(session_of(model).learned["0"].steps, thresholds, strict=True):
            step[1].weight.zero_()
            step[1].bias.copy_(torch.tensor([threshold, 1 - 1e-6]).logit())


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("method", LEARNING, ids=id_of)
def test_gradients_are_finite_and_reach_what_is_learned(model, inputs, method):
    foveate.prepare(model, method)
    stirred(model)
    out = model.train()(**inputs)
    out.loss.backward()
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    learned = list(session_of(model).learned.parameters())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert all(float(p.grad.abs().max()) > 0 for p in learned)
    assert all(
        float(p.grad.abs().max()) > 0 for p in model.model.language_model.layers.parameters()
    )


@pytest.mark.parametrize("method", WITH_PARAMETERS, ids=id_of)
def test_the_method_alone_is_trained_if_asked(model, inputs, method):
    before = copy.deepcopy(model.state_dict())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    foveate.prepare(model, method, train="method")
    stirred(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in session_of(model).learned.parameters()}
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    model.train()(**inputs).loss.backward()
    optimizer.step()
    session_of(model).remove()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_methods_that_repeat_a_step_are_refused(model):
    with pytest.raises(UnsupportedModelError, match="m3 and m3 each run the model several times"):
        foveate.prepare(model, [M3(scales=(9, 1)), M3(scales=(36, 9, 1))])


def test_a_method_without_parameters_cannot_be_trained_alone(model):
    with pytest.raises(FoveateError, match="m3 has no parameters of its own"):
        foveate.prepare(model, M3(), train="method")
    with pytest.raises(FoveateError, match="train must be 'all' or 'method'"):
        foveate.prepare(model, M3(), train="none")
    foveate.prepare(model, M3())  # nothing was left attached


@pytest.mark.parametrize("method", WITH_PARAMETERS, ids=id_of)
def test_an_adapter_is_put_on_the_base_model_again(model, inputs, method, tmp_path):
    bare = logits_of(model, inputs)
    foveate.prepare(model, method)
    stirred(model)
    want = logits_of(model, inputs)
    foveate.save_adapter(model, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "foveate.json", "foveate.safetensors",
    }  # fmt: skip
    fresh = KIND.build()
    assert torch.equal(logits_of(fresh, inputs), bare)
    foveate.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits_of(fresh, inputs), want)
    session_of(fresh).remove()
    assert torch.equal(logits_of(fresh, inputs), bare)


def test_an_adapter_is_loaded_with_another_budget(model, inputs, tmp_path):
    foveate.prepare(model, VisionSelector(keep=9, inner=16))
    foveate.save_adapter(model, tmp_path)
    fresh = foveate.load_adapter(KIND.build(), tmp_path, keep=4)
    logits_of(fresh, inputs)
    assert [len(image["pre_llm"]) for image in session_of(fresh).kept] == [4, 4]
    with pytest.raises(FoveateError, match="m3 has no parameters of its own to save"):
        foveate.save_adapter(foveate.prepare(KIND.build(), M3()), tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        foveate.load_adapter(KIND.build(), tmp_path / "nothing")


@pytest.mark.parametrize("method", LEARNING, ids=id_of)
def test_training_needs_labels(model, inputs, method):
    foveate.prepare(model, method)
    del inputs["labels"]
    with pytest.raises(InputError, match="labels"):
        model.train()(**inputs)
    with torch.no_grad():
        model(**inputs)  # no gradients, no training


@pytest.mark.parametrize("method", LEARNING, ids=id_of)
def test_a_batch_adds_its_share_of_all_labels(model, inputs, method):
    """A Trainer that accumulates gradients tells each batch how many labels all have."""
    foveate.prepare(model.train(), method)
    stirred(model)
    torch.manual_seed(0)
    alone = model(**inputs).loss
    torch.manual_seed(0)
    labels = int((inputs["labels"] != -100).sum())
    torch.testing.assert_close(model(**inputs, num_items_in_batch=4 * labels).loss, alone / 4)


# -- M3


def test_a_step_of_m3_is_the_mean_of_native_runs_at_each_scale(model, inputs):
    """Loss and gradients; each scale is run by hand on features that were pooled by torch."""
    scales, total = (36, 9, 1), []
    parameters = list(model.model.language_model.parameters())
    parameters += model.model.multi_modal_projector.parameters()
    for scale in scales:
        with foveate.use(model.eval(), M3(keep=scale)):
            total.append(model(**inputs).loss)
    want = torch.stack(total).mean()
    expected = torch.autograd.grad(want, parameters)
    foveate.prepare(model.train(), M3(scales=scales))
    got = model(**inputs).loss
    torch.testing.assert_close(got, want)
    for mine, other in zip(torch.autograd.grad(got, parameters), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep", [None, 36, 100])
def test_m3_at_its_finest_scale_changes_no_bit(model, inputs, keep):
    bare = logits_of(model, inputs)
    with foveate.use(model, M3(keep=keep)):
        assert torch.equal(logits_of(model, inputs), bare)


def test_m3_refuses_scales_that_do_not_divide_the_grid_in_training(model, inputs):
    foveate.prepare(model.train(), M3(scales=(36, 16)))
    with pytest.raises(InputError, match=r"16 tokens of a grid of 6 x 6.*they make 36"):
        model(**inputs)
    with pytest.raises(BudgetError, match="finest first"):
        M3(scales=(1, 9))


# -- VisionSelector


def test_gates_sum_to_the_budget_and_have_the_gradient_of_that_constraint():
    torch.manual_seed(0)
    scores = (3 * torch.randn(2, 9, dtype=torch.float64)).requires_grad_()
    gates = soft_top(scores, 4)
    torch.testing.assert_close(gates.sum(1), torch.full((2,), 4.0, dtype=torch.float64))
    weights = torch.randn(2, 9, dtype=torch.float64)
    (got,) = torch.autograd.grad((gates * weights).sum(), scores)
    step, want = 1e-6, torch.zeros_like(scores)
    for n in range(scores.numel()):
        moved = torch.zeros(scores.numel(), dtype=torch.float64)
        moved[n] = step
        moved = moved.view_as(scores)
        up, down = soft_top(scores.detach() + moved, 4), soft_top(scores.detach() - moved, 4)
        want.view(-1)[n] = ((up - down) * weights).sum() / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_visionselector_keeps_what_a_plain_loop_ranks_highest(model, inputs):
    foveate.prepare(model.eval(), VisionSelector(keep=9, inner=16))
    stirred(model)
    scorer = session_of(model).learned["0"]
    with torch.no_grad():
        features = KIND.features(model, inputs) if False else None
        logits_of(model, inputs)
    session = session_of(model)
    kept = [image["pre_llm"].tolist() for image in session.kept]
    weights = {n: p.detach() for n, p in scorer.named_parameters()}
    session.remove()
    with torch.no_grad():
        features = KIND.features(model, inputs)
    for image, got in zip(features, kept, strict=True):
        query, key = image @ weights["query.weight"].T, image @ weights["key.weight"].T
        scores = [float((query[i] @ key.T).mean()) / 16**0.5 for i in range(len(image))]
        want = sorted(sorted(range(len(image)), key=lambda i: -scores[i])[:9])
        assert got == want


def test_visionselector_gates_features_and_counts_its_steps(model, inputs):
    method = VisionSelector(keep=9, inner=16, weight=(0.0, 2.0), ramp=4)
    foveate.prepare(model.train(), method)
    stirred(model)
    scorer = session_of(model).learned["0"]
    first = model(**inputs).loss
    assert scorer.steps == 1
    assert model.eval()(**inputs).loss.isfinite()
    assert scorer.steps == 1  # not in inference
    later = model.train()(**inputs).loss
    session_of(model).remove()
    features = KIND.features(model, inputs)
    gates = soft_top(scorer(features), 9)
    gated = (features * gates[..., None]).flatten(0, 1)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["input_ids"] == model.config.image_token_id
    embeds = embeds.masked_scatter(mask[..., None], gated)
    given = {n: v for n, v in inputs.items() if n not in ("input_ids", "pixel_values")}
    plain = model(inputs_embeds=embeds, **given).loss
    torch.testing.assert_close(first, plain)  # the weight was 0
    chosen = torch.zeros_like(gates).scatter(1, scorer(features).topk(9).indices, 1.0)
    cross = F.binary_cross_entropy(gates, chosen)
    torch.testing.assert_close(later, plain + 0.5 * cross)


# -- CoViPAL


def test_covipal_learns_the_attention_of_its_guide_layer(model, inputs):
    guide = 3
    foveate.prepare(model.train(), CoViPAL(guide=guide, inner=16), train="method")
    stirred(model)
    plug = session_of(model).learned["0"]
    got = model(**inputs).loss
    session_of(model).remove()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
        features = KIND.features(model, inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        losses, image = [], 0
        for row, ids in enumerate(inputs["input_ids"]):
            visual = (ids == model.config.image_token_id).nonzero()[:, 0]
            if not len(visual):
                continue
            labels = inputs["labels"][row]
            text = [i for i in range(int(visual[-1]) + 1, len(ids)) if labels[i] == -100]
            text = [i for i in text if inputs["attention_mask"][row, i]]
            spans = [i for i in range(len(ids) - 1) if labels[i] == -100 != labels[i + 1]]
            seen = torch.stack([out.attentions[guide][row, :, i, visual] for i in spans])
            wanted = seen.mean((0, 1))
            wanted = wanted / wanted.sum()
            scores = plug(features[image][None], embeds[row, text].mean(0)[None])[0]
            losses.append(-(wanted * scores.log_softmax(0)).sum())
            image += 1
    torch.testing.assert_close(got, out.loss + torch.stack(losses).mean())


def test_covipal_costs_no_look_at_the_guide_layer_in_inference(model, inputs):
    with foveate.use(model.eval(), CoViPAL(guide=3, inner=16)) as session:
        model(**inputs)
        assert not session.plan.due
        assert session.plan.training_due
        assert session.report()["flops"]["selection"] > 0


# -- ATP-LLaVA


@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
def test_gates_become_removal_as_the_temperature_rises(model, inputs, thresholds):
    """What training computes with gates of 0 and 1 is what inference removes."""
    method = ATPLLaVA(layers=(1, 3), temperature=1e7)
    foveate.prepare(model, method)
    with_thresholds(model, *thresholds)
    with torch.no_grad():
        hard = model.eval()(**inputs)
    kept = [{site: len(k) for site, k in image.items()} for image in session_of(model).kept]
    assert any(0 < image["llm:3"] < 36 for image in kept), kept
    soft = model.train()(**inputs)
    present = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
    got, want = (out.logits.detach()[present] for out in (soft, hard))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_atp_counts_the_mean_over_all_layers(model, inputs):
    """The pull is towards what the record of inference says is left."""
    method = ATPLLaVA(layers=(1, 3), temperature=1e7, price=0.0, pull=1.0, target=0.0)
    foveate.prepare(model, method)
    with_thresholds(model, 0.45, 0.6)
    with torch.no_grad():
        plain = model.eval()(**inputs).loss
        record = session_of(model).record
    layers = session_of(model).family.text_layers
    shares = [i.surviving(n) / i.total for i in record.images for n in range(layers)]
    got = model.train()(**inputs).loss.detach() - plain
    torch.testing.assert_close(got, torch.tensor(sum(shares) / len(shares)), rtol=1e-3, atol=1e-4)


def test_gates_need_a_kernel_that_takes_masks(model, inputs):
    foveate.prepare(model.train(), ATPLLaVA(layers=(1, 3)))
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises((UnsupportedModelError, ImportError)):
        model(**inputs)


# -- TokenFLEX and ordered queries


def test_tokenflex_begins_as_adaptive_pooling(model, inputs):
    bare = KIND.features(model.eval(), inputs).detach()
    with foveate.use(model, TokenFLEX(counts=(16,), chances=(1.0,))) as session:
        got = []
        session.text.forward.family.layers[0].register_forward_pre_hook(
            lambda module, args: got.append(args[0])
        )
        logits_of(model, inputs)
        assert [len(k["pre_llm"]) for k in session.kept] == [16, 16]
    grid = bare.unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(grid, 4).flatten(2).mT
    from foveate.core import VisualTokens

    tokens = VisualTokens(lambda: bare, torch.arange(36).expand(2, -1), (6, 6))
    ((_, reduction),) = TokenFLEX(keep=16).reduce_each(tokens)
    torch.testing.assert_close(reduction.apply(bare), pooled)


def test_tokenflex_draws_one_count_for_all_images_of_a_forward(model):
    inputs = called(batch(KIND, "images", "left")[0])
    method = TokenFLEX(counts=(4, 9, 36), chances=(0.2, 0.3, 0.5))
    foveate.prepare(model.train(), method)
    torch.manual_seed(0)
    drawn = []
    for _ in range(40):
        model(**inputs)
        (count,) = {len(image["pre_llm"]) for image in session_of(model).kept}
        drawn.append(count)
    assert {*drawn} == {4, 9, 36}
    assert drawn.count(36) > drawn.count(4)


def test_fewer_ordered_queries_are_the_first_of_more(model, inputs):
    foveate.prepare(model.eval(), OrderedQueries(queries=16, keep=16))
    stirred(model)
    learned = session_of(model).learned["0"]
    session_of(model).remove()
    features, learned = KIND.features(model, inputs).double(), learned.double()
    with torch.no_grad():
        all_made, weights = learned(features, (6, 6), 16)
        few, _ = learned(features, (6, 6), 5)
    torch.testing.assert_close(few, all_made[:, :5])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 16, dtype=torch.float64))


def test_ordered_queries_begin_as_a_pyramid():
    queries = OrderedQueries(queries=21, keep=21).learned(type("Facts", (), {"text_width": 8}))
    x = torch.randn(1, 256, 8)
    made, weights = queries(x, (16, 16), 21)
    torch.testing.assert_close(made[0, 0], x[0].mean(0))
    quarter = weights[0, 1].detach().view(16, 16)
    assert float(quarter[:8, :8].sum()) > 0.9
    for keep in (17, 0.25):
        with pytest.raises(BudgetError, match="first 16 queries"):
            OrderedQueries(queries=16, keep=keep)


def test_methods_that_learn_compose_with_others(model, inputs):
    foveate.prepare(model, [VisionSelector(keep=18, inner=16), FastV(layer=2, keep=0.5)])
    stirred(model)
    model.train()(**inputs).loss.backward()
    logits_of(model, inputs)
    assert [(len(k["pre_llm"]), len(k["llm:2"])) for k in session_of(model).kept] == [(18, 9)] * 2
    session_of(model).remove()
    foveate.prepare(model, [DivPrune(keep=18), ATPLLaVA(layers=(1, 3))])
    model.train()(**inputs).loss.backward()
    assert all(len(k["pre_llm"]) == 18 for k in session_of(model).kept)
