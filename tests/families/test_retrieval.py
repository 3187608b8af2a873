"""Retrieval models: what survives is what an index stores, and scores are those of an oracle."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ColModernVBertProcessor,
    ColPaliProcessor,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
)

import foveate
from foveate.core.budget import per_request
from foveate.engine.planning import make_plan
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.loading import load_skeleton
from foveate.measure.account import account, unpruned
from foveate.measure.conventions import CONVENTIONS
from foveate.measure.planned import planned
from foveate.methods import FastV
from foveate.signals import SIGNALS
from tests.conformance.tolerance import TOLERANCE
from tests.conformance.zoo import MEMBERS
from tests.methods_for_tests import ONE_BY_ONE, EveryThird, needed, readers_methods
from tests.retrievers import (
    BUILT,
    IMAGE,
    Cut,
    batch,
    build,
    embeddings,
    max_sim,
    page,
    retriever,
    stored,
)

NAMES = sorted(BUILT)
CAUSAL = "colqwen2"
PROCESSORS = {
    "colmodernvbert": ColModernVBertProcessor,
    "colpali": ColPaliProcessor,
    "colqwen2": ColQwen2Processor,
}
PAGES = ((1, 4), (0, 3), (2, 6))  # images and words after them of each row
CASES = [(name, False) for name in NAMES] + [(n, True) for n in NAMES if n != CAUSAL]


def rows_of(name):
    return [page(name, *sizes, seed=n) for n, sizes in enumerate(PAGES)]


def near(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def kept_by_row(run, step):
    """(row) -> raster positions that survive a step, of each of its images."""
    images = zip(run.record.images, run.kept, strict=True)
    found = [(image.row, kept[step]) for image, kept in images]
    return [[kept for row, kept in found if row == n] for n in range(run.record.rows)]


@torch.no_grad()
def encode(name, inputs, *methods):
    """(rows of each page, session) of inputs with methods."""
    model = retriever(name)
    with foveate.use(model, list(methods)) as run:
        return stored(model(**inputs).embeddings), run


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_tokens_changes_no_bit(name):
    model, inputs = retriever(name), batch(name, rows_of(name))
    with torch.no_grad():
        plain = model(**inputs).embeddings
        with foveate.use(model, EveryThird(1.0)):
            assert torch.equal(model(**inputs).embeddings, plain)
        with foveate.use(model, "divprune", keep=0.25):
            assert not torch.equal(model(**inputs).embeddings, plain)
        assert torch.equal(model(**inputs).embeddings, plain)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_is_the_model_where_nothing_is_removed(name):
    for row in rows_of(name):
        with torch.no_grad():
            near(embeddings(name, row), retriever(name)(**row).embeddings[0])


@pytest.mark.parametrize(("name", "renumber"), CASES)
def test_embeddings_of_a_padded_batch_equal_the_oracle(name, renumber):
    method = EveryThird(0.25, "renumbered" if renumber else "original")
    rows = rows_of(name)
    pages, run = encode(name, batch(name, rows), method)
    kept = kept_by_row(run, "pre_llm")
    for got, row, images, tokens in zip(
        pages, rows, kept, run.record.layer_tokens[-1], strict=True
    ):
        want = embeddings(name, row, [Cut(0, images, renumber)])
        assert len(got) == len(want) == tokens
        near(got, want)
        if images:
            full = embeddings(name, row)
            last = want[-1] - full[-1]
            assert last.abs().max() > 0.02, "the test does not bite"


@pytest.mark.parametrize(("name", "renumber"), CASES)
def test_two_stages_equal_the_oracle(name, renumber):
    positions = "renumbered" if renumber else "original"
    methods = EveryThird(0.5, positions), FastV(5, 0.25, positions=positions)
    rows = rows_of(name)
    pages, run = encode(name, batch(name, rows), *methods)
    first, second = kept_by_row(run, "pre_llm"), kept_by_row(run, "llm:5")
    for got, row, before, after in zip(pages, rows, first, second, strict=True):
        assert all(len(a) < len(b) for a, b in zip(after, before, strict=True))
        near(got, embeddings(name, row, [Cut(0, before, renumber), Cut(5, after, renumber)]))


@pytest.mark.parametrize("name", NAMES)
def test_fastv_ranks_as_eager_attention_does(name):
    row = page(name, 2, 6)
    _, run = encode(name, row, FastV(3, 4))
    with torch.no_grad():
        maps = retriever(name, "eager")(**row, output_attentions=True).attentions
    received = maps[2][0].mean(0)[-1]
    columns = (row["input_ids"][0] == IMAGE).nonzero()[:, 0]
    for kept, of in zip(run.kept, columns.split([i.total for i in run.record.images]), strict=True):
        best = received[of].topk(4).indices.sort().values
        assert torch.equal(kept["llm:3"], best)


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_those_of_the_oracle(name):
    """Queries run in the same session; they have no images and lose nothing. Pages are scored one
    by one: the processor pads shorter ones by zeros, which beat negative products.
    """
    rows, method = rows_of(name), EveryThird(0.25, "original")
    asked = [page(name, 0, 5, seed=7), page(name, 0, 2, seed=8)]
    pages, run = encode(name, batch(name, rows), method)
    kept = kept_by_row(run, "pre_llm")
    queries, _ = encode(name, batch(name, asked), method)
    score = PROCESSORS[name].score_retrieval
    got = torch.cat([score(None, queries, [of]) for of in pages], 1)
    want = max_sim(
        [embeddings(name, query) for query in asked],
        [embeddings(name, row, [Cut(0, of)]) for row, of in zip(rows, kept, strict=True)],
    )
    near(got, want)
    full = max_sim([embeddings(name, q) for q in asked], [embeddings(name, row) for row in rows])
    assert (full - want).abs().max() > 0.02, "the test does not bite"


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_keep_different_numbers_equal_themselves_alone(name):
    """Without padding there is no mask, and whether text sees both ways is up to the kernel."""
    rows = [page(name, seed=n) for n in (1, 2)]
    for row in rows:  # PaliGemma's mask
        row.pop("token_type_ids", None)
    pages, _ = encode(name, batch(name, rows), EveryThird(per_request([0.25, 0.75])))
    for got, row, keep in zip(pages, rows, (0.25, 0.75), strict=True):
        (alone,), _ = encode(name, row, EveryThird(keep))
        near(got, alone)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_zero_and_comes_first(name):
    model, rows = retriever(name), rows_of(name)
    with torch.no_grad(), foveate.use(model, EveryThird(0.25)) as run:
        found = model(**batch(name, rows)).embeddings
    tokens = run.record.layer_tokens[-1]
    assert found.shape[1] == max(tokens)
    for row, count in zip(found, tokens, strict=True):
        assert not row[: len(row) - count].any()
        near(row[len(row) - count :].norm(dim=-1), torch.ones(count))


@pytest.mark.parametrize("name", ["colmodernvbert", "colpali"])
def test_a_tuple_is_shortened_too(name):
    inputs, model = page(name), retriever(name)
    with torch.no_grad(), foveate.use(model, EveryThird(0.25)):
        whole = model(**inputs)
        assert torch.equal(model(**inputs, return_dict=False)[0], whole.embeddings)


@pytest.mark.parametrize("name", NAMES)
def test_the_report_tells_what_an_index_stores(name):
    rows = rows_of(name)
    pages, run = encode(name, batch(name, rows), EveryThird(0.5), FastV(3, 0.25))
    index = run.report()["index"]
    assert index["rows_after"] == [len(of) for of in pages]
    assert index["rows_before"] == [row["input_ids"].shape[1] for row in rows]
    assert index["after"] == sum(of.nbytes for of in pages)
    assert index["before"] == sum(index["rows_before"]) * pages[0][0].nbytes
    assert index["ratio"] == index["after"] / index["before"] < 0.6
    assert "16 numbers an embedding" in str(run.report())
    _, run = encode(name, page(name, 0), EveryThird(0.25))
    assert run.report()["index"]["ratio"] == 1.0


def counted(model, row):
    """FLOPs of all matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**row)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_flops_equal_what_torch_counts(name):
    model, row = retriever(name, "eager"), page(name, 2, 6)
    with foveate.use(model, EveryThird(0.25)) as run:
        shorter = counted(model, row)
    for record, flops in ((run.record, shorter), (unpruned(run.record), counted(model, row))):
        found = account(record, run.family, (), CONVENTIONS["dense"])
        assert found.total == flops
        assert found.decode == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_planned_is_what_happens(name):
    row = page(name, 1, 6)
    _, run = encode(name, row, EveryThird(0.25))
    count = run.record.images[0].total
    text = row["input_ids"].shape[1] - count
    plan = planned(run.family, run.plan, run.record.encoded["image"], text)
    for field in ("prompt_tokens", "layer_tokens", "embedding"):
        assert getattr(plan, field) == getattr(run.record, field)
    assert plan.cache_slots == (run.record.cache_slots or [0] * run.family.text_layers)
    assert account(plan, run.family) == account(run.record, run.family)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_reach_the_tower(name):
    model, row = build(name).train(), page(name, 2, 6)
    with foveate.use(model, EveryThird(0.25, "original")):
        model(**row).embeddings.square().sum(1).max().backward()
    grads = {path: weight.grad for path, weight in model.named_parameters()}
    reached = [path for path, grad in grads.items() if grad is not None and grad.any()]
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    assert any("vision" in path or "visual" in path for path in reached)
    assert "embedding_proj_layer.weight" in reached


