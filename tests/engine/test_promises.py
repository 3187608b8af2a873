"""Identity, memory, removal, threads, and random shapes."""

import copy
import gc
import threading
import weakref
from typing import get_type_hints

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from transformers import DynamicCache

import foveate
from foveate.errors import AttachError
from foveate.methods import FastV, PyramidDrop
from tests import oracle
from tests.engine.test_oracle import BATCHES, CASES, TOLERANCE, features_of
from tests.leaving import Boom, fail_within, snapshot
from tests.methods_for_tests import Average, EveryThird, readers_methods
from tests.tinies import IMAGE, PATCHES, prompts, row_of, tiny_llava


def keep_all(name):
    kind = foveate.get_method(name)
    return kind(keep=1.0)


def with_a_keep():
    """Methods that can be told to keep everything."""
    hints = {name: get_type_hints(foveate.get_method(name)) for name in readers_methods()}
    keeps = [name for name, fields in hints.items() if fields["keep"] is not type(None)]
    # The keep of the first is only a limit, and that of the others a number of tokens.
    others = ("llava-prumerge", "m3", "ordered-queries", "tokenflex")
    return [name for name in keeps if name not in others]


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", with_a_keep())
def test_keeping_everything_changes_no_bit(any_llava, name, rows):
    inputs = prompts(rows)
    options = {
        "max_new_tokens": 6, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    logits, out = any_llava(**inputs).logits, any_llava.generate(**inputs, **options)
    with foveate.use(any_llava, name, keep=1.0):
        assert torch.equal(any_llava(**inputs).logits, logits)
        got = any_llava.generate(**inputs, **options)
    assert torch.equal(got.sequences, out.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, out.logits, strict=True))


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_text_alone_changes_no_bit(any_llava, rows):
    inputs = prompts([[sum(pieces)] for pieces in rows])
    logits = any_llava(**inputs).logits
    with foveate.use(any_llava, PyramidDrop()) as run:
        assert torch.equal(any_llava(**inputs).logits, logits)
    assert run.kept == []
    assert "no image" in run.record.notes[0]


def expected_columns(rows, per_image):
    """Physical columns of a padded batch: the widest row."""
    return max(sum(pieces) + (len(pieces) - 1) * per_image for pieces in rows)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    ("method", "alive"),
    [
        (PyramidDrop(layers=(2, 3, 5)), [36, 36, 18, 9, 9, 4]),
        (FastV(layer=3, keep=0.25), [36, 36, 36, 9, 9, 9]),
        (EveryThird(keep=12), [12] * 6),
        ([EveryThird(keep=12), FastV(layer=2)], [12, 12, 6, 6, 6, 6]),
    ],
)
def test_cache_lengths_and_bytes_are_the_analytic_ones(any_llava, method, alive, rows):
    inputs = prompts(rows)
    config = any_llava.config.text_config
    with foveate.use(any_llava, method) as run:
        out = any_llava.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache = out.past_key_values
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    for number, layer in enumerate(cache.layers):
        columns = inputs["input_ids"].shape[1]
        if alive[number] < PATCHES:
            columns = expected_columns(rows, alive[number])
        assert run.record.cache_slots[number] == columns
        assert layer.keys.shape[2] == columns + 3
        assert layer.keys.nbytes + layer.values.nbytes == 2 * len(rows) * width * (columns + 3) * 4
        assert layer.get_seq_length() == inputs["input_ids"].shape[1] + 3
        want = [sum(pieces) + (len(pieces) - 1) * alive[number] for pieces in rows]
        assert run.record.layer_tokens[number] == want


