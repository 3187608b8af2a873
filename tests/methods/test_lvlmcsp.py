"""LVLM_CSP: against the full-length model in which suspended tokens take no part."""

import pytest
import torch

import foveate
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.methods import FastV, PyramidDrop
from foveate.methods.lvlmcsp import LVLMCSP
from tests import oracle
from tests.tinies import IMAGE, LAYERS, PATCHES, prompts, row_of

STEPS = 4
ROWS = {"one": [[5, 7]], "two-images": [[3, 2, 6]], "ragged": [[5, 7], [4], [2, 3, 9]]}
METHODS = {
    "default": LVLMCSP(),
    "late": LVLMCSP(layers=(1, 3, 4), keep=(0.3, 5)),
    "moved": LVLMCSP(layers=(1, 3, 4), keep=(0.3, 5), reentry="moved"),
    "random": LVLMCSP(layers=(2, 3, 5), keep=7, select="random", seed=3),
}
PHASES = {"default": (0, 3, 4), "late": (1, 3, 4), "moved": (1, 3, 4), "random": (2, 3, 5)}
COUNTS = {"default": (4, 1), "late": (10, 5), "moved": (10, 5), "random": (7, 7)}


@torch.no_grad()
def expected(model, name, ids, features, prompt):
    """Logits of a row at full length: a suspended token keeps its state, and nobody sees it."""
    method, (cluster, scatter, prune) = METHODS[name], PHASES[name]
    few, last = COUNTS[name]
    text = model.model.language_model
    hidden = text.embed_tokens(ids)
    columns = (ids == IMAGE).nonzero()[:, 0]
    hidden[columns] = torch.cat([hidden[:0], *features])
    images = columns.split(PATCHES) if len(columns) else []
    if method.select == "uniform":
        chosen = [i * (PATCHES // few) for i in range(few)]
    else:
        order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(method.seed))
        chosen = sorted(order[:few].tolist())
    alive = torch.ones(len(ids), dtype=torch.bool)
    kept, suspended = [], None
    for number, layer in enumerate(text.layers):
        if number == cluster:
            suspended = hidden.clone()
            for image in images:
                alive[image] = False
                alive[image[chosen]] = True
        if number == scatter:
            for image in images:
                for place, column in enumerate(image.tolist()):
                    if place in chosen:
                        continue
                    hidden[column] = suspended[column]
                    if method.reentry == "moved":
                        like = [
                            torch.cosine_similarity(suspended[column], suspended[other], dim=0)
                            for other in image[chosen]
                        ]
                        near = image[chosen][int(torch.stack(like).argmax())]
                        hidden[column] += hidden[near] - suspended[near]
                alive[image] = True
        position = torch.arange(len(ids))
        if number == prune:
            row = oracle.attend(layer, hidden, position, alive)[0].mean(0)[prompt - 1]
            for image in images:
                best = row[image].topk(last).indices.sort().values
                alive[image] = False
                alive[image[best]] = True
                kept.append(best)
        weights, v = oracle.attend(layer, hidden, position, alive)
        mixed = (weights @ v).transpose(0, 1).reshape(len(ids), -1)
        hidden = hidden + layer.self_attn.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(text.norm(hidden)), chosen, kept


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", METHODS)
def test_generation_equals_the_oracle(any_llava, name, rows):
    inputs = prompts(rows)
    plain = any_llava(**inputs).logits[:, -1].detach()
    with foveate.use(any_llava, METHODS[name]) as run:
        out = any_llava.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    places = iter(run.kept)
    for row, pieces in enumerate(rows):
        alone = row_of(inputs, row)
        features = []
        if len(pieces) > 1:
            features = list(any_llava.model.get_image_features(alone["pixel_values"]).pooler_output)
        prompt = alone["input_ids"].shape[1]
        ids = torch.cat((alone["input_ids"][0], out.sequences[row, inputs["input_ids"].shape[1] :]))
        want, chosen, kept = expected(any_llava, name, ids, features, prompt)
        got = torch.stack(out.logits, dim=1)[row]
        torch.testing.assert_close(got, want[prompt - 1 : -1], rtol=0, atol=5e-5)
        if features:
            assert (plain[row] - got[0]).abs().max() > 0.05, "the test does not bite"
        for best in kept:
            first, middle, last = next(places).values()
            assert first.tolist() == chosen
            assert middle.tolist() == list(range(PATCHES))
            assert torch.equal(last, best)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_cache_goes_from_few_to_all_to_almost_none(llava, rows):
    inputs = prompts(rows)
    with foveate.use(llava, METHODS["late"]) as run:
        out = llava(**inputs, use_cache=True, output_hidden_states=True)
    alive = [36, 10, 10, 36, 5, 5]
    slots = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    widest = [max(sum(p) + (len(p) - 1) * n for p in rows) for n in alive]
    assert slots == widest
    tokens = [[sum(p) + (len(p) - 1) * n for p in rows] for n in alive]
    assert run.record.layer_tokens == tokens
    assert {state.shape[1] for state in out.hidden_states} == {inputs["input_ids"].shape[1]}
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


def test_without_a_last_phase_all_columns_are_back(llava):
    """The last layout is the full one; captured states of the layers before still come back."""
    inputs = prompts([[5, 7]])
    with foveate.use(llava, LVLMCSP(layers=(1, 3, 4), keep=(9, 1.0))):
        out = llava(**inputs, output_hidden_states=True)
        assert {state.shape[1] for state in out.hidden_states} == {48}


def test_keeping_everything_changes_no_bit(llava):
    inputs = prompts(ROWS["ragged"])
    plain = llava(**inputs).logits
    for reentry in ("suspended", "moved"):
        with foveate.use(llava, LVLMCSP(keep=1.0, reentry=reentry)):
            assert torch.equal(llava(**inputs).logits, plain)


def test_budgets_of_requests_differ(llava):
    keep = foveate.per_request([(4, 2), (18, 9)])
    inputs = prompts([[5, 7], [5, 7]])
    with foveate.use(llava, LVLMCSP(layers=(1, 3, 4), keep=keep)) as run:
        together = llava(**inputs).logits
    assert [[len(i) for i in image.values()] for image in run.kept] == [[4, 36, 2], [18, 36, 9]]
    with foveate.use(llava, LVLMCSP(layers=(1, 3, 4), keep=(18, 9))):
        alone = llava(**row_of(inputs, 1)).logits
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)