@pytest.mark.parametrize("name", NAMES)
def test_in_training_a_page_is_all_prompt(name):
    """Nothing is answered, so methods that read the prompt need no labels."""
    model, row = build(name), page(name, 2, 6)
    with torch.no_grad(), foveate.use(model, FastV(3, 0.25)):
        want = model(**row).embeddings
        assert torch.equal(model.train()(**row).embeddings, want)


# -- refusals


def test_another_model_within_is_refused():
    config = ColQwen2Config(vlm_config=MEMBERS["qwen2_5_vl"]().config(), embedding_dim=16)
    assert find_family(ColQwen2ForRetrieval(config)).model_type == "colqwen2"
    config = ColQwen2Config(vlm_config=MEMBERS["qwen3_vl"]().config(), embedding_dim=16)
    with pytest.raises(UnsupportedModelError, match=r"around qwen2_vl or qwen2_5_vl.*qwen3_vl"):
        foveate.use(ColQwen2ForRetrieval(config), "divprune")


def test_embeddings_without_ids_are_refused():
    model, row = retriever("colqwen2"), page("colqwen2")
    embeds = model.vlm.get_input_embeddings()(row["input_ids"])
    with torch.no_grad(), foveate.use(model, "divprune", keep=0.25):
        with pytest.raises(InputError, match="do not say which rows are visual tokens"):
            model(inputs_embeds=embeds, attention_mask=row["attention_mask"])
        assert model(**row).embeddings.shape[1] < row["input_ids"].shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_class_tokens_are_refused(name):
    with pytest.raises(UnsupportedModelError, match=r"no class token.*divprune"):
        foveate.use(retriever(name), "fastervlm")


