"""`foveate cite` prints what methods say of their papers; `foveate env` what is installed."""

import re

import pytest
import transformers

import foveate
from foveate.cli.citing import bibtex, entries
from foveate.core.catalog import Entry, catalog
from tests.cli.calling import call

PAPERS = [entry for entry in catalog() if "arXiv" in entry.paper]


@pytest.mark.parametrize("entry", PAPERS, ids=lambda entry: entry.slug)
def test_every_paper_has_a_whole_entry(entry):
    text = bibtex(entry)
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", text, re.MULTILINE))
    assert text.startswith(f"@misc{{{entry.slug},")
    assert set(fields) - {"author"} == {"title", "year", "eprint", "archivePrefix", "url"}
    assert fields["title"].startswith("{") == fields["title"].endswith("}")
    assert re.fullmatch(r"\d{4}", fields["year"])
    assert fields["eprint"] in entry.paper
    assert text.count("{") == text.count("}")


def test_entries_of_one_paper_come_once():
    assert len(entries(["holitom", "holitom-inner", "fastv"])) == 2
    printed = call("cite", "divprune+fastv").stdout
    assert printed.count("@misc{") == 2
    assert "author = {Chen and others}" in printed


def test_authors_that_are_not_known_are_left_out():
    entry = Entry("x", "llm", (), "X 2025, arXiv:2501.00001", title="X")
    assert "author" not in bibtex(entry)
    organisation = Entry("x", "llm", (), "NVIDIA 2025, arXiv:2501.00001", title="100% & more")
    assert "author = {{NVIDIA}}" in bibtex(organisation)
    assert r"{100\% \& more}" in bibtex(organisation)


@pytest.mark.parametrize(
    ("name", "words"),
    [("fastvee", "did you mean fastv"), ("random", "random has no paper to cite")],
)
def test_what_cannot_be_cited_is_an_error(name, words):
    found = call("cite", name)
    assert found.exit_code == 2
    assert words in found.stderr


def test_foveate_itself_is_cited_without_a_name():
    assert f"version = {{{foveate.__version__}}}" in call("cite").stdout


def test_env_names_versions_and_device():
    printed = call("env").stdout
    for words in ("system:", "python:", transformers.__version__, "device:"):
        assert words in printed


def test_version_is_that_of_the_library():
    assert call("--version").stdout == f"foveate {foveate.__version__}\n"
    assert set(dir(foveate)) == {*foveate.__all__, "__version__"}
    assert foveate.engine is not None  # modules are still there


@pytest.mark.parametrize("command", [[], ["run"], ["bench"], ["cite"]])
def test_h_is_help(command):
    assert call(*command, "-h").stdout == call(*command, "--help").stdout != ""
