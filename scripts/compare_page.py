"""Write docs/compare.md from scripts/compare.json: `python scripts/compare_page.py [--check]`.

What others do was read in their sources, and stands in the data file with the commit and the lines.
foveate's own column is taken from the package.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _compare_measured import section as measured_section

import foveate
from foveate.core import Method
from foveate.integrations.vllm.architectures import SERVED

ROOT = Path(__file__).parent.parent
DATA = ROOT / "scripts" / "compare.json"
PAGE = ROOT / "docs" / "compare.md"
Fact = tuple[str, str, list[str]]
"""What a table shows, a sentence, and where it was seen."""
RANGE = '  "transformers'
MORE = ("accuracy", "gpu", "text_cache", "bits", "serving", "weights")
"""Questions in which others are ahead, or most of them."""
HEAD = """# Comparison

`scripts/compare_page.py` writes this page from `scripts/compare.json`. Each entry is a fact found
in the project's source, at the commit and lines [listed below](#where-it-was-read). *not found*
means that we looked for it there and did not see it; it does not prove that it does not exist.
We ran none of the other projects except as described under
[a common measurement](#a-common-measurement). foveate's column comes from the package itself.
Projects move on: what you install is newer than these commits.
"""
FIRST = """## Where others do more

foveate's accuracy was measured only on small models, and nothing was measured on a GPU. It leaves
text in the cache, quantises nothing, and offers no trained weights. PixelPrune's own code prunes
before the encoder inside vLLM; foveate's plugin for vLLM runs only methods after the encoder.
"""
VISUAL = """## Visual tokens

kvpress works elsewhere: it shrinks the cache of text and images after a full prefill, whereas the
others shorten the prompt. One does not replace the other.
"""
AUTHORS = """## The authors' own code

The code that papers released. foveate implements each of these methods.
"""
READ = """## Where it was read

Line numbers are those of the commit.
"""


def stages() -> Counter[str]:
    """Methods by stage."""
    return Counter(foveate.get_method(name).stage for name in foveate.list_methods())


def learning() -> list[str]:
    """Methods that train something themselves."""
    return [
        name
        for name in foveate.list_methods()
        if foveate.get_method(name).learned is not Method.learned
    ]


def families() -> tuple[int, int]:
    """Families with a language model, and encoders alone."""
    path = ROOT / "foveate" / "families" / "support.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["random"]
    alone = sum(cell.endswith("an encoder alone") for cell in cells.values())
    return len(foveate.list_families()) - alone, alone


def project(start: str) -> str:
    """What follows in the line of pyproject.toml that begins so, up to its closing quote."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (found,) = re.findall(rf'^{re.escape(start)}([<>=A-Z][^"]+)"', text, re.MULTILINE)
    return str(found)


def measured(name: str) -> bool:
    """Whether benchmarks have a result whose name begins so."""
    return any((ROOT / "benchmarks" / "results").glob(f"{name}*.json"))


def own() -> dict[str, Fact]:
    """What foveate does, in the same questions."""
    return {**own_beside(), **own_tokens(), **own_conduct()}


def own_beside() -> dict[str, Fact]:
    """What foveate does of that in which others are ahead."""
    return {
        "accuracy": (
            "yes" if measured("real") else "no",
            "On embedded models and on pretrained parts, no public checkpoint.",
            ["docs/results.md", "docs/results-real.md"],
        ),
        "gpu": (
            "yes" if measured("gpu") else "no",
            "The script is there.",
            ["benchmarks/gpu.py", "docs/benchmarks.md"],
        ),
        "text_cache": ("no", "Text keeps its place in the cache.", ["docs/how-it-works.md"]),
        "bits": ("no", "Runs on models that others have quantised.", ["docs/combine.md"]),
        "serving": (
            "yes",
            f"A plugin of vLLM for {len(SERVED)} architectures, images and videos, for methods "
            "after the encoder; a server of its own for all methods, in plain transformers.",
            ["foveate/integrations/vllm/architectures.py", "docs/serving.md"],
        ),
        "weights": ("no", "Methods that learn come without weights.", ["docs/training.md"]),
    }


