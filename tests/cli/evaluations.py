"""What the tests of `tokred eval` share: a kill in the middle, and several processes."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from tokred import cli

#: forks of a process that has no threads, and none of what earlier tests left behind; it imports the libraries once
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torchvision", "timm", "transformers", "accelerate", "tokred.cli"])


def lines(out: Path) -> int:
    """Records there are."""
    return sum(path.read_bytes().count(b"\n") for path in (out / "records").glob("*.jsonl"))


def kill_midway(argv: list[str], out: Path, slowed: str, least: int) -> int:
    """Run a command in a process of its own and kill it when it has written `least` records; how many there are.

    `slowed`: "module:function" that takes a tenth of a second longer there, as it does on larger models.
    """
    child = PROCESSES.Process(target=_slowly, args=(argv, slowed))
    child.start()
    deadline = time.monotonic() + 240
    while child.is_alive() and time.monotonic() < deadline and lines(out) < least:
        time.sleep(0.005)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    return lines(out)


def _slowly(argv: list[str], slowed: str) -> None:
    name, _, function = slowed.partition(":")
    module = importlib.import_module(name)
    real = getattr(module, function)

    def later(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return real(*args, **kwargs)

    setattr(module, function, later)
    cli.main(argv)


def two_processes(argv: list[str], tmp: Path) -> dict[str, Any]:
    """What a command prints with --json in two processes that know of each other as a launcher lets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [PROCESSES.Process(target=_ranked, args=(argv, rank, port, tmp)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        if child.is_alive():
            child.kill()
    said = [(tmp / f"said.{rank}").read_text() for rank in range(2)]
    assert [child.exitcode for child in children] == [0, 0], said
    assert said[1] == ""  # one prints
    return json.loads(said[0])


def _ranked(argv: list[str], rank: int, port: int, tmp: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    with (tmp / f"said.{rank}").open("w") as file, contextlib.redirect_stdout(file):
        code = cli.main([*argv, "--json"])
    raise SystemExit(code)
