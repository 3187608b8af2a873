"""A small untrained model with the packaged processor, images, and files of conversations."""

import json

import pytest
import torch
import yaml

from foveate import tiny
from foveate.tiny.build import build_config, build_model, build_processor


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, processor):
    """A LLaVA of four narrow layers on disk, with its processor."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    build_model(build_config(layers=4, hidden=32, vision=32), idle=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """Eight conversations; every second one is about two images, in LLaVA's style."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for seed in range(8):
        scene = tiny.draw_scene(seed)
        scene.image.save(folder / f"{seed}.png")
        first, second = scene.questions[:2]
        row = {
            "images": [f"{seed}.png"],
            "messages": [
                {"role": "user", "content": f"<image>\n{first.text}"},
                {"role": "assistant", "content": first.answer},
            ],
        }
        if seed % 2:
            row = {
                "images": [f"{seed - 1}.png", f"{seed}.png"],
                "conversations": [
                    {"from": "human", "value": f"<image>\n<image>\n{first.text}"},
                    {"from": "gpt", "value": first.answer},
                    {"from": "human", "value": second.text},
                    {"from": "gpt", "value": second.answer},
                ],
            }
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


@pytest.fixture
def recipe_file(tmp_path, model_folder, data_file):
    """Writes a recipe of two rows per step in reading order; sections given are merged in."""

    def write(name="config.yaml", **sections):
        recipe = {
            "model": str(model_folder),
            "out": str(tmp_path / "out"),
            "data": {"file": str(data_file)},
            "method": {"name": "pyramiddrop"},
            "trainer": {
                "per_device_train_batch_size": 2,
                "max_steps": 3,
                "learning_rate": 0.05,
                "lr_scheduler_type": "constant",
                "optim": "sgd",
                "logging_steps": 1,
                "save_steps": 1,
                "disable_tqdm": True,
                "train_sampling_strategy": "sequential",
            },
        }
        for key, value in sections.items():
            both = isinstance(value, dict) and isinstance(recipe.get(key), dict)
            recipe[key] = {**recipe[key], **value} if both else value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write