# -- real size, on the meta device

SIZES = {  # decoder layers, encoder layers, and decoder layers whose attention can rank
    "colmodernvbert": (22, 12, range(0, 22, 3)),
    "colpali": (18, 27, range(18)),
    "colqwen2": (80, 32, range(80)),
}


@functools.cache
def family_of(name):
    config, kind, _ = BUILT[name]
    with torch.device("meta"):
        return find_family(kind._from_config(config()))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_knows_it_by_its_config(name, tmp_path):
    retriever(name).config.save_pretrained(tmp_path)
    assert find_family(load_skeleton(str(tmp_path))).model_type == name


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_a_model_of_real_size_are_found(name):
    family = family_of(name)
    layers, tower, ranking = SIZES[name]
    assert (family.text_layers, family.vision_layers) == (layers, tower)
    assert family.attention_layers == tuple(ranking)
    assert family.embedding == (128, 4)
    assert family.causal is (name == CAUSAL)


def why_not(family, method):
    """Why a method does not work with its defaults; empty if it does."""
    try:
        make_plan(family, [method()])
    except UnsupportedModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("slug", readers_methods())
@pytest.mark.parametrize("name", NAMES)
def test_methods_plan_on_a_model_of_real_size_or_say_why_not(name, slug):
    family, method = family_of(name), foveate.get_method(slug)
    signals, reason = [SIGNALS[need] for need in needed(method, family)], why_not(family, method)
    if any(signal.class_token for signal in signals):
        assert "no class token" in reason
    elif family.encoder.packed is not None and not all(signal.varlen for signal in signals):
        assert "cannot give" in reason
    elif family.encoder.packed is not None and (not method.removes or slug in ONE_BY_ONE):
        assert "in one sequence or are padded" in reason
    elif slug == "yopo" and name != CAUSAL:
        assert "not made like those of Llama" in reason
    else:
        assert not reason
