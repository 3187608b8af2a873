"""Every method on every family: it keeps all promises, or is refused as documented.

`pytest tests/conformance/test_matrix.py --write-support` writes what was found to the file that
the command line shows, and the page of it in docs.
"""

import json
import string
from importlib import resources
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

import foveate
from foveate.core.catalog import catalog
from foveate.families.support import Matrix, support
from tests.conformance import cells
from tests.conformance.zoo import ABSENT

FILE = resources.files("foveate.families") / "support.json"
PAGE = Path(__file__).parents[2] / "docs" / "support.md"
TOGETHER = 2  # methods that a heading has room for
HEAD = """# Supported models

Written by `pytest tests/conformance/test_matrix.py --write-support`, which runs every method on a
small random model of every family, from pixels where possible: one image, two images, and a padded
batch with rows of two images, no image, and one image. ✓ means that the method keeps all guarantees
there. A number alone means that the method is refused when attached, or when the first image is
encoded; the numbered notes below the table give the reasons. Layers and budgets suit these small
models; `foveate list --model` shows whether the defaults work on yours.

## Versions

Every family is tested with transformers 5.23 and 5.24. Apertus 1.5 came with 5.24. Llama 4 does not
run with 5.24.0, which raises an AttributeError there with or without foveate. Encoders and the
first 27 vision-language models were also tested with older versions, back to 5.20
(`scripts/versions.sh`; Video-LLaVA back to 5.21). On M-RoPE models and Gemma 3, gradient
checkpointing and new images in later turns need 5.23. torch 2.6 or newer is required (tested with
2.13), and Python >= 3.10 (transformers 5.21 and newer need 3.11).

## Methods on models

"""


def page(entries):
    """The matrix as Markdown."""
    order = [entry.slug for entry in catalog()]
    matrix = Matrix.of(entries, order, together=True)
    names, letters = [], iter(string.ascii_uppercase)
    lines = ["A column with a letter is for several methods:", ""]
    for column in matrix.columns:
        methods = [f"`{name}`" for name in column]
        names.append("<br>".join(methods) if len(methods) <= TOGETHER else next(letters))
        if len(methods) > TOGETHER:
            lines.append(f"- **{names[-1]}**: {', '.join(methods)}")
    lines += ["", f"| `model_type` | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for model_type, marks in matrix.rows.items():
        texts = [" ".join(["✓"] * works + [str(note)] * bool(note)) for works, note in marks]
        lines.append(f"| `{model_type}` | {' | '.join(texts)} |")
    notes = [f"{number}. {note}" for number, note in enumerate(matrix.notes, 1)]
    lines += ["", *notes, "", "## Refused families", ""]
    refused = foveate.families.unsupported_families()
    lines += [f"- `{model_type}`: {why}" for model_type, why in refused.items()]
    return HEAD + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def written(request):
    """Where to put entries, or `None` if they are compared; written when all tests have run,
    without cells that nobody ever found out.
    """
    if not request.config.getoption("--write-support"):
        yield None
        return
    assert not hasattr(request.config, "workerinput"), "--write-support needs one process"
    try:
        known = support()
    except FileNotFoundError:
        known = {}
    found = {}
    yield found
    entries = {
        name: {
            model_type: entry
            for model_type in foveate.list_families()
            if (entry := found.get((name, model_type)) or known.get(name, {}).get(model_type))
        }
        for name in foveate.list_methods()
    }
    Path(str(FILE)).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(entries), encoding="utf-8")


@pytest.mark.parametrize("method", foveate.list_methods())
@pytest.mark.parametrize("model_type", foveate.list_families())
def test_cell(model_type, method, written):
    """What becomes of the method is what the matrix says."""
    if model_type in ABSENT:
        pytest.skip("needs a newer transformers: make newest")
    if model_type == "timm_wrapper" and not cells.subjects()[model_type]:
        pytest.skip("needs timm: make timm")
    found = cells.entry(model_type, method)
    if written is None:
        assert found == support()[method][model_type], "run this test with --write-support"
    else:
        written[method, model_type] = found


def test_every_family_is_in_the_zoo():
    assert sorted({*cells.subjects(), *ABSENT}) == foveate.list_families()


def test_only_what_transformers_lacks_is_absent():
    """Modules of the zoo are left out as a whole, so before 5.23 some families that it has."""
    assert not ABSENT & set(CONFIG_MAPPING) or Version(transformers.__version__) < Version("5.23")


def test_the_file_has_every_cell_and_no_other(written):
    if written is None:
        entries = support()
        assert list(entries) == foveate.list_methods()
        assert all(list(of) == foveate.list_families() for of in entries.values())


def test_the_page_is_that_of_the_file(written):
    if written is None:
        assert PAGE.read_text(encoding="utf-8") == page(support()), "run with --write-support"