@pytest.mark.parametrize("way", ["block", "exception", "handle", "failing forward"])
@pytest.mark.parametrize("method", [PyramidDrop(), EveryThird(), "fastervlm"], ids=str)
def test_leaving_restores_everything(llava, method, way):
    inputs = prompts(BATCHES["ragged"])
    want = llava(**inputs, output_hidden_states=True)
    before, config = snapshot(llava), copy.deepcopy(llava.config.to_dict())
    weights = {k: v.clone() for k, v in llava.state_dict().items()}
    if way == "handle":
        handle = foveate.apply(llava, method)
        llava(**inputs)
        assert snapshot(llava) != before
        handle.remove()
        handle.remove()
    elif way == "block":
        with foveate.use(llava, method):
            llava.generate(**inputs, max_new_tokens=3)
    elif way == "exception":
        with pytest.raises(Boom):
            fail_within(llava, method, inputs)
    else:
        with foveate.use(llava, method):
            wrong = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
            with pytest.raises(ValueError, match=r"do not match|placeholders"):
                llava(**wrong)
            assert llava(**inputs).logits.isfinite().all()
    assert snapshot(llava) == before
    assert llava.config.to_dict() == config
    assert all(torch.equal(v, weights[k]) for k, v in llava.state_dict().items())
    assert torch.equal(llava(**inputs).logits, want.logits)


def test_a_session_does_not_keep_the_model_alive():
    model = tiny_llava()
    inputs = prompts([[5, 7]])
    with foveate.use(model, PyramidDrop()) as run:
        model(**inputs)
    gone = weakref.ref(model)
    del model, run
    gc.collect()
    assert gone() is None


def test_threads_on_one_model_do_not_see_each_other(llava):
    """Different prompts and budgets per row, many at once, on one session."""
    batches = [prompts(BATCHES[name], seed=seed) for name in BATCHES for seed in range(4)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with foveate.use(llava, PyramidDrop(layers=(1, 3), keep=(0.5, 0.25))) as run:
        want, kept = [], []
        for batch in batches:
            want.append(llava.generate(**batch, **options))
            kept.append(run.kept)
        got, failures = [None] * len(batches), []

        def work(number):
            try:
                out = llava.generate(**batches[number], **options)
                got[number] = out, run.kept
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for (out, mine), sequences, indices in zip(got, want, kept, strict=True):
        assert torch.equal(out, sequences)
        for a, b in zip(mine, indices, strict=True):
            assert all(torch.equal(a[place], b[place]) for place in b)


def test_per_request_budgets_reach_their_rows(any_llava):
    """Each row gets its own budget, as if it were alone with it; also under beam search."""
    rows = [[5, 7], [4], [2, 3, 9]]
    inputs = prompts(rows)
    keeps = [0.5, 1.0, 5]
    for kind in (lambda keep: FastV(layer=2, keep=keep), lambda keep: EveryThird(keep=keep)):
        for beams in (1, 2):
            options = {
                "max_new_tokens": 4,
                "min_new_tokens": 4,
                "do_sample": False,
                "num_beams": beams,
            }
            with foveate.use(any_llava, kind(foveate.per_request(keeps))) as run:
                together = any_llava.generate(**inputs, **options)
            counts = [len(list(image.values())[-1]) for image in run.kept]
            assert counts == [18] * beams + [5, 5] * beams
            for row, keep in enumerate(keeps):
                with foveate.use(any_llava, kind(keep)):
                    alone = any_llava.generate(**row_of(inputs, row), **options)
                assert torch.equal(together[row, -4:], alone[0, -4:])


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_equal_prompts_with_unequal_budgets(any_llava, implementation):
    """Without logical padding there is no mask to translate, yet rows end up ragged."""
    inputs = prompts([[5, 7], [4, 8]])
    options = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, "cache_implementation": implementation,
    }  # fmt: skip
    with foveate.use(any_llava, FastV(layer=2, keep=foveate.per_request([0.5, 3]))):
        together = any_llava.generate(**inputs, **options)
    for row, keep in enumerate((0.5, 3)):
        with foveate.use(any_llava, FastV(layer=2, keep=keep)):
            alone = any_llava.generate(**row_of(inputs, row), **options)
        for got, want in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(got[row], want[0], rtol=0, atol=TOLERANCE)


