"""Every way of generating: what `generate` does to a cache must not disturb a pruned one."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

import foveate
from foveate.errors import InputError
from foveate.methods import FastV, PyramidDrop
from tests import oracle
from tests.engine.test_oracle import BATCHES, CASES, TOLERANCE, features_of
from tests.methods_for_tests import EveryThird, Latest
from tests.tinies import IMAGE, PATCHES, prompts, row_of, tiny_llava

METHODS = [
    PyramidDrop(layers=(2, 4), keep=(0.5, 0.2)),
    FastV(layer=2, keep=0.25),
    EveryThird(keep=12, positions="renumbered"),
]
LOGITS = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def length(tokens):
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_static_cache_agrees_with_dynamic(any_llava, method, rows):
    inputs = prompts(rows)
    with foveate.use(any_llava, method):
        want = any_llava.generate(**inputs, **LOGITS, **length(8))
        got = any_llava.generate(**inputs, **LOGITS, **length(8), cache_implementation="static")
    distance = (torch.stack(want.logits) - torch.stack(got.logits)).abs().max()
    assert torch.equal(want.sequences, got.sequences)
    assert distance <= TOLERANCE


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_static_cache_allocates_less(llava, method):
    inputs = prompts([[5, 7]])
    cache = StaticCache(config=llava.config.text_config, max_cache_len=60)
    with foveate.use(llava, method) as run:
        llava.generate(**inputs, past_key_values=cache, **length(4))
    removed = [48 - tokens[0] for tokens in run.record.layer_tokens]
    assert [layer.keys.shape[2] for layer in cache.layers] == [60 - n for n in removed]
    assert max(removed) >= 24


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_beam_scores_equal_teacher_forcing(any_llava, method):
    """Each beam's score, recomputed by running its tokens through the pruned model."""
    rows = BATCHES["ragged"]
    inputs = prompts(rows)
    with foveate.use(any_llava, method):
        out = any_llava.generate(
            **inputs, num_beams=3, num_return_sequences=3, do_sample=False, output_scores=True,
            return_dict_in_generate=True, length_penalty=0.0, **length(6),
        )  # fmt: skip
    case = {type(PyramidDrop()): 0, type(FastV()): 1}.get(type(method), 2)
    specs = [
        lambda n: oracle.Spec(drops=[
            oracle.Drop(2, 2, [18] * n, True), oracle.Drop(4, 4, [7] * n, True)]),
        lambda n: oracle.Spec(drops=[oracle.Drop(2, 1, [9] * n)]),
        lambda n: oracle.Spec(kept=[torch.arange(0, PATCHES, 3)] * n, renumber=True),
    ]  # fmt: skip
    width = inputs["input_ids"].shape[1]
    for i, sequence in enumerate(out.sequences):
        alone = row_of(inputs, i // 3)
        prompt = alone["input_ids"].shape[1]
        ids = torch.cat((alone["input_ids"][0], sequence[width:]))
        features = features_of(any_llava, alone)
        logits, _ = oracle.run(any_llava, ids, features, specs[case](len(features)), prompt)
        steps = logits[prompt - 1 : -1].clone()
        steps[:, 2] = -torch.inf  # min_new_tokens forbids the end token
        log_probabilities = logits[prompt - 1 : -1].log_softmax(-1)
        score = log_probabilities.gather(1, sequence[width:, None]).sum()
        assert abs(score - out.sequences_scores[i]) <= 2e-4


def test_sampling_is_reproducible_and_differs_from_unpruned(llava):
    inputs = prompts(BATCHES["ragged"])
    runs = []
    with foveate.use(llava, PyramidDrop()):
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(llava.generate(**inputs, do_sample=True, top_k=0, **length(10)))
    torch.manual_seed(5)
    unpruned = llava.generate(**inputs, do_sample=True, top_k=0, **length(10))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], unpruned)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_prompt_lookup_equals_greedy(any_llava, method):
    """Drafts stand after the prompt already in the first forward; they must not choose."""
    inputs = prompts([[12, 12]])
    ids = inputs["input_ids"]
    ids[0, -6:] = ids[0, :6]  # the prompt's end repeats its beginning, so that drafts are found
    with foveate.use(any_llava, method):
        want = any_llava.generate(**inputs, do_sample=False, **length(12))
        got = any_llava.generate(
            **inputs, do_sample=False, prompt_lookup_num_tokens=3, **length(12)
        )
    assert torch.equal(want, got)


