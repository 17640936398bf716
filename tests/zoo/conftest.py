"""What the tests of bundled models share."""

from __future__ import annotations

import socket
from typing import Any

import pytest


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a local socket may be opened."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a bundled model must not open a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
