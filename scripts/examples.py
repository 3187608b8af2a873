"""Run the notebooks of examples/, and write what they print: `python scripts/examples.py --write`.

Without `--write`, fails where a notebook prints something else than it holds. A notebook runs in a
process of its own, in an empty folder, with no kernel: its last expressions and `display` are
noted as a notebook shows them. Outputs of cells tagged `varies` are not compared.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
Output = dict[str, Any]


def execute(notebook: dict[str, Any]) -> list[list[Output]]:
    """What each code cell shows, as the notebook's format has it."""
    shown: list[Output] = []
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda v: shown.append(_show(v))}
    found = []
    for number, cell in enumerate(code_cells(notebook), 1):
        shown.clear()
        printed = io.StringIO()
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
            value = None
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        if value is not None:
            shown.append(_show(value) | {"output_type": "execute_result"})
        text = printed.getvalue()
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}
        found.append(([stream] if text else []) + list(shown))
    return found


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that run, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _show(value: Any) -> Output:
    """A value as a notebook displays it: a picture, or its text."""
    from PIL import Image

    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.convert("RGB").save(file, "JPEG", quality=85)
        data: dict[str, Any] = {"image/jpeg": base64.b64encode(file.getvalue()).decode()}
    else:
        data = {"text/plain": repr(value).splitlines(True)}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def run(path: Path) -> list[list[Output]]:
    """Execute a notebook in a fresh process, without a network.

    Raises:
        RuntimeError: a cell fails; the message is its traceback.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / ".outputs.json"
        command = [sys.executable, __file__, str(path.resolve()), "--into", str(out)]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{path.name} fails:\n{done.stderr[-3000:]}")
        found: list[list[Output]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def differences(notebook: dict[str, Any], outputs: list[list[Output]]) -> list[str]:
    """Cells that show something else than the notebook holds; of pictures only their number."""
    said = []
    for number, (cell, new) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        if "varies" not in cell["metadata"].get("tags", []) and _texts(cell["outputs"]) != _texts(
            new
        ):
            said.append(f"cell {number}: holds {_texts(cell['outputs'])}, shows {_texts(new)}")
    return said


def _texts(outputs: list[Output]) -> list[str]:
    """What outputs say; a picture says that it is one."""
    return [
        "".join(o["text"] if "text" in o else o["data"].get("text/plain", "<picture>"))
        for o in outputs
    ]


def write(path: Path, notebook: dict[str, Any], outputs: list[list[Output]]) -> None:
    """Put outputs into a notebook's file."""
    for number, (cell, new) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell["execution_count"] = number
        cell["outputs"] = [
            o | {"execution_count": number} if o["output_type"] == "execute_result" else o
            for o in new
        ]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run notebooks, and compare or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of examples/ by default")
    parser.add_argument("--write", action="store_true", help="put outputs into the files")
    parser.add_argument("--into", type=Path, help="execute one here, and write outputs there")
    given = parser.parse_args()
    said = []
    for path in given.notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if given.into:
            given.into.write_text(json.dumps(execute(notebook)), encoding="utf-8")
            return
        outputs = run(path)
        if given.write:
            write(path, notebook, outputs)
        else:
            said += [f"{path.name}, {line}" for line in differences(notebook, outputs)]
    if said:
        sys.exit("\n".join([*said, "run python scripts/examples.py --write"]))


if __name__ == "__main__":
    main()