def test_merging_inside_the_language_model_averages_states(llava):
    """A merged token's state at the step is the mean of its sources."""
    inputs = prompts([[5, 7]])
    with foveate.use(llava, Average(layer=2, keep=9)) as run:
        pruned = llava(**inputs, output_hidden_states=True).hidden_states
    plain = llava(**inputs, output_hidden_states=True).hidden_states
    seen = []
    norm = llava.model.language_model.layers[2].input_layernorm
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with foveate.use(llava, Average(layer=2, keep=9)):
        llava(**inputs)
    handle.remove()
    want = plain[2][0, 5:41].view(9, 4, -1).mean(1)
    torch.testing.assert_close(seen[0][0, 5:14], want)
    torch.testing.assert_close(pruned[2], plain[2])
    assert torch.equal(run.kept[0]["llm:2"], torch.arange(0, 36, 4))


@st.composite
def batches(draw):
    rows = draw(
        st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=3)
    )
    rows[0] = rows[0] if len(rows[0]) > 1 else [*rows[0], 3]
    side = draw(st.sampled_from(["left", "right"]))
    count = draw(st.integers(1, 3))
    layers = tuple(sorted(draw(st.sets(st.integers(0, 5), min_size=count, max_size=count))))
    keep = sorted(draw(st.lists(st.integers(1, 36), min_size=count, max_size=count)), reverse=True)
    return rows, side, layers, tuple(keep), draw(st.booleans()), draw(st.integers(0, 99))


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batches())
def test_any_batch_equals_the_oracle(llava, batch):
    """Shapes, images per row, padding side, layers and budgets are drawn."""
    rows, side, layers, keep, renumber, seed = batch
    inputs = prompts(rows, seed=seed, side=side)
    method = PyramidDrop(
        layers=layers, keep=keep, positions="renumbered" if renumber else "original"
    )
    with foveate.use(llava, method):
        got = llava(**inputs).logits
    for row in range(len(rows)):
        alone = row_of(inputs, row)
        ids, features = alone["input_ids"][0], features_of(llava, alone)
        drops = [
            oracle.Drop(layer, layer, [count] * len(features), renumber)
            for layer, count in zip(layers, keep, strict=True)
        ]
        want, _ = oracle.run(llava, ids, features, oracle.Spec(drops=drops), len(ids))
        mine = got[row][inputs["attention_mask"][row].bool()]
        assert (want - mine)[ids != IMAGE].abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_decoding_one_token_at_a_time_equals_one_forward(llava, name):
    """Feeding a continuation at once, in pieces or singly gives the same logits."""
    method, _ = CASES[name]
    inputs = prompts([[5, 7]])
    more = torch.randint(3, 119, (1, 6), generator=torch.Generator().manual_seed(3))
    got = []
    with foveate.use(llava, method):
        for pieces in ([6], [1] * 6, [2, 3, 1]):
            cache = DynamicCache(config=llava.config.text_config)
            llava(**inputs, past_key_values=cache)
            steps = [
                llava(input_ids=part, past_key_values=cache).logits
                for part in more.split(pieces, 1)
            ]
            got.append(torch.cat(steps, 1))
    torch.testing.assert_close(got[1], got[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(got[2], got[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("how", ["apply", "prepare"])
def test_a_model_with_a_session_cannot_be_copied(how):
    """A copy would be served with what is known of the original: its words, its norms."""
    model, method = tiny_llava(), PyramidDrop()
    handle = foveate.apply(model, method) if how == "apply" else None
    if handle is None:
        handle = foveate.training.prepare.session_of(foveate.prepare(model, method))
    with pytest.raises(AttachError, match="remove"):
        copy.deepcopy(model)
    handle.remove()
    twin = copy.deepcopy(model)
    with foveate.use(twin, method):
        assert twin(**prompts([[5, 7]])).logits.isfinite().all()


def test_replicas_of_a_model_are_refused(llava):
    """They would be modules of their own that run the forward of the first."""
    text = llava.model.language_model
    with (
        foveate.use(llava, PyramidDrop()),
        pytest.raises(AttachError, match="one process per device"),
    ):
        text._replicate_for_data_parallel()  # as `torch.nn.DataParallel` does for every module
    assert text._replicate_for_data_parallel() is not None
