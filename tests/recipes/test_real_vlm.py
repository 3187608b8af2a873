"""Packed ChatML is the model's own forward, and training aligns, stops, goes on and merges."""

import importlib
import itertools
import json
from random import Random
from types import SimpleNamespace

import pytest
import torch

from foveate import tiny
from foveate.errors import InputError
from foveate.loading import load_model
from foveate.tiny import draw_scene
from recipes import real_adapter, real_cache, real_packed, real_vlm
from tests import chatml
from tests.test_benchmarks import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small untrained VLM of 14 x 14 patches, which is what scenes are labelled for."""
    place = tmp_path_factory.mktemp("parts")
    words = chatml.tokenizer()
    chatml.tower(14).save_pretrained(place / "tower")
    chatml.language(len(words)).save_pretrained(place / "language")
    words.save_pretrained(place / "language")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        importlib.import_module("_assemble").write(
            place / "tower", place / "language", place / "vlm"
        )
    return place / "vlm"


@pytest.fixture(scope="module")
def part(folder):
    """A small chunk, of scenes alone."""
    model, processor = load_model(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_cache, "SCENES", 6)
        return real_cache.encode(0, model, processor, None)


def prompt(processor, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


@torch.no_grad()
def test_the_packed_loss_is_that_of_each_question_alone(folder):
    model, processor = load_model(str(folder))
    scenes = [draw_scene(seed) for seed in (3, 4)]
    asked = [
        [(q.text, q.answer, q.kind) for q in s.questions[: 4 + n]] for n, s in enumerate(scenes)
    ]
    pixels = processor.image_processor([s.image for s in scenes], return_tensors="pt")
    visual = torch.stack(list(model.model.get_image_features(**pixels).pooler_output))
    head = model.lm_head.weight
    batch = real_packed.pack(processor.tokenizer, asked, 196, model.config.image_token_id)
    loss, right = real_packed.answer_loss(model.model.language_model, head, visual, batch)
    terms, weights, hits = [], [], []
    for scene, questions in zip(scenes, asked, strict=True):
        for question, answer, _ in questions:
            inputs = processor(
                images=scene.image, text=f"{prompt(processor, question)}{answer}<|im_end|>",
                return_tensors="pt",
            )  # fmt: skip
            said = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
            logits = model(**inputs).logits[0, -2 - len(said) : -1]
            targets = torch.tensor([*said, 2])
            terms.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            weights.append(torch.tensor([1.0] * len(said) + [real_packed.END]))
            hits += (logits.argmax(-1) == targets)[:-1].tolist()
    alone = (torch.cat(terms) * torch.cat(weights)).sum() / torch.cat(weights).sum()
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-5)
    assert right == pytest.approx(sum(hits) / len(hits))


def test_patches_are_labelled_with_what_they_show():
    scene = draw_scene(5, size=96, objects=(3, 3))
    colours, kinds = real_cache.patches(scene, 14)
    names = list(real_cache.COLOURS)
    seen = {(names[c], real_cache.KINDS[k]) for c, k in zip(colours, kinds, strict=True) if c >= 0}
    assert seen == {(o.colour, o.kind) for o in scene.objects}
    for o in scene.objects:
        column, row = (int(v * 14 / 96) for v in o.centre)
        cells = colours.reshape(14, 14)[row - 1 : row + 2, column - 1 : column + 2]
        assert names.index(o.colour) in cells
    assert (colours == -1).sum() > 98


def test_a_chunk_is_encoded_once_and_holds_what_llava_reads(folder, part, tmp_path, monkeypatch):
    monkeypatch.setattr(real_cache, "SCENES", 6)
    model, processor = load_model(str(folder))
    again = real_cache.chunk(tmp_path / "cache", 0, model, processor, None)
    kept = real_cache.chunk(tmp_path / "cache", 0, None, None, None)
    assert torch.equal(again.features, part.features)
    assert torch.equal(kept.features, part.features)
    assert kept.asked == part.asked
    scene = real_cache.draw(real_cache.TRAIN_SEEDS + 2)
    pixels = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        alone = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(part.features[2].float(), alone[0, 1:], rtol=0.05, atol=0.1)


@pytest.fixture(scope="module")
def trained(folder, part, tmp_path_factory):
    """A run that was stopped and went on: what was trained, the log of each half, the outcome.

    A second passes whenever the time is asked for, so that it is as long everywhere.
    """
    out, ticks, logs = tmp_path_factory.mktemp("run"), itertools.count(), []
    clock = SimpleNamespace(monotonic=lambda: next(ticks), process_time=lambda: 0.0)
    few = {"ALIGN_STEPS": 60, "SLOTS": 5, "RATES": {"projector": 2e-3, "lora": 2e-2}, "time": clock}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in few.items():
            patch.setattr(real_vlm, name, value)
        for minutes in (0.4, 0.8):
            torch.manual_seed(0)
            trainee = real_vlm.Trainee(folder, 4)
            real_vlm.train(trainee, [part], out, minutes)
            text = (out / "log.jsonl").read_text()
            logs.append([json.loads(line) for line in text.splitlines()])
    return trainee, logs, out / "adapter.safetensors"


def test_training_goes_on_where_it_stopped(trained):
    _, (first, both), _ = trained
    assert both[: len(first)] == first
    assert [row["aligned"] for row in both if "aligned" in row] == [20, 40, 60]
    aligned = [row["loss"] for row in first if "aligned" in row]
    assert aligned[2] < 0.8 * aligned[0]
    steps = [row["step"] for row in both if "step" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert sum("step" in row for row in first) < len(steps)


@torch.no_grad()
def test_the_merged_model_is_the_trained_one(trained, folder, part):
    trainee, _, adapter = trained
    merged, _ = load_model(str(folder))
    words = merged.lm_head.weight.clone()
    real_adapter.merge(merged, adapter)
    assert torch.equal(merged.lm_head.weight, words)
    features = part.features[:1].float()
    visual = trainee.project(features)
    plain = merged.model.multi_modal_projector(features)
    torch.testing.assert_close(plain, visual, rtol=0.1, atol=0.05 * float(visual.std()))
    asked = [real_vlm.choose(part.asked[0], Random(0))]
    batch = real_packed.pack(trainee.tokenizer, asked, 196, trainee.image)
    untrained, _ = load_model(str(folder))
    texts = (trainee.text.float(), merged.model.language_model, untrained.model.language_model)
    losses = [
        float(real_packed.answer_loss(text, trainee.head.float(), visual, batch)[0])
        for text in texts
    ]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[0] < 0.9 * losses[2]


@torch.no_grad()
def test_a_later_run_goes_on_from_an_adapter(trained, folder, part):
    trainee, (_, both), adapter = trained
    later = real_vlm.Trainee(folder, 4)
    later.standardise(part.features[1:])  # other images
    assert real_adapter.read(later, adapter) == both[-1]["step"]
    features = part.features[:1]
    wanted = trainee.project(features)
    got = later.project(features)
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.05 * float(wanted.std()))
    for name, parameter in later.lora.items():
        torch.testing.assert_close(parameter, trainee.lora[name], rtol=0.01, atol=1e-6)


def test_a_later_run_counts_what_its_adapter_took(trained, tmp_path):
    trainee, (_, both), _ = trained
    start = tmp_path / "start.safetensors"
    real_adapter.write(trainee, start, steps=both[-1]["step"], cpu_s=70)
    course = real_vlm.Course(trainee, tmp_path)
    course.follow(start)
    assert (course.step, course.cpu >= 70, course.seconds < 60) == (both[-1]["step"], True, True)
    course.lines.close()


def test_a_folder_can_be_written_with_an_adapter(trained, folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    write = importlib.import_module("_assemble").write
    write(folder.parent / "tower", folder.parent / "language", tmp_path, trained[2])
    written, _ = load_model(str(tmp_path))
    merged, _ = load_model(str(folder))
    real_adapter.merge(merged, trained[2])
    for name, parameter in written.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name)), name


def test_an_adapter_of_another_model_is_refused(trained):
    other, _ = tiny.load()
    with pytest.raises(InputError, match="was learnt by another model"):
        real_adapter.merge(other, trained[2])
