"""A data set's words are added to the tiny model's, and its answers end."""

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from foveate.bench.data import Row
from foveate.tiny import PATH
from foveate.tiny.build import EOS, build_config, build_model, build_tokenizer
from recipes.easy_vqa import _SLOTS, answer_loss, batch, vocabulary
from recipes.sequences import adopt, vocabulary_of
from recipes.train import export


def test_a_few_steps_teach_an_answer_and_its_end(tmp_path) -> None:
    rows = (Row("does it contain a shape?", "teal", "0.png"),)
    words = vocabulary(PATH, rows)
    assert words[: len(vocabulary_of(PATH))] == vocabulary_of(PATH)
    assert {"does", "contain", "teal"} <= set(words)
    torch.manual_seed(0)
    model = build_model(build_config(words=len(words)))
    adopt(model, PATH, words)
    picture = Image.new("RGB", (64, 64), (200, 10, 10))
    parts = batch(build_tokenizer(words), [(picture, list(rows) * _SLOTS)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(12):
        answer_loss(model, parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    export(model, tmp_path, words)
    trained = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    text = "<image> does it contain a shape?"
    inputs = processor(images=picture, text=text, return_tensors="pt")
    said = trained.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert said.tolist() == [words.index("teal"), EOS]
