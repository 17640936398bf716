"""Starting the demo: options, ports, missing packages, and the script in demos/."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokred.cli import main
from tokred.core.errors import InvalidParameterError
from tokred.demo.server import PORTS, DemoOptions, free_port


@pytest.fixture
def taken():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_port_in_use_is_refused_before_anything_is_loaded(taken, capsys):
    pytest.importorskip("gradio")
    assert main(["demo", "--port", str(taken)]) == 2
    said = capsys.readouterr()
    assert f"--port {taken} is in use: stop what listens there, give another --port, or leave it out" in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_a_free_port_is_found(taken, monkeypatch):
    monkeypatch.setattr("tokred.demo.server.PORTS", range(taken, taken + 20))
    assert free_port("127.0.0.1", None) in range(taken + 1, taken + 20)
    monkeypatch.setattr("tokred.demo.server.PORTS", range(taken, taken + 1))
    with pytest.raises(InvalidParameterError, match=f"all ports from {taken} to {taken} are in use"):
        free_port("127.0.0.1", None)
    assert PORTS[0] == 7860


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 0}, "--port 0: expected 1 to 65535"),
        ({"port": 70000}, "--port 70000: expected 1 to 65535"),
        ({"threads": 0}, "--threads 0: expected at least 1"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(InvalidParameterError, match=said):
        DemoOptions(**options)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(InvalidParameterError, match=r"--host 192\.0\.2\.1 is no address of this machine"):
        free_port("192.0.2.1", 7860)


def test_one_line_says_what_is_wrong(capsys):
    pytest.importorskip("gradio")
    assert main(["demo", "--device", "abacus"]) == 2
    error = capsys.readouterr().err
    assert "--device abacus" in error
    assert len(error.strip().splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert main(["demo"]) == 2
    assert 'tokred demo needs gradio; run: pip install "tokred[demo]"' in capsys.readouterr().err


def test_the_script_in_demos_is_the_command():
    done = subprocess.run(
        [sys.executable, str(Path(ROOT) / "demos" / "app.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: tokred demo" in done.stdout