def test_gradients_flow_through_parked_tokens(llava):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, METHODS["moved"]):
        llava(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for p in llava.model.language_model.parameters()]
    llava.zero_grad()
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_errors(llava):
    with pytest.raises(BudgetError, match="3 entries, but the method has 2 steps"):
        LVLMCSP(keep=(0.5, 0.4, 0.3))
    with pytest.raises(LayerError, match="must be three, ascending"):
        LVLMCSP(layers=(3, 1, 5))
    with pytest.raises(FoveateError, match="select must be uniform or random"):
        LVLMCSP(select="cls")
    with pytest.raises(FoveateError, match="reentry must be suspended or moved"):
        LVLMCSP(reentry="dropped")
    with pytest.raises(FoveateError, match="leave positions out"):
        LVLMCSP(positions="renumbered")
    with pytest.raises(LayerError, match=r"fastv acts at llm:2, where tokens that lvlm-csp brings"):
        foveate.use(llava, [LVLMCSP(layers=(1, 3, 4)), FastV(layer=2)])
    with pytest.raises(LayerError, match="has layers 0 to 5"):
        foveate.use(llava, LVLMCSP(layers=(1, 3, LAYERS)))


def test_another_method_may_act_after(llava):
    with foveate.use(
        llava, [LVLMCSP(layers=(0, 2, 3), keep=(9, 0.5)), PyramidDrop((4,), 0.5)]
    ) as run:
        llava(**prompts([[5, 7]]))
    assert [len(index) for index in run.kept[0].values()] == [9, 36, 18, 9]
