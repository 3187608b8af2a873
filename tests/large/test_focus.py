"""The Region Focus Module: what it computes, keeps, and learns."""

import pytest
import torch

import foveate
from foveate.errors import FoveateError, LayerError, UnsupportedModelError
from foveate.large import Distillation, RegionFocus
from foveate.large.focus import attention_logits
from tests.conformance.test_pixels import model_of
from tests.tinies import tiny_llava

LAYERS = (0, 2, 5)


def attention_of(model, hidden, layer, positions=None):
    """(H, T, T) eager attention of a layer, with only the chosen layers in front of it."""
    text = model.model.language_model
    if positions is None:
        positions = torch.arange(hidden.shape[1])[None]
    rotary = text.rotary_emb(hidden, position_ids=positions)
    length = hidden.shape[1]
    causal = torch.full((1, 1, length, length), -torch.inf).triu(1)
    for number in LAYERS:
        block = text.layers[number]
        if number == layer:
            normed = block.input_layernorm(hidden)
            _, maps = block.self_attn(normed, rotary, causal)
            return maps[0]
        hidden = block(hidden, attention_mask=causal, position_embeddings=rotary)
    raise AssertionError


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@torch.no_grad()
def test_scores_are_the_eager_attention_of_the_last_token(text):
    model = tiny_llava(text, attention="eager")
    focus = RegionFocus.of(model, LAYERS)
    hidden = torch.randn(1, 23, 64)
    local = slice(4, 19)
    rows = attention_of(model, hidden, LAYERS[-1])[:, -1, local]
    want = (rows / rows.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(focus.scores(hidden, local)[0], want, rtol=1e-4, atol=1e-6)
    assert focus.scores(hidden, local).sum().item() == pytest.approx(1)
    spread = torch.arange(23)[None] * 3
    rows = attention_of(model, hidden, LAYERS[-1], spread)[:, -1, local]
    want = (rows / rows.sum(-1, keepdim=True)).mean(0)
    got = focus.scores(hidden, local, spread)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_logits_of_every_layer_are_those_of_attention():
    model = tiny_llava(attention="eager")
    focus = RegionFocus.of(model, LAYERS)
    hidden, rows = torch.randn(1, 23, 64), torch.tensor([20, 22])
    logits = list(focus.logits(hidden, torch.arange(23)[None], rows, slice(0, 21), None))
    for layer, got in zip(LAYERS, logits, strict=True):
        want = attention_of(model, hidden, layer)[:, 20, :21]
        torch.testing.assert_close(got[0, :, 0].softmax(-1), want, rtol=1e-4, atol=1e-6)


def test_layers_scale_with_the_model():
    assert RegionFocus.of(tiny_llava(layers=12)).sources == (0, 2, 4, 5)
    assert RegionFocus.of(tiny_llava(layers=32)).sources == (1, 5, 11, 14)
    assert RegionFocus.of(tiny_llava(layers=1)).sources == (0,)


def test_nothing_is_shared_with_the_model():
    model = tiny_llava()
    with foveate.use(model, "fastv", layer=1):
        focus = RegionFocus.of(model, LAYERS)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in focus.modules())
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in focus.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.text_config._attn_implementation == "sdpa"


def test_saved_and_loaded(tmp_path):
    model = tiny_llava()
    focus = RegionFocus.of(model, LAYERS)
    for parameter in focus.parameters():
        parameter.data.mul_(1.5)
    focus.save(tmp_path / "new" / "focus")
    back = RegionFocus.load(tmp_path / "new" / "focus", model)
    assert back.sources == LAYERS
    hidden = torch.randn(1, 9, 64)
    got, want = (f.scores(hidden, slice(2, 7)) for f in (back, focus))
    assert torch.equal(got, want)
    assert not torch.equal(want, RegionFocus.of(model, LAYERS).scores(hidden, slice(2, 7)))
    with pytest.raises(FoveateError, match="made for another model"):
        RegionFocus.load(tmp_path / "new" / "focus", tiny_llava("qwen2"))
    with pytest.raises(FoveateError, match="holds no Region Focus Module"):
        RegionFocus.load(tmp_path, model)


def test_refusals():
    with pytest.raises(UnsupportedModelError, match="llama, mistral, qwen2"):
        RegionFocus.of(model_of("qwen2_vl"))
    with pytest.raises(LayerError, match="ascending layers"):
        RegionFocus.of(tiny_llava(), (3, 1))
    with pytest.raises(LayerError, match="ascending layers"):
        RegionFocus.of(tiny_llava(), (99,))


def test_distillation_is_the_published_sum():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 2, 3, 7, generator=generator)
    local = slice(2, 6)
    total = 0.0
    for head in range(2):
        for row in range(3):
            t, s = teacher[0, head, row].softmax(0), student[0, head, row].softmax(0)
            whole = sum(float(p * (p.log() - q.log())) for p, q in zip(t, s, strict=True))
            t, s = t[local] / t[local].sum(), s[local] / s[local].sum()
            tiles = sum(float(p * (p.log() - q.log())) for p, q in zip(t, s, strict=True))
            error = sum(float((p - q) ** 2) for p, q in zip(t, s, strict=True)) / 4
            total += 0.5 * (whole + 3 * tiles) + 4 * error
    got = Distillation(kl=0.5, tiles=3, mse=4)(teacher, student, local)
    assert got.item() == pytest.approx(total / 6, rel=1e-5)
    assert Distillation()(teacher, teacher, local).item() == pytest.approx(0, abs=1e-6)


def test_a_few_steps_bring_the_module_closer_to_the_model():
    model = tiny_llava(layers=6)
    focus = RegionFocus.of(model, (1, 4)).requires_grad_(True)
    text = model.model.language_model
    hidden, positions = torch.randn(4, 20, 64), torch.arange(20).expand(4, -1)
    visual, rows = slice(1, 16), torch.tensor([19])
    with torch.no_grad():
        states = text(inputs_embeds=hidden, output_hidden_states=True).hidden_states
        rotary = text.rotary_emb(hidden, position_ids=positions)
    taught = attention_logits(text.layers[4], states[4], rotary, rows, visual).detach()
    optimizer = torch.optim.AdamW(list(focus.parameters()), lr=1e-3)
    losses = []
    for _ in range(15):
        *_, told = focus.logits(hidden, positions, rows, visual, None)
        loss = Distillation()(taught, told, slice(3, 15))
        loss.backward()
        grads = [p.grad for p in focus.layers[-1].self_attn.q_proj.parameters()]
        assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
