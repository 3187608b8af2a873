"""A signal is known where it is defined, and asked for by methods; nobody else matches on names."""

import ast
from pathlib import Path

import foveate
from foveate.signals import SIGNALS

PACKAGE = Path(foveate.__file__).parent
ASKING = {"Need", "signal"}  # calls whose first argument is what a method asks for


def asked_for(tree):
    """String literals with which a signal is asked for: `Need(...)` and `tokens.signal(...)`."""
    return {
        id(call.args[0])
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and call.args
        and getattr(call.func, "attr", getattr(call.func, "id", None)) in ASKING
    }


def named(source):
    """(line, name) of signals that a source names without asking for them."""
    tree = ast.parse(source)
    allowed = asked_for(tree)
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in SIGNALS and id(node) not in allowed
    ]


def test_no_file_but_methods_names_a_signal():
    files = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "methods"
    ]
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in files
        if (names := named(path.read_text(encoding="utf-8")))
    }
    assert len(files) > 100
    assert not found


def test_a_name_that_is_matched_on_is_found():
    assert named("if need.name == 'transition': pass") == [(1, "transition")]
    assert named("KEYS = {'llm_keys', 'other'}") == [(1, "llm_keys")]
    assert not named("Need('llm_keys', (1,)); tokens.signal('llm_keys')")


def test_each_signal_is_defined_once():
    defined = [
        node.name
        for module in ("decoder", "encoder", "prompt")
        for node in ast.parse((PACKAGE / "signals" / f"{module}.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(getattr(d, "func", None) and d.func.id == "define" for d in node.decorator_list)
    ]
    assert sorted(defined) == sorted(SIGNALS)
