"""Write what docs say of methods and signals: `python scripts/methods_page.py [--check]`."""

import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path

import foveate
from foveate.core import Method
from foveate.signals import SIGNALS

DOCS = Path(__file__).parent.parent / "docs"
TABLE = re.compile(r"(?<=\| signal \| taken \| \|\n\|---\|---\|---\|\n)(\|.*\n)*")
TAKEN = {
    "input": "before the encoder",
    "encoder": "at encoder layers",
    "prompt": "before the language model",
    "decoder": "at decoder layers",
}
STAGES = {
    "vision": "Inside the encoder",
    "pre_llm": "Before the language model",
    "llm": "Between decoder layers",
}
HEAD = """# Methods

Made from the classes by `scripts/methods_page.py`. Budgets and ranking are per image. *Layer k*
means before layer k runs, counted from 0. `keep` is a fraction, a count, a schedule over the steps,
or `foveate.per_request([...])`. [support.md](support.md) shows which method works on which model,
[benchmarks.md](benchmarks.md) what selection costs, [gallery.md](gallery.md) what each keeps of one
picture, and [add-a-method.md](add-a-method.md) how to add a method. Signals are computed only for
the rows that a method needs, and no method needs eager attention.

Methods inside the encoder also work on encoders alone, with or without heads for classification,
segmentation, detection, poses or depth, and in pipelines; their output is restored to full length
([dense.md](dense.md)). `dtop`, `stvit` and `hot` work on encoders alone.
"""


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a docstring, each one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(text))]


def fields_of(cls: type[Method]) -> dict[str, str]:
    """Field -> what its docstrings say, the class's own first."""
    found: dict[str, str] = {}
    for kind in cls.__mro__:
        lines = inspect.cleandoc(vars(kind).get("__doc__") or "").splitlines()
        if "Args:" not in lines:
            continue
        block = []
        for line in lines[lines.index("Args:") + 1 :]:
            if line and not line.startswith(" "):
                break
            block.append(line)
        for entry in re.split(r"\n(?=\w+: )", textwrap.dedent("\n".join(block)).strip()):
            name, _, text = entry.partition(": ")
            found.setdefault(name.strip(), " ".join(text.split()))
    return found


def linked(text: str) -> str:
    """The text with links for arXiv numbers."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def told(slug: str) -> tuple[str, list[str]]:
    """What a method does, and the other paragraphs of its file's docstring."""
    module = inspect.getmodule(foveate.get_method(slug))
    intro, *about = paragraphs((module and module.__doc__) or "")
    what = intro.partition(": ")[2] or intro
    return what[:1].upper() + what[1:], about


def overview(names: list[str]) -> str:
    """A table of methods: what each does, and its paper."""
    rows = ["| method | what it does | paper |", "|---|---|---|"]
    for name in names:
        number = re.search(r"arXiv:\d{4}\.\d{5}", foveate.get_method(name).paper)
        paper = linked(number[0]) if number else "baseline"
        rows.append(f"| [`{name}`](#{name}) | {told(name)[0]} | {paper} |")
    return "\n".join(rows)


def section(slug: str) -> str:
    """What the page says of a method."""
    cls = foveate.get_method(slug)
    what, about = told(slug)
    summary, *rest = paragraphs(cls.__doc__ or "")
    said = fields_of(cls)
    out = [f"### `{slug}`", what, summary]
    out += [linked(part) for part in about]
    out += [part for part in rest if not part.startswith(("Args:", "Raises:", "Examples:"))]
    if cls.note:
        out.append(f"Every report notes: {cls.note}")
    rows = ["| field | default | |", "|---|---|---|"]
    for item in dataclasses.fields(cls):
        default = item.default
        shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
        rows.append(
            f"| `{item.name}` | {shown} | {said.get(item.name, '').replace('|', chr(92) + '|')} |"
        )
    out.append("\n".join(rows))
    if cls.needs:
        out.append(
            "Signals:\n\n"
            + "\n".join(f"- `{n}`: {SIGNALS[n].doc}" for n in dict.fromkeys(cls.needs))
        )
    return "\n\n".join(out)


def page() -> str:
    """The whole page."""
    parts = [HEAD.strip()]
    for stage, title in STAGES.items():
        names = [n for n in foveate.list_methods() if foveate.get_method(n).stage == stage]
        parts.append(f"## {title}\n\n{overview(names)}")
        parts += [section(name) for name in names]
    return "\n\n".join(parts) + "\n"


def guide() -> str:
    """The guide for authors, with the signals that there are."""
    rows = [f"| `{n}` | {TAKEN[s.source]} | {s.doc} |\n" for n, s in SIGNALS.items()]
    text = (DOCS / "add-a-method.md").read_text(encoding="utf-8")
    return TABLE.sub(lambda _: "".join(rows), text, count=1)


def main() -> None:
    """Write the pages, or with `--check` fail if one is out of date."""
    for name, text in (("methods.md", page()), ("add-a-method.md", guide())):
        path = DOCS / name
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} is out of date: run python scripts/methods_page.py")


if __name__ == "__main__":
    main()
