"""Drawn scenes as tables of questions, for the embedded model."""

import base64
import io
import json

import pyarrow as pa
import pyarrow.parquet as parquet

from foveate import tiny


def scenes(count, first=40):
    """(scene, question, answer) of drawn scenes."""
    found = [tiny.draw_scene(first + n) for n in range(count)]
    return [(s.image, s.questions[0].text, s.questions[0].answer) for s in found]


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def write_lines(folder, count, name="q.jsonl"):
    """Questions with images in files beside them; returns the file."""
    rows = []
    for number, (image, question, answer) in enumerate(scenes(count)):
        image.save(folder / f"{number}.png")
        rows.append({"id": number, "image": f"{number}.png", "question": question, "want": answer})
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(output):
    """Rows of an output, shard by shard in the order of names."""
    tables = [parquet.read_table(path) for path in sorted(output.rglob("[!.]*.parquet"))]
    return pa.concat_tables([t.replace_schema_metadata(None) for t in tables]).to_pylist()