def own_tokens() -> dict[str, Fact]:
    """Which methods and models foveate has, and how visual tokens leave."""
    by_stage, (language, alone) = stages(), families()
    return {
        "methods": (
            str(len(foveate.list_methods())),
            f"{by_stage['vision']} in the encoder, {by_stage['pre_llm']} before the language "
            f"model, {by_stage['llm']} between its layers; baselines are counted.",
            ["docs/methods.md"],
        ),
        "sites": (
            "all three",
            "One method, `pixelprune`, chooses from pixels before the first encoder layer.",
            ["foveate/methods/pixelprune.py", "docs/methods.md"],
        ),
        "families": (
            f"{language} + {alone}",
            f"Model types with a language model, and {alone} encoders alone. Each was tested "
            "on a small random model, not on its checkpoints.",
            ["foveate/families/support.json", "docs/support.md"],
        ),
        "media": ("images and videos", "", ["docs/support.md"]),
        "batch": (
            "yes",
            "A row of a padded batch gets what it gets alone.",
            ["tests/conformance/test_neighbours.py", "docs/reliability.md"],
        ),
        "cache": (
            "yes",
            "Layers after a cut hold fewer slots.",
            ["foveate/engine/cache.py", "docs/how-it-works.md"],
        ),
        "attention": (
            "kept",
            "Only the rows that a method reads are computed; flex attention is refused.",
            ["docs/how-it-works.md", "docs/faq.md"],
        ),
    }


def own_conduct() -> dict[str, Fact]:
    """How foveate trains, refuses, and what it runs on."""
    learn = learning()
    names = ", ".join(f"`{name}`" for name in learn)
    return {
        "training": (
            "yes",
            f"Of the model, with fewer tokens; {len(learn)} methods train something: {names}.",
            ["docs/training.md"],
        ),
        "unsupported": (
            "raises",
            "When attached, with what would work.",
            ["foveate/engine/planning.py", "tests/conformance/test_refusals.py"],
        ),
        "undo": ("yes", "", ["foveate/engine/attachment.py", "tests/engine/test_promises.py"]),
        "tests": (
            "every pair",
            "Each method on each family, small random models on a CPU.",
            ["tests/conformance/test_matrix.py", "tests/engine/test_oracle.py"],
        ),
        "versions": (
            "transformers " + project('  "transformers>').replace("=", "≥ ", 1).replace(",", ", "),
            "",
            ["pyproject.toml"],
        ),
        "licence": (project('license = "'), "", ["LICENSE"]),
    }


def link(entry: dict[str, Any] | None, seen: str) -> str:
    """A place in a source: of another's at its commit, or of this repository."""
    path, _, lines = seen.partition("#")
    if entry is None:
        target = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        return f"[{path}]({target})"
    where = f"https://github.com/{entry['repository']}/blob/{entry['commit']}/{seen}"
    shown = f"{path}:{lines.replace('L', '')}" if lines else path
    return f"[{shown}]({where})"


def anchor(name: str) -> str:
    """The anchor of a project's heading."""
    return name.lower().replace(" ", "-")


def table(data: dict[str, Any], group: str, questions: list[str]) -> str:
    """Short answers of a group, foveate's first."""
    entries = [entry for entry in data["projects"] if entry["group"] == group]
    heads = ["foveate", *(entry["name"] for entry in entries)]
    rows = [
        "| | " + " | ".join(f"[{name}](#{anchor(name)})" for name in heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    columns = [own(), *(entry["facts"] for entry in entries)]
    for question in questions:
        cells = [column[question][0] for column in columns]
        rows.append(f"| {data['questions'][question]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def section(data: dict[str, Any], entry: dict[str, Any] | None) -> str:
    """What was seen of a project, and where; `None` is foveate."""
    facts = own() if entry is None else entry["facts"]
    out = ["### foveate"] if entry is None else [f"### {entry['name']}"]
    if entry is not None:
        home = f"https://github.com/{entry['repository']}"
        commit = f"[`{entry['commit'][:9]}`]({home}/tree/{entry['commit']})"
        out.append(
            f"By {entry['by']}; [{entry['repository']}]({home}) at {commit} of {entry['date']}."
        )
        out += [entry["note"]] if "note" in entry else []
    rows = ["| | | seen in |", "|---|---|---|"]
    for question, title in data["questions"].items():
        if question not in facts:
            continue
        short, text, seen = facts[question]
        said = f"**{short}**. {text}".strip() if text else f"**{short}**"
        rows.append(f"| {title} | {said} | {', '.join(link(entry, one) for one in seen)} |")
    return "\n\n".join([*out, "\n".join(rows)])


def page() -> str:
    """The whole page."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    asked = list(data["questions"])
    forks = [
        one
        for one in asked
        if all(one in entry["facts"] for entry in data["projects"] if entry["group"] == "authors")
    ]
    parts = [
        HEAD,
        FIRST,
        table(data, "systems", list(MORE)),
        VISUAL,
        table(data, "systems", [one for one in asked if one not in MORE]),
        AUTHORS,
        table(data, "authors", forks),
        measured_section(),
        READ,
        section(data, None),
        *(section(data, entry) for entry in data["projects"]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    """Write the page, or with `--check` fail if it is out of date."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is out of date: run python scripts/compare_page.py")


if __name__ == "__main__":
    main()
