"""Pruned logits equal the full-length model in which removed tokens are masked: prefill and cached
decoding."""

import pytest
import torch

import foveate
from foveate.methods import FastV, PyramidDrop
from tests import oracle
from tests.methods_for_tests import EveryThird
from tests.tinies import IMAGE, PATCHES, prompts, row_of, tiny_llava

TOLERANCE = 3e-5
STEPS = 8


def features_of(model, inputs):
    if "pixel_values" not in inputs:
        return []
    return list(model.model.get_image_features(inputs["pixel_values"]).pooler_output)


def thirds(images):
    return [torch.arange(0, PATCHES, 3) for _ in range(images)]


def drops(counts, layers, scored, images, renumber):
    return [
        oracle.Drop(layer, score, [count] * images, renumber)
        for layer, score, count in zip(layers, scored, counts, strict=True)
    ]


CASES = {
    "pyramiddrop": (
        PyramidDrop(layers=(2, 3, 5)),
        lambda n: oracle.Spec(drops=drops((18, 9, 4), (2, 3, 5), (2, 3, 5), n, True)),
    ),
    "pyramiddrop-original": (
        PyramidDrop(layers=(1, 4), keep=(20, 0.3), positions="original"),
        lambda n: oracle.Spec(drops=drops((20, 10), (1, 4), (1, 4), n, False)),
    ),
    "pyramiddrop-layer-0": (
        PyramidDrop(layers=(0,), keep=0.5),
        lambda n: oracle.Spec(drops=drops((18,), (0,), (0,), n, True)),
    ),
    "fastv": (
        FastV(layer=2, keep=0.25),
        lambda n: oracle.Spec(drops=drops((9,), (2,), (1,), n, False)),
    ),
    "fastv-renumbered": (
        FastV(layer=3, keep=7, positions="renumbered"),
        lambda n: oracle.Spec(drops=drops((7,), (3,), (2,), n, True)),
    ),
    "pre_llm": (EveryThird(keep=12), lambda n: oracle.Spec(kept=thirds(n))),
    "pre_llm-renumbered": (
        EveryThird(keep=12, positions="renumbered"),
        lambda n: oracle.Spec(kept=thirds(n), renumber=True),
    ),
    "composed": (
        [
            EveryThird(keep=12, positions="renumbered"),
            FastV(layer=1),
            PyramidDrop(layers=(3, 5), keep=(0.5, 0.2)),
        ],
        lambda n: oracle.Spec(
            kept=thirds(n),
            renumber=True,
            drops=drops((6,), (1,), (0,), n, False) + drops((3, 1), (3, 5), (3, 5), n, True),
        ),
    ),
}  # fmt: skip

BATCHES = {
    "one": [[5, 7]],
    "two-images": [[3, 2, 6]],
    "ragged": [[5, 7], [4], [2, 3, 9]],
}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("method", "spec"), CASES.values(), ids=CASES)
def test_generation_equals_the_oracle(any_llava, method, spec, rows):
    check_generation(any_llava, method, spec, rows)


def check_generation(model, method, spec, rows):
    """Prefill and eight decoding steps of a left-padded batch, row by row."""
    inputs = prompts(rows)
    unpruned = model(**inputs).logits
    with foveate.use(model, method) as run:
        out = model.generate(
            **inputs, max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        prefill = model(**inputs).logits
    kept = iter(run.kept)
    worst = bite = 0.0
    for row, pieces in enumerate(rows):
        alone = row_of(inputs, row)
        features = features_of(model, alone)
        prompt = alone["input_ids"].shape[1]
        ids = torch.cat((alone["input_ids"][0], out.sequences[row, inputs["input_ids"].shape[1] :]))
        want, history = oracle.run(model, ids, features, spec(len(pieces) - 1), prompt)
        steps = torch.stack(out.logits, dim=1)[row]
        worst = max(worst, (want[prompt - 1 : -1] - steps).abs().max().item())
        text = alone["input_ids"][0] != IMAGE
        got = prefill[row, -prompt:]
        worst = max(worst, (want[:prompt] - got)[text].abs().max().item())
        if features:
            bite = max(bite, (unpruned[row, -1] - got[-1]).abs().max().item())
        for image in range(len(features)):
            for place, indices in zip(next(kept).values(), history, strict=True):
                assert torch.equal(place, indices[image])
    print(f"distance to the oracle {worst:.1e}, to the unpruned model {bite:.2f}")
    assert worst <= TOLERANCE
    assert bite > 0.05, "the test does not bite"


@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_a_layer_ranks_by_what_it_attends_to_once_tokens_are_gone(any_llava, positions):
    """One method removes tokens before the layer whose attention ranks for the next."""
    methods = [PyramidDrop((1,), 0.5, positions), FastV(layer=2, keep=0.25)]
    renumber = positions == "renumbered"

    def spec(images):
        return oracle.Spec(
            drops=drops((18,), (1,), (1,), images, renumber)
            + drops((4,), (2,), (1,), images, False)
        )

    check_generation(any_llava, methods, spec, BATCHES["ragged"])


@pytest.mark.parametrize(("method", "spec"), CASES.values(), ids=CASES)
def test_right_padded_forward_equals_the_oracle(any_llava, method, spec):
    rows = BATCHES["ragged"]
    inputs = prompts(rows, side="right")
    with foveate.use(any_llava, method):
        got = any_llava(**inputs).logits
    for row, pieces in enumerate(rows):
        alone = row_of(inputs, row)
        ids = alone["input_ids"][0]
        features = features_of(any_llava, alone)
        want, _ = oracle.run(any_llava, ids, features, spec(len(pieces) - 1), len(ids))
        text = ids != IMAGE
        assert (want - got[row, : len(ids)])[text].abs().max() <= TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize(("method", "spec"), CASES.values(), ids=CASES)
def test_other_kernels_agree_with_sdpa(flash_emulated, method, spec, attention):
    model, other = (
        tiny_llava("llama-gqa"),
        tiny_llava("llama-gqa", flash_emulated if attention == "flash" else attention),
    )
    for rows in BATCHES.values():
        inputs = prompts(rows)
        options = {
            "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False,
            "output_logits": True, "return_dict_in_generate": True,
        }  # fmt: skip
        with foveate.use(model, method):
            want = model.generate(**inputs, **options)
        with foveate.use(other, method):
            got = other.generate(**inputs, **options)
        assert torch.equal(want.sequences, got.sequences)
        distance = (torch.stack(want.logits) - torch.stack(got.logits)).abs().max()
        assert distance <= TOLERANCE


def test_the_oracle_itself_equals_the_unpruned_model(any_llava):
    inputs = prompts([[3, 2, 6]])
    want = any_llava(**inputs).logits[0]
    got, _ = oracle.run(
        any_llava, inputs["input_ids"][0], features_of(any_llava, inputs), oracle.Spec(), 80
    )
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
