"""Each signal equals what an eager model with all its attention maps says."""

from dataclasses import dataclass, field

import pytest
import torch

import foveate
from foveate.core import Adaptive, Keep, Method, Need, Reduction, Scorer, Step, by_count
from foveate.methods import FastV
from tests.tinies import IMAGE, PATCHES, prompts, row_of, tiny_llava

BEHIND = Step("pre_llm")
ROWS = [[3, 4, 5], [6, 2], [7], [2, 9]]
DECODER = (
    "text_attention",
    "content_attention",
    "question_attention",
    "llm_states",
    "llm_keys",
    "llm_values",
    "value_attention",
    "normed_states",
    "question_states",
    "question_keys",
    "question_normed_states",
)


@dataclass(frozen=True)
class Spy(Scorer):
    """Keeps positions 0, 3, 6, ... and notes what it is shown."""

    step: Step = BEHIND
    keep: Keep = 12
    positions: str | None = None
    seen: list = field(default_factory=list)
    slug, needs, paper = "spy", (), ""

    @property
    def stage(self):
        return self.step.stage

    def steps(self, model):
        return (self.step,)

    def scores(self, tokens):
        self.seen.append(tokens)
        position = tokens.index.float()
        return -(position % 3) * 1000 - position

    def of(self, name):
        """name -> signals of the images, by row and order in it."""
        images = [
            (row, tokens.signal(name)[i], tokens)
            for tokens in self.seen
            for i, row in enumerate(tokens.rows)
        ]
        return sorted(images, key=lambda item: item[0])


def check_close(got, want):
    """To 1e-5 of the largest value: the states of these models reach 1,000."""
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request):
    return tiny_llava(request.param)


@pytest.fixture(scope="module")
def batch():
    """A padded batch whose rows have the positions that they have alone."""
    inputs = prompts(ROWS)
    positions = inputs["attention_mask"].cumsum(1) - 1
    return {**inputs, "position_ids": positions.clamp(min=0)}


def row_alone(batch, row):
    """One row of the batch without padding, and its images' columns."""
    inputs = row_of({k: v for k, v in batch.items() if k != "position_ids"}, row)
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    return inputs, list(visual.split(PATCHES)) if len(visual) else []


def eager(model, inputs):
    """Attention maps, and what enters each layer, of the unpruned model."""
    text = model.model.language_model
    kind = text.config._attn_implementation
    states, keys = [], {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, a: states.append(a[0][0]))
        for layer in text.layers
    ]
    try:
        model.set_attn_implementation("eager")
        out = model.model(**inputs, output_attentions=True, use_cache=True)
        for number, layer in enumerate(out.past_key_values.layers):
            keys[number] = layer.keys[0]
    finally:
        model.set_attn_implementation(kind)
        for hook in hooks:
            hook.remove()
    return [a[0] for a in out.attentions], states, keys


@torch.no_grad()
def expected(model, batch, name, layers):
    """(row, image's own text columns, value) of each image, in order."""
    result = []
    for row in range(len(ROWS)):
        inputs, images = row_alone(batch, row)
        if not images:
            continue
        maps, states, keys = eager(model, inputs)
        ids = inputs["input_ids"][0]
        for columns in images:
            text = ((ids != IMAGE) & (torch.arange(len(ids)) > columns[-1])).nonzero()[:, 0]
            at = {"question": text, "llm": columns, "normed": columns}.get(name.split("_")[0])
            values = []
            for i in layers:
                if name == "text_attention":
                    values.append(maps[i][:, -1, columns])
                elif name == "question_attention":
                    values.append(maps[i][:, text][:, :, columns])
                elif name == "content_attention":
                    values.append(content(model, i, states[i], columns))
                elif "value" in name:
                    made = values_of(model, i, states[i])
                    alike = (made[:, columns] @ made[:, -1, :, None])[..., 0] / made.shape[
                        -1
                    ] ** 0.5
                    found = made[:, columns] if name == "llm_values" else alike.softmax(-1)
                    values.append(found)
                elif name.endswith("keys"):
                    values.append(keys[i][:, at])
                elif "normed" in name:
                    values.append(model.model.language_model.norm(states[i][at]))
                else:
                    values.append(states[i][at])
            result.append((row, len(text), torch.stack(values)))
    return result


