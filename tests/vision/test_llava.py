"""Inside the tower of a LLaVA: what the language model reads, against oracles of both."""

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import foveate
from foveate.core import Scorer, Step
from foveate.errors import InputError
from foveate.families import find_family
from foveate.methods import ClsDrop, DivPrune, FasterVLM, FastV, PyramidDrop, ToMe
from tests import oracle
from tests.conformance.zoo import MEMBERS
from tests.methods_for_tests import Listed
from tests.oracle import Spec
from tests.tinies import IMAGE, PATCHES, prompts, row_of, tiny_llava
from tests.vision import oracle as encoder_oracle
from tests.vision.oracle import Drop, Merge

TOLERANCE = 5e-5
STEPS = 5
ROWS = {"one": [[5, 7]], "ragged": [[5, 7], [4], [2, 3, 9]]}


def siglip_llava():
    """A LLaVA whose tower has no class token, read from its last layer."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=48, patch_size=8, vision_use_head=False,
    )  # fmt: skip
    text = tiny_llava().config.text_config
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text.to_dict()), image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name and parameter.dim() > 1:
                parameter.mul_(40)
            if "patch_embedding" in name or ("vision" in name and "k_proj.weight" in name):
                parameter.mul_(4)
    model.generation_config.pad_token_id = 0
    return model


MODELS = {"clip": tiny_llava, "siglip": siglip_llava}
CASES = {
    "tome": (ToMe(r=6), [Merge(i, 6) for i in range(3)], []),
    "tome-keep": (ToMe(keep=9), [Merge(i, 9) for i in range(3)], []),
    "tome-original": (
        ToMe(r=(0, 12), positions="original"), [Merge(1, 12)], [],
    ),
    "before": (Listed(layer=1), [Drop(1, listed=list(range(0, 36, 3)))], []),
    "tome+pyramiddrop": (
        [ToMe(r=6), PyramidDrop(layers=(2, 4), keep=(0.5, 4))],
        [Merge(i, 6) for i in range(3)], [(2, 2, 9, True), (4, 4, 4, True)],
    ),
    "cls-drop": (ClsDrop(layers=(1,), keep=10), [Drop(1, 10)], []),
    "cls-drop+fastv": (
        [ClsDrop(layers=(0, 2), keep=(20, 10)), FastV(layer=3, keep=0.5)],
        [Drop(0, 20), Drop(2, 10)], [(3, 2, 5, False)],
    ),
}  # fmt: skip
PAIRS = [(m, c) for m in MODELS for c in CASES if m == "clip" or not c.startswith("cls")]


def encoded(model, inputs, steps):
    """The oracle of the tower on each image, and the features the projector makes of it."""
    if "pixel_values" not in inputs:
        return [], []
    tower = model.model.vision_tower
    with torch.no_grad():
        embedded = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[0]
        special = embedded.shape[1] - PATCHES
        results = encoder_oracle.run(tower, special, embedded, steps)
        entry = model.config.vision_feature_layer
        features = [
            model.model.multi_modal_projector(full.states[entry][special:]) for full in results
        ]
    return results, features


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("model", "case"), PAIRS)
def test_prefill_and_decoding_equal_the_oracle(model, case, rows):
    model, inputs = MODELS[model](), prompts(rows)
    method, steps, drops = CASES[case]
    methods = method if isinstance(method, list) else [method]
    with torch.no_grad():
        unpruned = model(**inputs).logits
        with foveate.use(model, method) as run:
            out = model.generate(
                **inputs, max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            prefill = model(**inputs).logits
    kept = iter(run.kept)
    worst = bite = 0.0
    for row in range(len(rows)):
        alone = row_of(inputs, row)
        results, features = encoded(model, alone, steps)
        places = [list(full.kept.values())[-1] for full in results]
        spec = Spec(
            kept=places if results else None,
            renumber=methods[0].positions != "original",
            drops=[
                oracle.Drop(layer, scored, [count] * len(features), renumber)
                for layer, scored, count, renumber in drops
            ],
        )
        prompt = alone["input_ids"].shape[1]
        ids = torch.cat((alone["input_ids"][0], out.sequences[row, inputs["input_ids"].shape[1] :]))
        want, history = oracle.run(model, ids, features, spec, prompt)
        got = torch.stack(out.logits, dim=1)[row]
        worst = max(worst, (want[prompt - 1 : -1] - got).abs().max().item())
        text = alone["input_ids"][0] != IMAGE
        worst = max(worst, (want[:prompt] - prefill[row, -prompt:])[text].abs().max().item())
        if features:
            bite = max(bite, (unpruned[row, -1] - prefill[row, -1]).abs().max().item())
        for image, full in enumerate(results):
            mine = next(kept)
            inside = {place: index for place, index in mine.items() if place.startswith("vision")}
            assert list(inside) == list(full.kept)
            assert all(torch.equal(index, full.kept[place]) for place, index in inside.items())
            after = [index for place, index in mine.items() if place not in inside]
            for index, step in zip(after, history[1:], strict=True):
                assert torch.equal(index, step[image])
    print(f"distance to the oracle {worst:.1e}, to the unpruned model {bite:.2f}")
    assert worst <= TOLERANCE
    assert bite > 0.05, "the test does not bite"


@pytest.mark.parametrize("method", [ToMe(keep=1.0), ToMe(r=0), ClsDrop(keep=1.0)], ids=str)
def test_keeping_everything_changes_no_bit(llava, method):
    inputs = prompts(ROWS["ragged"])
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        logits, out = llava(**inputs).logits, llava.generate(**inputs, **options)
        with foveate.use(llava, method):
            assert torch.equal(llava(**inputs).logits, logits)
            assert torch.equal(llava.generate(**inputs, **options), out)


@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_equals_its_rows(llava, case):
    inputs, method = prompts(ROWS["ragged"]), CASES[case][0]
    with torch.no_grad(), foveate.use(llava, method):
        together = llava(**inputs).logits
        for row in range(3):
            alone = row_of(inputs, row)
            length = alone["input_ids"].shape[1]
            want = llava(**alone).logits[0]
            torch.testing.assert_close(together[row, -length:], want, rtol=0, atol=TOLERANCE)


def test_a_pre_llm_method_sees_only_the_survivors(llava):
    """Values and signals are those of the survivors, and budgets count them."""
    inputs = prompts([[5, 7]])
    seen = []

    class Spy(DivPrune):
        def reduce(self, tokens, count):
            seen.append((tokens.x, tokens.index, count))
            return super().reduce(tokens, count)

    with torch.no_grad(), foveate.use(llava, [ToMe(r=6), Spy(keep=0.5)]) as run:
        llava(**inputs)
    (values, index, count), *_ = seen
    results, features = encoded(llava, inputs, [Merge(i, 6) for i in range(3)])
    assert count == 9
    assert torch.equal(index[0], results[0].kept["vision:2"])
    want = features[0][index[0]]
    assert (values[0] - want).abs().max() <= 1e-4 * want.abs().mean()
    assert set(run.kept[0]["pre_llm"].tolist()) < set(index[0].tolist())


def test_class_attention_after_a_merge_is_that_of_the_survivors(llava):
    """FasterVLM after ToMe ranks by the attention row of the shortened, weighted encoder."""
    inputs = prompts([[5, 7], [3, 4]])
    seen = []

    class Spy(FasterVLM):
        def scores(self, tokens):
            scores = super().scores(tokens)
            seen.append((scores, tokens.index))
            return scores

    with torch.no_grad(), foveate.use(llava, [ToMe(r=(8, 8)), Spy(keep=5)]):
        llava(**inputs)
    tower = llava.model.vision_tower
    with torch.no_grad():
        embedded = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[0]
    (scores, index), *_ = seen
    for image, full in enumerate(
        encoder_oracle.run(tower, 1, embedded, [Merge(0, 8), Merge(1, 8)])
    ):
        full.x = full.states[2]
        weights, _, _ = full.attend(tower.encoder.layers[2])
        of_row = weights.mean(0)[0]
        want = {
            stands - 1: sum(of_row[row] for row in rows)
            for stands, rows in zip(full.stands, full.groups, strict=True)
        }
        got = dict(zip(index[image].tolist(), scores[image], strict=True))
        for place, score in got.items():
            assert score == pytest.approx(want[place].item(), abs=1e-6)


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_share_what_the_encoder_left(llava, beams):
    inputs = prompts(ROWS["ragged"])
    with torch.no_grad(), foveate.use(llava, [ToMe(r=6), DivPrune(keep=6)]) as run:
        llava(**inputs)
        kept = run.kept
        llava.generate(**inputs, max_new_tokens=3, num_beams=beams, do_sample=False)
        repeated = run.kept
    assert len(repeated) == beams * len(kept)
    want = [*kept[:1] * beams, *kept[1:] * beams]
    for mine, alone in zip(repeated, want, strict=True):
        assert all(torch.equal(mine[place], alone[place]) for place in alone)


def test_features_from_outside_are_refused(llava):
    inputs = prompts([[5, 7]])
    given = llava.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with foveate.use(llava, ToMe()), pytest.raises(InputError, match="inside the encoder"):
        llava(**inputs, mm_encoder_outputs={"image": given})


def test_leaving_restores_both_parts(llava):
    inputs = prompts([[5, 7]])

    def touched():
        return {
            n: (list(m._forward_pre_hooks), list(m._forward_hooks), sorted(vars(m)))
            for n, m in llava.named_modules()
        }

    with torch.no_grad():
        want, before = llava(**inputs, output_hidden_states=True).logits, touched()
        with foveate.use(llava, [ToMe(r=6), PyramidDrop()]):
            llava(**inputs)
            assert touched() != before
        assert touched() == before
        assert torch.equal(llava(**inputs).logits, want)


def test_gradients_reach_projector_and_tower(llava):
    inputs = prompts(ROWS["ragged"])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with foveate.use(llava, [ToMe(r=6), DivPrune(keep=6)]):
        llava(**inputs, labels=labels).loss.backward()
    gradients = {n: p.grad for n, p in llava.named_parameters() if p.grad is not None}
    llava.zero_grad()
    assert all(g.isfinite().all() for g in gradients.values())
    for part in ("multi_modal_projector.linear_1.weight", "patch_embedding.weight"):
        assert any(part in n and g.abs().sum() > 0 for n, g in gradients.items())


@dataclass(frozen=True)
class Chosen(Scorer):
    """After the projector, keep given positions of each image."""

    kept: tuple[tuple[int, ...], ...]
    keep: int
    positions: str | None = None
    slug, stage, needs, paper = "chosen", "pre_llm", (), ""

    def steps(self, model):
        return (Step("pre_llm"),)

    def scores(self, tokens):
        rows = [torch.isin(tokens.index[i], torch.tensor(k)) for i, k in enumerate(self.kept)]
        return torch.stack(rows).float()


@pytest.mark.parametrize("case", ["tome", "cls-drop"])
@pytest.mark.parametrize("name", ["llava", "llava-siglip", "vipllava", "deepseek_vl"])
def test_other_families_read_the_same_as_from_the_oracles_features(name, case):
    """Pixels through the shortened tower give what the oracle's features give, with all but the
    survivors removed after the projector.
    """
    member = MEMBERS[name]()
    model = member.build()
    family = find_family(model)
    tower, special = family.encoder.tower, family.encoder.special
    assert bool(special) == (name in ("llava", "vipllava")), "class tokens of the towers"
    if case == "cls-drop" and not special:
        with pytest.raises(foveate.FoveateError, match="class token"):
            foveate.use(model, ClsDrop(layers=(0,), keep=7))
        return
    method, steps = {
        "tome": (ToMe(r=3), [Merge(i, 3) for i in range(family.feature_layer + 1)]),
        "cls-drop": (ClsDrop(layers=(0,), keep=7), [Drop(0, 7)]),
    }[case]
    inputs, pixels = member.inputs([[4, 5], [3, 2, 6]]), member.pixels(3)
    inputs.pop("mm_encoder_outputs")
    with torch.no_grad():
        embedded = tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[0]
        results = encoder_oracle.run(tower, special, embedded, steps)
        features = torch.stack([read(model, full) for full in results])
        kept = tuple(tuple(list(full.kept.values())[-1].tolist()) for full in results)
        plain = model(**inputs, **pixels).logits
        with foveate.use(model, method) as run:
            got = model(**inputs, **pixels).logits
            places = [list(image.values())[-1].tolist() for image in run.kept]
        with foveate.use(model, Chosen(kept, len(kept[0]))):
            given = {"mm_encoder_outputs": {"image": member.output(features)}}
            want = model(**inputs, **given).logits
    assert places == [list(index) for index in kept]
    text = (inputs["input_ids"] != member.image_id) & inputs["attention_mask"].bool()
    torch.testing.assert_close(got[text], want[text], rtol=0, atol=2e-4)
    assert (plain - got)[text].abs().max() > 0.02, "the test does not bite"


def read(model, full):
    """The features that a model's projector makes of an oracle's states."""
    base, special = model.model, full.special
    if hasattr(base, "aligner"):
        return base.aligner(base.vision_model.post_layernorm(full.x))
    names = ("vision_feature_layer", "vision_feature_layers")  # the second before transformers 5.23
    layers = next(getattr(model.config, n) for n in names if hasattr(model.config, n))
    layers = [layers] if isinstance(layers, int) else layers
    states = [full.states[layer][special:] for layer in layers]
    return base.multi_modal_projector(torch.cat(states, -1))
