"""`foveate serve` teaches, and refuses to start in one line."""

import socket

import pytest

from foveate.cli import serve
from tests.cli.calling import call


@pytest.fixture(autouse=True)
def never_served(monkeypatch):
    """Nothing here may come so far."""
    import foveate.serve.server as server

    monkeypatch.setattr(server, "run", lambda *_: pytest.fail("it serves"))


def told(*arguments):
    """The one error line of a command that is refused."""
    found = call("serve", *arguments)
    assert found.exit_code == 2, found.exception
    (line,) = [x for x in found.stderr.splitlines() if x.startswith("error: ")]
    return line


def test_help_has_examples_and_limits():
    shown = call("serve", "--help").output
    assert "foveate serve tiny --method pyramiddrop --keep 0.25" in shown
    for option in ("--api-key", "--max-batch", "--max-queue", "--deadline", "--allow-host"):
        assert option in shown


def test_missing_packages_are_named(monkeypatch):
    there = serve.find_spec
    gone = ("fastapi", "uvicorn")
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in gone else there(name))
    assert "needs fastapi, uvicorn: pip install 'foveate[serve]'" in told("tiny")


def test_a_taken_port_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1 port {port}" in told("tiny", "--port", port)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["tiny", "-m", "fastw"], "unknown method 'fastw'; did you mean fastv"),
        (["tiny", "-m", "fastv", "--keep", "1.5"], "keep must be in (0, 1]"),
        (["tiny", "-m", "fastv", "--set", "layer=99"], "layer"),
        (["tiny", "--keep", "0.5"], "need a --method"),
        (["no/such-folder/at-all"], "no/such-folder/at-all"),
        (["tiny", "--adaptive", "none.json"], "none.json cannot be read"),
        (["tiny", "--adaptive", "none.json", "-m", "fastv"], "leave --method out"),
        (["tiny", "--host", "no host"], "cannot listen at no host"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_told_before_it_serves(options, words):
    assert words in told(*options, *(() if "--host" in options else ("--port", "0")))


def test_a_key_of_the_environment_is_kept_off_the_output(monkeypatch):
    import foveate.serve.server as server

    seen = []
    monkeypatch.setenv("FOVEATE_API_KEY", "hush")
    monkeypatch.setattr(server, "run", lambda app, *_: seen.append(app.state.service))
    found = call("serve", "tiny", "-m", "fastv", "--port", "0", "--max-body", "0.5")
    assert found.exit_code == 0, found.exception
    (service,) = seen
    service.engine.close()
    assert service.settings.api_key == "hush"
    assert service.settings.max_body == 500_000
    assert "serving tiny with fastv at http://127.0.0.1:" in found.output
    assert "hush" not in found.output + repr(service.settings)
