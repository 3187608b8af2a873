"""Inside plain encoders: identity, oracles, batches, heads, removal, gradients."""

import pytest
import torch

import foveate
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.methods import ClsDrop, ToMe
from tests.methods_for_tests import Listed, Mix
from tests.vision import oracle
from tests.vision.encoders import (
    ENCODERS,
    HEADS,
    LAYERS,
    PATCHES,
    SPECIAL,
    build,
    images,
    row_of,
)
from tests.vision.oracle import Drop, Merge

UNNORMED = ("clip", "mlcd", "metaclip_2", "clipseg", "owlvit", "owlv2")
NORMED_WHOLE = ("dinov3_vit",)  # once rows are back at full length
TOLERANCE = 2e-5  # relative to the mean size of the values


def tower_of(model):
    return find_family(model).encoder.tower


def oracle_of(model, name, inputs, embedded, steps):
    """The oracle of each image that an encoder is called with."""
    rotary, layer = [], find_family(model).encoder.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda module, args, given: rotary.append(
            given.get("position_embeddings", args[1] if name == "mlcd" else None)
        ),
        with_kwargs=True,
    )
    model(**inputs)
    hook.remove()
    rotary = rotary[0]
    return oracle.run(tower_of(model), SPECIAL.get(name, 0), embedded, steps, rotary=rotary)


def merges(*rs, proportional=True):
    return [Merge(layer, r, proportional) for layer, r in enumerate(rs) if r]


# name -> (method, steps of the oracle, whether it needs a class token)
CASES = {
    "tome": (ToMe(r=5), merges(5, 5, 5, 5), False),
    "tome-schedule": (ToMe(r=(0, 14, 0, 3)), merges(0, 14, 0, 3), False),
    "tome-clipped": (ToMe(r=30), merges(18, 9, 4, 2), False),
    "tome-inflect": (ToMe(r=6, inflect=-1.0), merges(12, 8, 4, 0), False),
    "tome-keep": (ToMe(keep=0.5), merges(4, 5, 4, 5), False),
    "tome-unweighted": (
        ToMe(r=5, prop_attn=False), merges(5, 5, 5, 5, proportional=False), False,
    ),
    "cls-drop": (ClsDrop(layers=(1,), keep=10), [Drop(1, 10)], True),
    "cls-drop-0": (ClsDrop(layers=(0,), keep=0.5), [Drop(0, 18)], True),
    "cls-drop-3": (
        ClsDrop(layers=(0, 2, 3), keep=(20, 12, 5)), [Drop(0, 20), Drop(2, 12), Drop(3, 5)], True,
    ),
    "merge-then-drop": (
        [ToMe(r=(6, 6)), ClsDrop(layers=(2,), keep=9)], [*merges(6, 6), Drop(2, 9)], True,
    ),
    "drop-then-merge": (
        [ClsDrop(layers=(0,), keep=20), ToMe(r=(0, 4, 3))],
        [Drop(0, 20), *merges(0, 4, 3)], True,
    ),
    "drop-before-merge": (
        [Listed(layer=1, keep=20), ToMe(r=(0, 4, 3))],
        [Drop(1, listed=[i for i in range(36) if i % 3 == 0 or (i % 3 == 1 and i < 24)]),
         *merges(0, 4, 3)], False,
    ),
    "before": (Listed(layer=2), [Drop(2, listed=list(range(0, 36, 3)))], False),
    "before-0": (Listed(layer=0), [Drop(0, listed=list(range(0, 36, 3)))], False),
}  # fmt: skip
PAIRS = [
    (name, case) for name in ENCODERS for case in CASES if name in SPECIAL or not CASES[case][2]
]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_every_state_equals_the_full_length_oracle(name, case):
    model, inputs = build(ENCODERS, name), images(name=name)
    method, steps, _ = CASES[case]
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with foveate.use(model, method) as run:
            got = model(**inputs, output_hidden_states=True)
    results = oracle_of(model, name, inputs, plain.hidden_states[0], steps)
    names = (n for n in ("layernorm", "post_layernorm", "norm") if hasattr(model, n))
    norm = getattr(model, next(names, ""), None)
    for row, full in enumerate(results):
        worst = 0.0
        for number, states in enumerate(full.states):
            if number == 0 and case == "before-0":
                continue  # captured after the step; compared with the output of layer 0
            worst = max(worst, distance(got.hidden_states[number][row], states))
        last = full.x if name in (*UNNORMED, *NORMED_WHOLE) else norm(full.x)
        patches = full.alive.clone()
        patches[: full.special] = False
        filled = torch.where(full.alive[:, None], last, last[patches].mean(0))
        filled = norm(filled) if name in NORMED_WHOLE else filled
        worst = max(worst, distance(got.last_hidden_state[row], filled))
        bite = distance(plain.last_hidden_state[row], got.last_hidden_state[row])
        print(f"distance to the oracle {worst:.1e}, to the unpruned encoder {bite:.2f}")
        assert worst <= TOLERANCE
        assert bite > 0.1, "the test does not bite"
        assert list(run.kept[row]) == list(full.kept)
        for place, kept in full.kept.items():
            assert torch.equal(run.kept[row][place], kept)


