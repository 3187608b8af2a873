"""Signals of layers with latent attention equal what an eager model's layers attend with."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import foveate
from foveate.core import Need, Step
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.methods import FastV
from foveate.signals.latent_view import LatentView, view_of
from foveate.signals.layer_view import LayerView
from tests.conformance.test_families import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.engine.test_signals import Spy, check_close

NAMES = ("kimi_k25", "kimi_k25-halves")
ROWS = [[5, 7], [4], [2, 3]]  # rows 0 and 2 have an image
LAYERS = {  # a dense layer, and one with experts
    **dict.fromkeys(NAMES, (1, 3)),
    "dots3_note": (1, 4),  # those that see all, among layers with windows and indexers
}
SIGNALS = (
    "text_attention",
    "content_attention",
    "question_attention",
    "question_closeness",
    "llm_keys",
    "llm_values",
    "value_attention",
    "question_keys",
)


ASKING = ("text_attention", "question_attention")


@contextmanager
def attended(model):
    """While open, fill lists with the keys, values and probabilities of each layer that runs."""
    keys, values, maps, handles, whole = [], [], [], [], []
    modules = [layer.self_attn for layer in find_family(model).layers]

    def watched(module):
        def expand(*latents):
            made = type(module).expand_kv(module, *latents)
            keys.append(made[0])
            values.append(made[1])
            return made

        return expand

    try:
        for module in modules:
            module.expand_kv = watched(module)
            whole.append(module)
            handles.append(module.register_forward_hook(lambda m, a, out: maps.append(out[1])))
        yield keys, values, maps
    finally:
        for module in whole:
            del module.expand_kv
        for handle in handles:
            handle.remove()


def run_layers(name, hidden, positions, first=0, rotate=True, count=1):
    """Layers of the eager model from `first` on, of one row: keys, values and maps of each."""
    text = model_of(name, "eager").model.language_model
    cos, sin = MEMBERS[name]().rotary(text, hidden, positions, first)
    if not rotate:
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    length = hidden.shape[1]
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    with attended(model_of(name, "eager")) as found:
        for layer in text.layers[first : first + count]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
    return [[one[0] for one in part] for part in found]


def entering(name, inputs):
    """(T, D) states that enter each layer of an unpruned row."""
    model, states = model_of(name, "eager"), []
    hooks = [
        layer.register_forward_pre_hook(lambda m, a: states.append(a[0][0]))
        for layer in model.model.language_model.layers
    ]
    model.model(**fresh(inputs), use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


def closeness(name, text, columns):
    """(Q, V) share of a key that is not rotated, and the mean cosine of the angles of the rest."""
    module = model_of(name).model.language_model.layers[LAYERS[name][0]].self_attn
    own, turned = module.qk_nope_head_dim, module.qk_rope_head_dim
    frequency = 10000.0 ** (-torch.arange(0, turned, 2) / turned)
    cosine = ((text[:, None] - columns)[..., None] * frequency).cos().mean(-1)
    return (own + turned * cosine) / (own + turned)


@torch.no_grad()
def expected(name, signal, inputs):
    """(L, ...) a signal of the image of a row, from the layers of an eager model."""
    ids = inputs["input_ids"][0]
    image = MEMBERS[name].image_id
    columns = (ids == image).nonzero()[:, 0]
    text = torch.arange(int(columns[-1]) + 1, len(ids))
    positions, found = torch.arange(len(ids))[None], []
    for number, states in enumerate(entering(name, inputs)):
        if number not in LAYERS[name]:
            continue
        rotate = signal != "content_attention"
        keys, values, maps = (
            part[0] for part in run_layers(name, states[None], positions, number, rotate)
        )
        alike = (values[:, columns] @ values[:, -1, :, None])[..., 0] / values.shape[-1] ** 0.5
        seen = maps[:, -1, columns]
        found.append(
            {
                "text_attention": seen,
                "content_attention": seen / seen.sum(-1, keepdim=True),
                "question_attention": maps[:, text][:, :, columns],
                "question_closeness": closeness(name, text, columns),
                "llm_keys": keys[:, columns],
                "llm_values": values[:, columns],
                "value_attention": alike.softmax(-1),
                "question_keys": keys[:, text],
            }[signal]
        )
    return torch.stack(found)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_signals_equal_eager_attention(name, signal):
    """Of each row of a padded batch."""
    member, model, spy = (
        MEMBERS[name](),
        model_of(name),
        Spy(Step("llm", 4, (Need(signal, LAYERS[name]),))),
    )
    inputs = member.inputs(ROWS)
    with foveate.use(model, spy):
        model.model(**fresh(inputs))
    got = spy.of(signal)
    assert [row for row, *_ in got] == [0, 2]
    for row, values, tokens in got:
        if signal.startswith("question"):
            mask = tokens.signal("question_mask")[list(tokens.rows).index(row)]
            axis = 1 if signal == "question_closeness" else 2
            values = values.movedim(axis, 0)[mask].movedim(0, axis)
        want = expected(name, signal, member.row(inputs, row))
        assert want.std() > 1e-3
        check_close(values, want)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_cached_latents_take_part_in_a_later_turn(name):
    """Attention to the second turn's image is what is left beside that to the first turn."""
    member, model, spy = (
        MEMBERS[name](),
        model_of(name),
        Spy(Step("llm", 4, tuple(Need(s, LAYERS[name]) for s in ASKING))),
    )
    whole = member.inputs([[5, 7, 6]])
    border = 5 + member.visual + 3
    ids = whole["input_ids"]
    features = member.stack(whole)
    parts = []
    for span, image in ((slice(border), 0), (slice(border, None), 1)):
        outputs = {member.modality: member.output(features[image : image + 1])}
        parts.append({"input_ids": ids[:, span], "mm_encoder_outputs": outputs})
    cache = model.model(**fresh(parts[0]), **member.extras(ids, 1), use_cache=True).past_key_values
    with foveate.use(model, spy):
        model.model(
            **fresh(parts[1]), **member.extras(ids, 1), past_key_values=cache,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
    columns = (ids[0] == member.image_id).nonzero()[member.visual :, 0]
    text, positions = torch.arange(int(columns[-1]) + 1, ids.shape[1]), torch.arange(ids.shape[1])
    (tokens,) = spy.seen
    for place, number in enumerate(LAYERS[name]):
        states = entering(name, whole)[number][None]
        maps = run_layers(name, states, positions[None], number)[2][0]
        assert maps[:, -1, :border].sum(-1).min() > 0.01  # the first turn is looked at
        check_close(tokens.signal("text_attention")[0, place], maps[:, -1, columns])
        got = tokens.signal("question_attention")[0, place]
        check_close(got, maps[:, text][:, :, columns])


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_survivors_attend_from_where_they_are_numbered(name, positions):
    needs = tuple(Need(signal, (3,)) for signal in ("text_attention", "llm_keys"))
    member, model, spy = MEMBERS[name](), model_of(name), Spy(Step("llm", 4, needs), keep=3)
    inputs = member.inputs([[5, 7]])
    with foveate.use(model, [FastV(2, 6, positions=positions), spy]) as run:
        model.model(**fresh(inputs))
        kept = run.kept[0]["llm:2"]
    columns = (inputs["input_ids"][0] == member.image_id).nonzero()[:, 0]
    length = inputs["input_ids"].shape[1]
    source = torch.cat((torch.arange(5), columns[kept], torch.arange(int(columns[-1]) + 1, length)))
    numbers = torch.arange(len(source)) if positions == "renumbered" else source
    states = entering(name, inputs)[2][None, source]
    keys, _, maps = (part[1] for part in run_layers(name, states, numbers[None], 2, count=2))
    image = slice(5, 5 + len(kept))
    (tokens,) = spy.seen
    check_close(tokens.signal("text_attention")[0, 0], maps[:, -1, image])
    check_close(tokens.signal("llm_keys")[0, 0], keys[:, image])


def test_only_latent_attention_is_viewed_so():
    hidden = torch.zeros(1, 2, 64)
    for name, kind in (("kimi_k25", LatentView), ("llava", LayerView)):
        layer = find_family(model_of(name)).layers[0]
        assert type(view_of(layer, hidden, None)) is kind


def test_rotation_that_is_unknown_is_refused():
    model = MEMBERS["kimi_k25"]().build()
    text = model.model.language_model
    text.layers[0].self_attn.config = SimpleNamespace()
    hidden = torch.zeros(1, 2, 64)
    view = view_of(text.layers[0], hidden, text.rotary_emb(hidden, torch.arange(2)[None]))
    with pytest.raises(UnsupportedModelError, match="has no rope_interleave"):
        _ = view.keys