def values_of(model, number, states):
    """(Hkv, T, d) values of a layer."""
    layer = model.model.language_model.layers[number]
    made = layer.self_attn.v_proj(layer.input_layernorm(states))
    return made.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1)


def content(model, number, states, columns):
    """Attention of the last token without positions, over one image's tokens."""
    layer = model.model.language_model.layers[number]
    normed, attention = layer.input_layernorm(states), layer.self_attn
    q = attention.q_proj(normed[-1]).view(4, -1)
    k = attention.k_proj(normed[columns]).view(len(columns), -1, q.shape[-1]).transpose(0, 1)
    k = k.repeat_interleave(4 // k.shape[0], 0)
    return ((k @ q[..., None])[..., 0] * attention.scaling).softmax(-1)


@pytest.mark.parametrize("name", DECODER)
def test_decoder_signals_equal_eager_attention(model, batch, name):
    spy = Spy(Step("llm", 3, (Need(name, (1, 3)),)))
    with torch.no_grad(), foveate.use(model, spy):
        model.model(**batch)
    got, want = spy.of(name), expected(model, batch, name, (1, 3))
    assert [row for row, *_ in got] == [row for row, *_ in want] == [0, 0, 1, 3]
    for (row, signal, tokens), (_, length, value) in zip(got, want, strict=True):
        if name.startswith("question"):
            mask = tokens.signal("question_mask")[list(tokens.rows).index(row)]
            axis = {"question_attention": 2, "question_keys": 2}.get(name, 1)
            if row == 0:  # two images: which of them it is, its number of text tokens tells
                masks = tokens.signal("question_mask")
                mask = next(m for m in masks if int(m.sum()) == length)
                signal = tokens.signal(name)[int((masks.sum(1) == length).nonzero()[0, 0])]
            assert int(mask.sum()) == length
            assert bool((signal.movedim(axis, 0)[~mask] == 0).all())
            signal = signal.movedim(axis, 0)[mask].movedim(0, axis)
        check_close(signal, value)


def test_signals_taken_before_a_drop_are_those_of_the_survivors(model, batch):
    early, late = (Need("text_attention", (1,)), Need("llm_states", (1,))), Need("llm_states", (3,))
    spy = Spy(Step("llm", 4, (*early, late)), keep=5)
    with torch.no_grad(), foveate.use(model, [FastV(layer=2, keep=12), spy]) as run:
        model.model(**batch)
        kept = [image["llm:2"] for image in run.kept]
    whole = expected(model, batch, "text_attention", (1,))
    for (_, signal, _), (_, _, value), index in zip(
        spy.of("text_attention"), whole, kept, strict=True
    ):
        check_close(signal, value[..., index])
    for tokens in spy.seen:
        assert tokens.signal("llm_states").shape[2] == 12


def test_question_relevance_is_a_softmax_over_the_text(model, batch):
    spy = Spy(Step("llm", 2, (Need("question_relevance"),)))
    with torch.no_grad(), foveate.use(model, spy):
        model.model(**batch)
    for row in (1, 3):
        inputs, (columns,) = row_alone(batch, row)
        with torch.no_grad():
            _, states, _ = eager(model, inputs)
        text = states[0][int(columns[-1]) + 1 :]
        want = (states[0][columns] @ text.T).softmax(-1).mean(0)
        ((_, signal, tokens),) = [item for item in spy.of("question_relevance") if item[0] == row]
        mask = tokens.signal("question_mask")[list(tokens.rows).index(row)]
        check_close(signal[mask], want)
        assert bool((signal[~mask] == 0).all())


def test_places_in_the_prompt_do_not_count_padding(model, batch):
    spy = Spy(Step("llm", 3, (Need("prompt_positions"), Need("question_positions"))), keep=5)
    with torch.no_grad(), foveate.use(model, [FastV(layer=2, keep=12), spy]) as run:
        model.model(**batch)
        kept = [image["llm:2"] for image in run.kept]
    for row, number in ((1, 2), (3, 3)):
        inputs, (columns,) = row_alone(batch, row)
        ((_, places, tokens),) = [i for i in spy.of("prompt_positions") if i[0] == row]
        assert places.tolist() == columns[kept[number]].tolist()
        ((_, after, _),) = [i for i in spy.of("question_positions") if i[0] == row]
        mask = tokens.signal("question_mask")[list(tokens.rows).index(row)]
        length = inputs["input_ids"].shape[1]
        assert after[mask].tolist() == list(range(int(columns[-1]) + 1, length))


def test_transition_is_that_of_the_modules(model, batch):
    """Size of what attention and MLP add, times a softmax of its turn over the row."""
    spy = Spy(Step("llm", 3, (Need("transition", (0, 2)),)))
    with torch.no_grad(), foveate.use(model, spy):
        model.model(**batch)
    inputs, (columns,) = row_alone(batch, 3)
    seen = []
    hooks = [
        module.register_forward_hook(
            lambda m, a, k, out: seen.append(
                ((a or (k["hidden_states"],))[0][0], (out[0] if isinstance(out, tuple) else out)[0])
            ),
            with_kwargs=True,
        )
        for number in (0, 2)
        for module in (
            model.model.language_model.layers[number].self_attn,
            model.model.language_model.layers[number].mlp,
        )
    ]
    with torch.no_grad():
        model.model(**inputs)
    for hook in hooks:
        hook.remove()
    parts = []
    for given, made in seen:
        turn = 1 - torch.nn.functional.cosine_similarity(given, made, dim=-1)
        parts.append(made.norm(dim=-1) / given.norm(dim=-1) * turn.softmax(0))
    want = torch.stack((parts[0] + parts[1], parts[2] + parts[3]))[:, columns]
    ((_, signal, _),) = [item for item in spy.of("transition") if item[0] == 3]
    check_close(signal, want)


ENCODER = (
    "received_attention",
    "given_attention",
    "joint_cls_attention",
    "encoder_keys",
    "encoder_features",
    "cls_attention",
)


@pytest.mark.parametrize("name", ENCODER)
def test_encoder_signals_equal_eager_attention(name):
    model, batch = tiny_llava(), prompts(ROWS)
    layers = (0, 2)
    spy = Spy(Step("pre_llm", needs=(Need(name, layers),)))
    with torch.no_grad(), foveate.use(model, spy):
        model.model(**batch)
    reference = tiny_llava(attention="eager").model.vision_tower
    projected = {}
    for number in layers:
        for part in ("q_proj", "k_proj"):
            getattr(reference.encoder.layers[number].self_attn, part).register_forward_hook(
                lambda m, a, out, key=(number, part): projected.__setitem__(key, out)
            )
    with torch.no_grad():
        out = reference(batch["pixel_values"], output_attentions=True, output_hidden_states=True)
    want = []
    for number in layers:
        maps = out.attentions[number]
        q, k = projected[number, "q_proj"], projected[number, "k_proj"]
        joint = (q[:, :1] @ k.transpose(1, 2) / 32**0.5).softmax(-1)[:, 0, 1:]
        want.append(
            {
                "received_attention": maps.mean(1).mean(1)[:, 1:],
                "given_attention": maps.mean(1)[:, 1:, 1:].sum(-1),
                "joint_cls_attention": joint,
                "encoder_keys": k[:, 1:].unflatten(-1, (4, 8)).transpose(1, 2),
                "encoder_features": out.hidden_states[number + 1][:, 1:],
                "cls_attention": maps[:, :, 0, 1:],
            }[name]
        )
    signals = torch.cat([tokens.signal(name) for tokens in spy.seen])
    check_close(signals, torch.stack(want, 1))


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_question_embeddings_are_those_of_the_text_after_the_image(model, batch, way):
    spy = Spy(Step("pre_llm", needs=(Need("question_embeddings"),)))
    with torch.no_grad(), foveate.use(model, spy):
        if way == "forward":
            model.model(**batch)
        else:
            model.generate(**prompts(ROWS), max_new_tokens=2, do_sample=False)
    table = model.model.get_input_embeddings()
    (tokens,) = spy.seen
    assert tokens.rows == (0, 0, 1, 3)
    for number, row in ((2, 1), (3, 3)):
        inputs, (columns,) = row_alone(batch, row)
        text = inputs["input_ids"][0, int(columns[-1]) + 1 :]
        mask = tokens.signal("question_mask")[number]
        check_close(tokens.signal("question_embeddings")[number][mask], table(text))
    assert tokens.signal("question_mask").sum(1).tolist() == [9, 5, 2, 9]


def test_text_is_paired_with_the_image_before_it(model, batch):
    """Of two images, the first one's text ends where the second one begins."""
    spy = Spy(Step("pre_llm", needs=(Need("question_embeddings"),)))
    with foveate.use(model, spy):
        model(**batch)
    lengths = [mask.sum().item() for _, mask, _ in spy.of("paired_mask")]
    after = [mask.sum().item() for _, mask, _ in spy.of("question_mask")]
    assert lengths == [4, 5, 2, 9]
    assert after == [4 + 5, 5, 2, 9]
    first = spy.of("paired_mask")[0][1].nonzero()[:, 0]
    assert first.tolist() == [0, 1, 2, 3]


@dataclass(frozen=True)
class Brightest(Adaptive):
    """Keeps as many tokens as have a positive first feature, in falling order of it."""

    step: Step = BEHIND
    keep: None = None
    positions: str | None = None
    slug, stage, needs, paper = "brightest", "pre_llm", (), ""

    def steps(self, model):
        return (self.step,)

    def reduce_each(self, tokens):
        value = tokens.x[..., 0]
        order = value.argsort(1, descending=True)
        parts = by_count((value > 0).sum(1).clamp(min=1))
        return [(m, Reduction(order[m, :count], ordered=True)) for count, m in parts.items()]


def ordered_by_hand(model, inputs, columns, layer, renumber):
    """Last state of a row whose tokens are sorted, and cut, before a layer; nothing of foveate."""
    text = model.model.language_model
    caught = []
    hook = text.layers[layer].register_forward_pre_hook(lambda m, a: caught.append(a[0]))
    model.model(**inputs, use_cache=False)
    hook.remove()
    (hidden,) = caught
    value = hidden[0, columns, 0]
    order = columns[value.argsort(descending=True)[: max(int((value > 0).sum()), 1)]]
    order = order if renumber else order.sort().values
    before, after = torch.arange(columns[0]), torch.arange(columns[-1] + 1, hidden.shape[1])
    source = torch.cat((before, order, after))
    hidden = hidden[:, source]
    positions = torch.arange(len(source))[None] if renumber else source[None]
    rotary = text.rotary_emb(hidden, positions)
    for module in text.layers[layer:]:
        hidden = module(hidden, attention_mask=None, position_embeddings=rotary)
    return text.norm(hidden)[0, -1], order


@pytest.mark.parametrize("step", [Step("pre_llm"), Step("llm", 2)], ids=["pre_llm", "llm"])
@pytest.mark.parametrize("positions", ["renumbered", "original"])
@torch.no_grad()
def test_methods_may_count_and_order_their_survivors(model, batch, step, positions):
    renumber = positions == "renumbered"
    with foveate.use(model, Brightest(step, positions=positions)) as run:
        states = model.model(**batch).last_hidden_state[:, -1]
        kept = [image[step.site] for image in run.kept]
    counts = set()
    for row, number in ((1, 2), (3, 3)):
        inputs, (columns,) = row_alone(batch, row)
        want, order = ordered_by_hand(model, inputs, columns, step.layer, renumber)
        torch.testing.assert_close(states[row], want, rtol=0, atol=3e-5)
        assert sorted((order - columns[0]).tolist()) == kept[number].tolist()
        counts.add(len(order))
    assert len(counts) == 2  # or nothing was ragged


@dataclass(frozen=True)
class Nothing(Method):
    """Removes all visual tokens before a layer."""

    layer: int = 3
    keep: Keep = 0.5
    positions: str | None = "original"
    slug, stage, needs, paper = "nothing", "llm", (), ""

    def steps(self, model):
        return (Step("llm", self.layer, (Need("text_attention", (self.layer,)),)),)

    def count(self, remaining, total, step, number, row=0):
        return 0

    def reduce(self, tokens, count):
        raise AssertionError("there is nothing to choose")


def four_tokens(model, inputs):
    """Four tokens of each row, and their logits, with three methods on their way."""
    with foveate.use(model, [FastV(2, 10), Nothing(3), FastV(5, 0.5)]) as run:
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out, [len(image["llm:3"]) for image in run.kept]


@torch.no_grad()
def test_all_tokens_may_go(model):
    batch = prompts(ROWS)
    out, kept = four_tokens(model, batch)
    assert kept == [0] * 4
    slots = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert slots[3:] == [max(sum(row) for row in ROWS) + 3] * 3
    for row in range(len(ROWS)):
        one, _ = four_tokens(model, row_of(batch, row))
        for got, want in zip(out.logits, one.logits, strict=True):
            torch.testing.assert_close(got[row], want[0], rtol=0, atol=3e-5)