def distance(a, b):
    """Largest difference, relative to the scale of the values."""
    return ((a - b).abs().max() / b.abs().mean().clamp(min=1)).item()


def test_the_oracle_itself_equals_the_encoder():
    for name in ENCODERS:
        model, inputs = build(ENCODERS, name), images(name=name)
        with torch.no_grad():
            plain = model(**inputs, output_hidden_states=True)
        results = oracle_of(model, name, inputs, plain.hidden_states[0], [])
        for row, full in enumerate(results):
            for number, states in enumerate(full.states):
                assert distance(plain.hidden_states[number][row], states) <= TOLERANCE


@pytest.mark.parametrize("method", [ToMe(r=0), ToMe(keep=1.0), ToMe(keep=36), Listed(keep=1.0)])
@pytest.mark.parametrize("name", ENCODERS)
def test_keeping_everything_changes_no_bit(name, method):
    model, inputs = build(ENCODERS, name), images(name=name)
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
        with foveate.use(model, method) as run:
            got = model(**inputs, output_hidden_states=True)
    assert list(got) == list(want)  # what is made of the rows too, such as `pooler_output`
    tensors = [key for key in want if isinstance(want[key], torch.Tensor)]
    assert all(torch.equal(got[key], want[key]) for key in tensors)
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))
    assert len(got.hidden_states) == len(want.hidden_states)
    assert all(len(kept) == PATCHES for image in run.kept for kept in image.values())
    assert len(run.record.images) == 3


@pytest.mark.parametrize("case", CASES)
def test_batch_equals_rows(case):
    for name in ("deit", "siglip"):
        method, _, needs_class = CASES[case]
        if needs_class and name not in SPECIAL:
            continue
        model, inputs = build(ENCODERS, name), images(4, name=name)
        with torch.no_grad(), foveate.use(model, method) as run:
            together, kept = model(**inputs).last_hidden_state, run.kept
            for row in range(4):
                alone = model(**row_of(inputs, row)).last_hidden_state
                torch.testing.assert_close(together[row], alone[0], rtol=0, atol=2e-5)
                for place, index in kept[row].items():
                    assert torch.equal(run.kept[0][place], index)


@pytest.mark.parametrize("name", ENCODERS)
def test_eager_attention_agrees_with_sdpa(name):
    inputs = images(name=name)
    got = []
    for attention in ("sdpa", "eager"):
        model = build(ENCODERS, name, attention)
        with torch.no_grad(), foveate.use(model, ToMe(r=6)):
            got.append(model(**inputs).last_hidden_state)
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=5e-5)


# -- heads


def pooled(name, model, full):
    """What the head of a model makes of the oracle's rows."""
    norm = getattr(tower_of(model), "layernorm", None)
    if name.endswith("-projection"):
        return model.visual_projection(tower_of(model).post_layernorm(full.x[0]))
    rows = full.x if norm is None else norm(full.x)
    left = full.alive.clone()
    left[: full.special] = False
    if name == "siglip":
        rows = model.vision_model.post_layernorm(rows)
    mean = rows[left].mean(0)
    if name in ("clip", "metaclip_2", "siglip", "ijepa"):
        return model.classifier(mean)
    if name == "dinov2":
        return model.classifier(torch.cat((rows[0], mean)))
    if name == "ast":
        return model.classifier((rows[0] + rows[1]) / 2)
    if name == "deit-distilled":
        return (model.cls_classifier(rows[0]) + model.distillation_classifier(rows[1])) / 2
    return model.classifier(rows[0])


