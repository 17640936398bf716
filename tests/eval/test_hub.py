"""The hub is given up at once where nothing answers, and asked again as soon as nobody minds."""

from __future__ import annotations

import socket
import threading

import pytest

from tokred.eval import hub

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def nobody(monkeypatch):
    """A hub at which nothing listens."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)


def test_nobody_answers(nobody, tmp_path):
    assert not hub.reachable()
    with hub.impatient("a/model"):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with hub.impatient(str(tmp_path)):  # a folder: the hub does not matter
        assert not constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), hub.impatient("a/model"):
        raise KeyError
    assert not constants.HF_HUB_OFFLINE


def test_somebody_answers(nobody, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert hub.reachable()
        with hub.impatient("a/model"):
            assert not constants.HF_HUB_OFFLINE


def test_a_proxy_or_a_wish_to_stay_offline_is_left_alone(nobody, monkeypatch):
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    assert hub.reachable()
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.reachable()
    with hub.impatient("a/model"):
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE


def test_two_loads_that_overlap(nobody):
    """The second one begins and ends later: the hub must not stay off."""
    steps = [threading.Event() for _ in range(2)]
    seen = []

    def first() -> None:
        with hub.impatient("a/model"):
            steps[0].set()
            steps[1].wait(10)

    def second() -> None:
        steps[0].wait(10)
        with hub.impatient("another/model"):
            steps[1].set()
            one.join(10)
            seen.append(constants.HF_HUB_OFFLINE)

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    two.start()
    two.join(20)
    assert seen == [True]
    assert not constants.HF_HUB_OFFLINE
