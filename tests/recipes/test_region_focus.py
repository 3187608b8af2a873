"""The training script: what it packs, and that it writes what the reader takes."""

import json

import torch

from foveate import large, tiny
from foveate.large.image import Held
from foveate.large.pyramid import levels
from recipes.region_focus import KINDS, LAYERS, LENGTH, SIDE, SLOTS, _scene, pack, taught, train


@torch.no_grad()
def test_a_packed_question_sees_what_it_would_alone():
    """Attention and answer of each question equal those of a prompt of its own."""
    model, processor = tiny.load()
    reader = large.Reader(model, processor, large.RegionFocus.of(model, LAYERS))
    scene, questions = _scene(11)
    packed = pack(reader, [(scene, questions)], thin=False)
    layer = LAYERS[1]
    maps, logits = taught(model, packed, (layer,))
    assert packed.hidden.shape[1] == 1 + 256 + 576 + SLOTS * LENGTH
    text = model.model.language_model
    prefix = packed.hidden[:, : packed.visual.stop]
    for number in (0, SLOTS - 1):
        ids = processor.tokenizer(questions[number].text, return_tensors="pt")["input_ids"][:, 1:]
        alone = torch.cat((prefix, model.get_input_embeddings()(ids)), 1)
        states = text(inputs_embeds=alone, output_hidden_states=True)
        want = model.lm_head(states.last_hidden_state[:, -1])
        torch.testing.assert_close(logits[:, number], want, rtol=1e-3, atol=1e-3)
        rotary = text.rotary_emb(alone, torch.arange(alone.shape[1])[None])
        last = torch.tensor([alone.shape[1] - 1])
        seen = large.focus.attention_logits(
            text.layers[layer], states.hidden_states[layer], rotary, last, packed.visual
        )
        got = maps[layer][:, :, number]
        torch.testing.assert_close(got, seen[:, :, 0], rtol=1e-3, atol=1e-3)


def test_training_scenes_look_like_large_ones_at_level_one():
    """Both show objects as large there, and ask about one object each."""
    assert levels((3 * SIDE, 3 * SIDE), 128)[1].size[0] == SIDE
    scene, questions = _scene(2**40 + 1)
    assert Held(scene.image).size == (SIDE, SIDE)
    assert len(questions) == SLOTS
    assert all(q.kind in KINDS and q.boxes for q in questions)


def test_two_steps_write_a_model_and_a_module(tmp_path):
    train(tmp_path, steps=2, seed=0, batch=1)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [0, 1]
    model = type(tiny.load()[0]).from_pretrained(tmp_path / "model")
    trained = large.RegionFocus.load(tmp_path / "focus", model)
    fresh = large.RegionFocus.of(tiny.load()[0], LAYERS)
    moved = [
        not torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True)
    ]
    assert any(moved)
    reader = large.Reader(model, tiny.load()[1], tmp_path / "focus")
    assert reader.read(tiny.draw_scene(1, size=256).image, "<image> what number is red ?").tiles > 1