@pytest.mark.parametrize(
    "method", [*METHODS, PyramidDrop(layers=(0, 2), keep=(0.5, 0.25))], ids=str
)
def test_without_cache_every_step_chooses_anew(llava, method):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, method):
        out = llava.generate(**inputs, use_cache=False, **LOGITS, **length(4))
        for step, logits in enumerate(out.logits):
            ids = out.sequences[:, : 48 + step]
            again = llava(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False)
            torch.testing.assert_close(again.logits[:, -1], logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["pyramiddrop", "fastv", "pre_llm"])
def test_second_turn_with_a_new_image_equals_the_oracle(any_llava, kind):
    """The new image is ranked by the new question, with old keys in the softmax."""
    first, second = prompts([[5, 7]], seed=1), prompts([[4, 6]], seed=2)
    method, spec = {
        "pyramiddrop": (
            METHODS[0],
            lambda q1, q2: oracle.Spec(drops=[
                oracle.Drop(2, 2, [18], True, [0], q1), oracle.Drop(2, 2, [18], True, [1], q2),
                oracle.Drop(4, 4, [7], True, [0], q1), oracle.Drop(4, 4, [7], True, [1], q2),
            ]),
        ),
        "fastv": (
            METHODS[1],
            lambda q1, q2: oracle.Spec(drops=[
                oracle.Drop(2, 1, [9], False, [0], q1), oracle.Drop(2, 1, [9], False, [1], q2),
            ]),
        ),
        "pre_llm": (
            METHODS[2],
            lambda q1, q2: oracle.Spec(kept=[torch.arange(0, PATCHES, 3)] * 2, renumber=True),
        ),
    }[kind]  # fmt: skip
    cache = DynamicCache(config=any_llava.config.text_config)
    with foveate.use(any_llava, method):
        one = any_llava.generate(**first, past_key_values=cache, **LOGITS, **length(4))
        ids = torch.cat((one.sequences, second["input_ids"]), dim=1)
        two = any_llava.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=second["pixel_values"],
            past_key_values=cache, **LOGITS, **length(6),
        )  # fmt: skip
    features = features_of(any_llava, first) + features_of(any_llava, second)
    want, _ = oracle.run(
        any_llava, two.sequences[0], features, spec(47, ids.shape[1] - 1), ids.shape[1]
    )
    distance = (want[ids.shape[1] - 1 : -1] - torch.stack(two.logits, 1)[0]).abs().max()
    print(f"distance to the oracle {distance:.1e}")
    assert distance <= TOLERANCE


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_text_turn_before_the_first_image(llava, method):
    """A cache that was filled with text alone takes an image later."""
    text, image = prompts([[6]], seed=3), prompts([[4, 6]], seed=4)
    cache = DynamicCache(config=llava.config.text_config)
    with foveate.use(llava, method):
        one = llava.generate(**text, past_key_values=cache, do_sample=False, **length(3))
        ids = torch.cat((one, image["input_ids"]), dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole["pixel_values"] = image["pixel_values"]
        got = llava.generate(**whole, past_key_values=cache, **LOGITS, **length(5))
        want = llava.generate(**whole, **LOGITS, **length(5))
    assert (torch.stack(want.logits) - torch.stack(got.logits)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_padded_second_turn_agrees_with_rows_alone(llava, method, implementation):
    """Two turns of a ragged batch on one cache, against each row by itself."""
    rows, follow = [[5, 7], [3, 2, 9]], [[4, 2], [3, 3]]

    def converse(first, second):
        room = first["input_ids"].shape[1] + second["input_ids"].shape[1] + 12
        config = llava.config.text_config
        cache = DynamicCache(config=config)
        if implementation == "static":
            cache = StaticCache(config=config, max_cache_len=room)
        one = llava.generate(**first, past_key_values=cache, do_sample=False, **length(4))
        mask = [first["attention_mask"], torch.ones(len(one), 4, dtype=torch.long)]
        return llava.generate(
            input_ids=torch.cat((one, second["input_ids"]), 1),
            attention_mask=torch.cat((*mask, second["attention_mask"]), 1),
            pixel_values=second["pixel_values"],
            past_key_values=cache, **LOGITS, **length(4),
        )  # fmt: skip

    first, second = prompts(rows, seed=6), prompts(follow, seed=7)
    with foveate.use(llava, method):
        together = converse(first, second)
        for row in range(2):
            alone = converse(row_of(first, row), row_of(second, row))
            for got, want in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(got[row], want[0], rtol=0, atol=TOLERANCE)


def test_crop_is_exact_after_the_images_and_refused_inside(llava):
    inputs = prompts([[5, 7]])
    cache = DynamicCache(config=llava.config.text_config)
    with foveate.use(llava, PyramidDrop(layers=(2,), keep=0.5)):
        llava(**inputs, past_key_values=cache)
        text = torch.tensor([[9, 10, 11]])
        want = llava(input_ids=text, past_key_values=cache).logits
        cache.crop(-3)
        assert cache.get_seq_length() == 48
        got = llava(input_ids=text, past_key_values=cache).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        cache.crop(-3)
        with pytest.raises(foveate.FoveateError, match="cannot crop 8 tokens"):
            cache.crop(-8)


@pytest.mark.parametrize("rows", [[[5, 0]], [[5, 0], [2, 0]]], ids=["one", "padded"])
def test_crop_is_exact_among_survivors_at_the_end(llava, rows):
    """Text that follows the cropped image reads what the plain model makes of the tokens left."""
    inputs = prompts(rows)
    cache = DynamicCache(config=llava.config.text_config)
    text = torch.tensor([[9, 10, 11]]).expand(len(rows), -1)
    length = inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"][:, :-4], (0, 3), value=1)
    with foveate.use(llava, Latest(keep=12)):
        llava(**inputs, past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == length - 4
        assert {layer.keys.shape[2] for layer in cache.layers} == {5 + 8}
        got = llava(input_ids=text, attention_mask=mask, past_key_values=cache).logits
        with pytest.raises(foveate.FoveateError, match="holds only the last 11 in every row"):
            cache.crop(-12)
    words, features = llava.get_input_embeddings(), features_of(llava, inputs)
    for row, (before, _) in enumerate(rows):
        ids = torch.cat((inputs["input_ids"][row, -PATCHES - before : -PATCHES], text[row]))
        alone = words(ids).split((before, 3))
        embeds = torch.cat((alone[0], features[row][-12:-4], alone[1]))
        positions = torch.cat((torch.arange(before), before + torch.arange(24, 35)))
        want = llava(inputs_embeds=embeds[None], position_ids=positions[None]).logits
        torch.testing.assert_close(got[row], want[0, -3:], rtol=0, atol=TOLERANCE)


def test_a_crop_into_padding_says_what_is_missing(llava):
    """Not that visual tokens were removed: one row has none."""
    inputs = prompts([[5, 7], [6]])
    cache = DynamicCache(config=llava.config.text_config)
    with foveate.use(llava, Latest(keep=12)):
        llava(**inputs, past_key_values=cache)
        with pytest.raises(foveate.FoveateError, match=r"last 6 in every row, as .* padding"):
            cache.crop(-7)


def test_a_pruned_cache_is_refused_outside_its_session(llava):
    inputs = prompts([[5, 7]])
    cache = DynamicCache(config=llava.config.text_config)
    with foveate.use(llava, FastV()):
        llava(**inputs, past_key_values=cache)
    with pytest.raises(foveate.FoveateError, match="only the session that pruned them"):
        llava(input_ids=torch.tensor([[9]]), past_key_values=cache)


def test_a_failed_step_leaves_a_pruned_cache_refused(llava):
    """What the step announced to the cache is taken back: else the next one would pass."""
    inputs, token = prompts([[5, 7]]), torch.tensor([[9]])
    cache = DynamicCache(config=llava.config.text_config)
    last = llava.model.language_model.layers[-1].mlp
    with foveate.use(llava, FastV()):
        llava(**inputs, past_key_values=cache)
        failing = last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llava(input_ids=token, past_key_values=cache)
        failing.remove()
        failing = llava.model.language_model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llava(input_ids=token, past_key_values=cache)
        failing.remove()
    with pytest.raises(foveate.FoveateError, match="only the session that pruned them"):
        llava(input_ids=token, past_key_values=cache)


def test_cache_batch_operations_keep_slots_in_step(llava):
    """Repeat, select and reorder rows of a pruned cache, then decode."""
    inputs = prompts(BATCHES["ragged"])
    token = torch.tensor([[9], [10], [11]])
    mask = torch.cat((inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)), 1)
    positions = mask.sum(1, keepdim=True) - 1

    def decode(rows, change):
        cache = DynamicCache(config=llava.config.text_config)
        llava(**inputs, past_key_values=cache)
        change(cache)
        return llava(
            input_ids=token[rows], attention_mask=mask[rows], past_key_values=cache,
            position_ids=positions[rows],
        ).logits  # fmt: skip

    with foveate.use(llava, PyramidDrop(layers=(2, 3), keep=(0.5, 0.25))):
        want = decode([0, 1, 2], lambda cache: None)
        changes = [
            ([0, 0, 1, 1, 2, 2], lambda c: c.batch_repeat_interleave(2)),
            ([2, 0], lambda c: c.batch_select_indices(torch.tensor([2, 0]))),
            ([1, 1, 2], lambda c: c.reorder_cache(torch.tensor([1, 1, 2]))),
        ]
        for rows, change in changes:
            got = decode(rows, change)
            torch.testing.assert_close(got, want[rows], rtol=0, atol=TOLERANCE)


def test_reset_cache_starts_anew(llava):
    inputs = prompts([[5, 7]])
    cache = DynamicCache(config=llava.config.text_config)
    with foveate.use(llava, PyramidDrop()):
        want = llava(**inputs, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        got = llava(**inputs, past_key_values=cache).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", [PyramidDrop(), EveryThird(keep=12)])
def test_a_static_cache_that_was_reset_has_room_for_any_prompt(llava, method):
    """Of the first, tokens are removed, so that less is allocated; of the second none are."""
    first, second = prompts([[5, 7]]), prompts([[47]])
    cache = StaticCache(config=llava.config.text_config, max_cache_len=56)
    with foveate.use(llava, method):
        for inputs in (first, first, second):
            want = llava.generate(**inputs, **LOGITS, **length(4))
            cache.reset()
            got = llava.generate(**inputs, **LOGITS, **length(4), past_key_values=cache)
            assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() <= TOLERANCE
            assert (cache.layers[-1].keys.shape[2] < 56) == (inputs is first)


def test_hidden_states_come_back_at_logical_length(llava):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))) as run:
        out = llava(**inputs, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [48] * 7
    torch.testing.assert_close(llava.lm_head(out.hidden_states[-1]), out.logits)
    # A removed position shows its nearest kept predecessor; kept ones show themselves.
    kept = set((run.kept[0]["llm:2"] + 5).tolist())
    states = out.hidden_states[3][0]
    for position in range(6, 41):
        same = torch.equal(states[position], states[position - 1])
        assert same == (position not in kept)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [EveryThird(keep=12), "uniform", PyramidDrop((0, 2), (0.5, 3))])
