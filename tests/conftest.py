"""Options, seeds and guards of every test.

`--golden-dir DIR` (repeatable) names the folders that the parity tests read; `--all` runs the full matrix. Test modules
ask with the functions below, at collection or through the fixtures of the same names:

    from tests.conftest import golden_dirs

    def pytest_generate_tests(metafunc):
        folders = golden_dirs(metafunc.config)
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

# Before any library reads them: one thread (two torch threads on shared cores slow each other up to ten times), no hub
# and no telemetry, pictures without a screen.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)

# No deadline: shared cores pause for longer than any sensible one. Derandomised: a run says the same thing twice; look
# for new counter-examples with `--hypothesis-profile=search`.
settings.register_profile("tokred", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("tokred")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tokred")
    group.addoption(
        "--golden-dir",
        action="append",
        metavar="DIR",
        help="read goldens from DIR (one folder a method, each with a manifest.json); may be repeated. "
        "Default: tests/golden, and ../shared/golden where it exists",
    )
    group.addoption("--all", action="store_true", help="run the full matrix of hosts and methods, not a sample of it")


def pytest_configure(config: pytest.Config) -> None:
    golden_dirs(config)  # a wrong --golden-dir is a usage error, said before anything is collected


def golden_dirs(config: pytest.Config) -> list[Path]:
    """Folders laid out as `<method>/manifest.json`: those given with --golden-dir, else the existing default ones."""
    given = config.getoption("--golden-dir")
    if given is None:
        return [folder for folder in (ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden") if folder.is_dir()]
    folders = [(config.invocation_params.dir / folder).resolve() for folder in given]
    for folder in folders:
        if not folder.is_dir():
            raise pytest.UsageError(f"--golden-dir: {folder} is not a folder")
    return folders


def full_matrix(config: pytest.Config) -> bool:
    """Whether --all was given: run every pair of host and method."""
    return bool(config.getoption("--all"))


@pytest.fixture(scope="session", name="golden_dirs")
def _golden_dirs(pytestconfig: pytest.Config) -> list[Path]:
    return golden_dirs(pytestconfig)


@pytest.fixture(scope="session", name="full_matrix")
def _full_matrix(pytestconfig: pytest.Config) -> bool:
    return full_matrix(pytestconfig)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not full_matrix(config):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class NetworkBlocked(ConnectionError):
    """A test asked for a connection that leaves this machine."""


_blocked: list[str] = []


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(host: object) -> None:
    _blocked.append(str(host))
    raise NetworkBlocked(f"tests do not leave this machine, and this one asked for {host!r}")


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse to look up or to connect to anything but this machine."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(sock: socket.socket, address: tuple) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            _refuse(address[0])

    def guarded_connect(sock, address):
        check(sock, address)
        return connect(sock, address)

    def guarded_connect_ex(sock, address):
        check(sock, address)
        return connect_ex(sock, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        if not _is_local(host):
            _refuse(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def _fail_on_network(_no_network: None) -> Iterator[None]:
    """A library may swallow the refusal and go on without the network: the test fails all the same."""
    _blocked.clear()
    yield
    if _blocked:
        pytest.fail(f"the test asked for a connection to {', '.join(sorted(set(_blocked)))}", pytrace=False)