@pytest.mark.parametrize("case", ["tome", "tome-keep", "cls-drop-3", "merge-then-drop", "before"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_see_what_is_left_weighted_by_sizes(name, case):
    model, inputs = build(HEADS, name), images(name=name)
    method, steps, needs_class = CASES[case]
    tower = tower_of(model)
    special = find_family(model).encoder.special
    if needs_class and not find_family(model).class_token:
        with pytest.raises(foveate.FoveateError, match="class token"):
            foveate.use(model, method)
        return

    def answer():
        out = model(**inputs)
        return out.image_embeds if name.endswith("-projection") else out.logits

    with torch.no_grad():
        embedded = tower(**inputs, output_hidden_states=True).hidden_states[0]
        plain = answer()
        with foveate.use(model, method):
            got = answer()
        results = oracle.run(tower, special, embedded, steps)
        want = torch.stack([pooled(name, model, full) for full in results])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert (got - plain).abs().max() > 1e-3, "the test does not bite"


@pytest.mark.parametrize("case", ["tome", "tome-schedule", "before"])
@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_a_head_that_pools_by_attention_counts_sources(name, case):
    """It must see merged tokens as often as they have sources, and dropped ones not at all."""
    model, inputs = build(ENCODERS, name), images(name=name)
    method, steps, _ = CASES[case]
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with foveate.use(model, method):
            got = model(**inputs).pooler_output
        for row, full in enumerate(oracle.run(model, 0, plain.hidden_states[0], steps)):
            want = model.head(model.post_layernorm(full.x[full.alive])[None])[0]
            torch.testing.assert_close(got[row], want, rtol=0, atol=2e-5)
            # What the head would make of the survivors, each counted once:
            once = sorted(full.stands) if len(full.groups) < full.total else full.alive
            unweighted = model.head(model.post_layernorm(full.x[once])[None])[0]
            if case != "before":
                assert (unweighted - want).abs().max() > 1e-4, "the test does not bite"


def padded():
    """Three images, of which the second has 5 x 6 patches and the third 4 x 6."""
    inputs = images(name="siglip2")
    for row, height in ((1, 5), (2, 4)):
        inputs["pixel_attention_mask"][row, 6 * height :] = 0
        inputs["spatial_shapes"][row] = torch.tensor([height, 6])
    return inputs


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize(
    "case", ["tome-unweighted", "tome-schedule", "before", "drop-before-merge"]
)
def test_padding_stays_hidden(case, attention, flash_emulated):
    """Nobody attends to it, merged or not, and a head that pools by attention does not either."""
    name = flash_emulated if attention == "flash" else attention
    model, inputs = build(ENCODERS, "siglip2", name), padded()
    padding = inputs["pixel_attention_mask"] == 0
    method, steps, _ = CASES[case]
    if attention == "flash" and any(getattr(step, "proportional", False) for step in steps):
        with pytest.raises(UnsupportedModelError, match="proportional attention"):
            foveate.use(model, method)
        return
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with foveate.use(model, method) as run:
            got = model(**inputs, output_hidden_states=True)
        results = oracle.run(model, 0, plain.hidden_states[0], steps, padding)
        for row, full in enumerate(results):
            for number, states in enumerate(full.states[1:], 1):
                assert distance(got.hidden_states[number][row], states) <= TOLERANCE
            for place, kept in full.kept.items():
                assert torch.equal(run.kept[row][place], kept)
            seen = full.alive & full.real
            want = model.head(model.post_layernorm(full.x[seen])[None])[0]
            torch.testing.assert_close(got.pooler_output[row], want, rtol=0, atol=2e-5)
    assert (got.pooler_output - plain.pooler_output).abs().max() > 1e-4, "the test does not bite"


def test_a_dense_reduction_comes_back_to_full_length():
    model, inputs = build(ENCODERS, "vit"), images()
    with torch.no_grad(), foveate.use(model, Mix(layer=1, keep=9)) as run:
        out = model(**inputs, output_hidden_states=True)
    assert out.last_hidden_state.shape == (3, PATCHES + 1, 32)
    assert [tuple(h.shape[:2]) for h in out.hidden_states] == [(3, 37)] * (LAYERS + 1)
    assert out.last_hidden_state.isfinite().all()
    assert [n for n, _ in run.record.encoder_tokens] == [37, 37, 10, 10]


# -- training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["tome", "cls-drop-3", "before"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip"])
def test_gradients_are_finite_and_checkpointing_changes_nothing(name, case, checkpointing):
    model, inputs = build(HEADS, name).train(), images()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with foveate.use(model, CASES[case][0]):
        out = model(**inputs, labels=torch.tensor([0, 1, 2]))
        out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    first = [g for n, g in gradients.items() if "patch_embed" in n and n.endswith("weight")]
    assert first[0].abs().sum() > 0
    if checkpointing:
        other = build(HEADS, name).train()
        with foveate.use(other, CASES[case][0]):
            other(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
        for n, p in other.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["tome", "tome-keep", "cls-drop-3", "before"])
def test_half_precision_stays_close(case):
    model, inputs = build(ENCODERS, "vit"), images()
    with torch.no_grad(), foveate.use(model, CASES[case][0]) as run:
        want, kept = model(**inputs).last_hidden_state, run.kept
        model.bfloat16()
        got = model(inputs["pixel_values"].bfloat16()).last_hidden_state
        assert [list(image) for image in run.kept] == [list(image) for image in kept]
    assert got.dtype == torch.bfloat16
    assert got.shape == want.shape
    assert got.isfinite().all()


@pytest.mark.parametrize("method", ["pyramiddrop", "fastv", "uniform"])
def test_methods_for_language_models_are_refused_with_what_works(method):
    model = build(ENCODERS, "siglip")
    with pytest.raises(UnsupportedModelError, match=r"encoder alone.* work here: .*tome"):
        foveate.use(model, method)