def test_embeddings_come_back_at_logical_length(llava, method, side):
    """The first of the hidden states: removed positions show their nearest kept predecessor."""
    inputs = prompts(BATCHES["ragged"], side=side)
    plain = llava(**inputs, output_hidden_states=True).hidden_states[0]
    with foveate.use(llava, method) as run:
        got = llava(**inputs, output_hidden_states=True).hidden_states[0]
    kept = iter(run.kept)
    for row, ids in enumerate(inputs["input_ids"]):
        alive = inputs["attention_mask"][row].bool()
        for image in (ids == IMAGE).nonzero()[:, 0].split(PATCHES):
            if len(image) and "pre_llm" in (places := next(kept)):
                alive[image] = False
                alive[image[places["pre_llm"]]] = True
        for position in inputs["attention_mask"][row].nonzero()[:, 0].tolist():
            before = alive[: position + 1].nonzero()[:, 0]
            assert torch.equal(got[row, position], plain[row, before[-1]])


@pytest.mark.parametrize(
    "method", [EveryThird(keep=12), EveryThird(keep=12, positions="renumbered")]
)
@pytest.mark.parametrize("chunk", [7, 16, 100])
def test_chunked_prefill_works_without_queries(llava, method, chunk):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, method):
        want = llava.generate(**inputs, **LOGITS, **length(4))
        got = llava.generate(**inputs, **LOGITS, **length(4), prefill_chunk_size=chunk)
    assert (torch.stack(want.logits) - torch.stack(got.logits)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("chunk", [7, 16, 100])
def test_chunked_prefill_cuts_no_image_of_features_apart(llava, chunk):
    """Features that were made outside the session: the budget is that of the image, not of what a
    chunk holds of it, and methods that ask the prompt are refused as with pixels.
    """
    inputs = prompts([[5, 7], [4], [2, 3, 9]])
    encoded = llava.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    before = [feature.clone() for feature in encoded.pooler_output]
    given = {**inputs, "mm_encoder_outputs": {"image": encoded}}
    with foveate.use(llava, EveryThird(keep=12)):
        want = llava.generate(**given, **LOGITS, **length(4))
        got = llava.generate(**given, **LOGITS, **length(4), prefill_chunk_size=chunk)
        config = GenerationConfig(**LOGITS, **length(4), prefill_chunk_size=chunk, pad_token_id=0)
        rest = {name: value for name, value in given.items() if name != "input_ids"}
        again = llava.generate(given["input_ids"], config, **rest)
    for of in (got, again):
        assert (torch.stack(want.logits) - torch.stack(of.logits)).abs().max() <= TOLERANCE
    for method in (FastV(), "cdpruner", EveryThird(keep=foveate.per_request([0.5] * 3))):
        with foveate.use(llava, method), pytest.raises(InputError, match="chunked prefill"):
            llava.generate(**given, **length(2), prefill_chunk_size=chunk)
    for feature, was in zip(encoded.pooler_output, before, strict=True):
        assert torch.equal(feature, was), "the caller's features were changed"


@pytest.mark.parametrize("name", ["pyramiddrop", "composed"])
def test_pruning_reaches_logits_through_torch_no_grad_and_grad(llava, name):
    """Selection carries no gradient, survivors do, and values do not depend on grad mode."""
    method, _ = CASES[name]
    inputs = prompts([[5, 7]])
    with foveate.use(llava, method):
        out = llava(**inputs)
        out.logits[0, -1].sum().backward()
        with torch.no_grad():
            assert torch.equal(llava(**inputs).logits, out.logits)
    grads = [p.grad for p in llava.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)
    llava.zero_grad()


def test_image_token_ids_without_features_are_text(llava):
    ids = prompts([[5, 7]])["input_ids"]
    with foveate.use(llava, PyramidDrop()):
        got = llava(input_ids=ids).logits
    assert torch.equal(got, llava(input_ids=ids).logits)
    assert (ids == IMAGE).any()


def test_two_models_side_by_side():
    models = [tiny_llava(seed=s) for s in (1, 2)]
    methods = [PyramidDrop(layers=(2,), keep=0.5), FastV(layer=1, keep=0.2)]
    inputs = prompts([[5, 7]])
    apart = []
    for model, method in zip(models, methods, strict=True):
        with foveate.use(model, method):
            apart.append(model(**inputs).logits)
    with foveate.use(models[0], methods[0]), foveate.use(models[1], methods[1]):
        for model, want in zip(models, apart, strict=True):
            assert torch.equal(model(**inputs).logits, want)
