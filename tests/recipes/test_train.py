"""The packed forward pass is the model's own, and training runs, stops and goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)

from foveate.tiny import draw_scene
from foveate.tiny.build import EARLY, PAD, build_config, build_model, build_processor
from foveate.tiny.words import KINDS, VOCABULARY
from recipes import losses, packed
from recipes.data import IGNORE, MULTI, SINGLE, make_batch, normalise, photo_paths
from recipes.train import Settings, Trainer, train


def _awake(layers: int) -> LlavaForConditionalGeneration:
    """A random model whose early layers do something, as they do once they are trained."""
    torch.manual_seed(0)
    model = build_model(build_config(layers=layers)).eval()
    for layer in model.model.language_model.layers[:EARLY]:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.05)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.05)
    return model


@torch.no_grad()
@pytest.mark.parametrize("packing", [SINGLE, MULTI], ids=["single", "multi"])
def test_packed_pass_equals_the_model(packing) -> None:
    model = _awake(4)
    batch = make_batch(range(2), packing, [], 0.0)
    seen = losses.look(model, batch)
    logits = losses.answer_logits(model, seen, batch)[0].unflatten(1, batch.words.shape[1:])
    prompt = torch.tensor([[1] + [4] * 256])
    for row in range(2):
        for slot in (0, packing.slots - 1):
            words = batch.words[row, slot]
            ids = torch.cat([prompt[0], words])[None]
            want = model(input_ids=ids, pixel_values=normalise(batch.pixels[row : row + 1])).logits
            torch.testing.assert_close(logits[row, slot], want[0, 257:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_early_layers_can_be_skipped_until_they_are_trained() -> None:
    torch.manual_seed(0)
    model = build_model(build_config(layers=4)).eval()
    batch = make_batch(range(1), SINGLE, [], 0.0)
    seen = losses.look(model, batch)
    whole, look = losses.answer_logits(model, seen, batch)
    skipped, nothing = losses.answer_logits(model, seen, batch, skip=EARLY)
    torch.testing.assert_close(whole, skipped)
    assert nothing == 0 < look < 1


@torch.no_grad()
def test_kept_tokens_keep_their_positions() -> None:
    """A reduced set equals the model run on the kept tokens with their true positions."""
    model = _awake(3)
    batch = make_batch(range(1), SINGLE, [], 0.0)
    seen = losses.look(model, batch)
    index = torch.arange(0, 256, 5)[None]
    logits, _ = packed.read(model, seen.visual[:, index[0]], index + 1, batch.words[:, :1], 257)
    embed = model.get_input_embeddings()
    states = torch.cat(
        [embed(torch.tensor([[1]])), seen.visual[:, index[0]], embed(batch.words[:, 0])], 1
    )
    places = torch.cat([torch.tensor([[0]]), index + 1, torch.arange(257, 268)[None]], 1)
    text = model.model.language_model
    want = model.lm_head(text(inputs_embeds=states, position_ids=places).last_hidden_state)
    torch.testing.assert_close(logits, want[:, -11:], rtol=1e-4, atol=1e-5)


def test_training_pixels_equal_the_processors() -> None:
    scene = draw_scene(0)
    inputs = build_processor()(images=scene.image, text="<image> ?", return_tensors="pt")
    ours = normalise(torch.from_numpy(np.array(scene.image))[None])
    torch.testing.assert_close(inputs["pixel_values"], ours)


def test_training_words_equal_the_tokenizers() -> None:
    tokenizer = build_processor().tokenizer
    for q in draw_scene(0).questions:
        ids = tokenizer(f"{q.text} {q.answer}", add_special_tokens=False)["input_ids"]
        assert [VOCABULARY[i] for i in ids] == [*q.text.split(), q.answer]


def test_patches_are_labelled_with_what_they_show() -> None:
    batch, scene = make_batch(range(5, 6), SINGLE, [], 0.0), draw_scene(5)
    for patch in range(256):
        top, left = 8 * (patch // 16), 8 * (patch % 16)
        window = scene.owner[top : top + 8, left : left + 8]
        owners = window[window >= 0]
        assert batch.ink[0, patch] == len(owners)
        if len(owners) == 0:
            assert batch.kinds[0, patch] == -1
        elif batch.kinds[0, patch] != IGNORE:
            assert KINDS[batch.kinds[0, patch]] in {scene.objects[o].kind for o in owners}


def test_every_answer_is_labelled_once_and_followed_by_the_end() -> None:
    for packing in (SINGLE, MULTI):
        batch = make_batch(range(3), packing, [], 0.0)
        asked = batch.groups >= 0
        assert (batch.labels[asked] > 4).all()
        assert (batch.labels != IGNORE).sum() == 2 * asked.sum()
        assert (batch.words[:, :, 0] != PAD).all()


def test_the_curriculum_keeps_everything_that_shows_an_object() -> None:
    batch = make_batch(range(4), SINGLE, [], 0.0)
    index = losses.choose(batch, 112)
    assert (index.diff(dim=1) > 0).all()
    kept = torch.zeros_like(batch.ink, dtype=torch.bool).scatter(1, index, True)
    assert not ((batch.ink > 0) & ~kept).any()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (60, 50), (20 * i, 90, 10)).save(folder / f"{i:02}.jpg")
    return folder


def test_photos_are_split_without_overlap(photos: Path) -> None:
    training, held_out = (photo_paths(photos, held_out=part) for part in (False, True))
    assert len(training) == 2
    assert len(held_out) == 10
    assert not set(training) & set(held_out)
    assert photo_paths(None, held_out=False) == []


def test_training_runs_through_all_phases_and_resumes(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.train._CHECK_SCENES", 12)
    out = tmp_path / "run"
    train(Settings(out, photos, minutes=600, steps=4, seed=0, batch=2))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4
    assert 0 <= log[-1]["all"] <= 1
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    assert model.dtype == torch.float16
    assert AutoProcessor.from_pretrained(out / "model").patch_size == 8

    again = Trainer(Settings(out, photos, minutes=600, steps=5, seed=9, batch=2))
    assert again.step == 4
    assert again.images == 8
    assert again.done() == 0.8
