"""`tokred demo`: load the bundled models, draw the examples, serve the page until it is interrupted."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokred.core.errors import InvalidParameterError
from tokred.eval.bench import require

__all__ = ["DemoOptions", "Running", "serve", "start"]

PORTS = range(7860, 7960)
LARGEST = 50  # MiB of an upload


@dataclass(frozen=True)
class DemoOptions:
    """How the demo is served.

    Attributes:
        host: address to listen on. port: None is the first free one of `PORTS`. device: for models of the hub.
        threads: of torch. browser: open the page.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    device: str = "cpu"
    threads: int = max(1, (os.cpu_count() or 1) // 2)
    browser: bool = False

    def __post_init__(self) -> None:
        if self.port is not None and not 0 < self.port < 65536:
            raise InvalidParameterError(f"--port {self.port}: expected 1 to 65535")
        if self.threads < 1:
            raise InvalidParameterError(f"--threads {self.threads}: expected at least 1")


@dataclass(frozen=True)
class Running:
    """A demo that is being served at `url`; `close` ends it."""

    url: str
    page: Any
    folder: tempfile.TemporaryDirectory[str]

    def close(self) -> None:
        self.page.close(verbose=False)
        self.folder.cleanup()


def free_port(host: str, port: int | None) -> int:
    """`port`, or the first free one of `PORTS`.

    Raises:
        InvalidParameterError: the port, or the address, cannot be had.
    """
    for tried in PORTS if port is None else (port,):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, tried))
            except PermissionError as error:
                raise InvalidParameterError(f"--port {tried}: not allowed; take one from 1024 on") from error
            except socket.gaierror as error:
                raise InvalidParameterError(f"--host {host}: no such address; try 127.0.0.1 or 0.0.0.0") from error
            except OSError as error:
                if error.errno == 99 or "assign" in str(error).lower():
                    raise InvalidParameterError(f"--host {host} is no address of this machine") from error
                continue
            return tried
    if port is not None:
        raise InvalidParameterError(
            f"--port {port} is in use: stop what listens there, give another --port, or leave it out for a free one"
        )
    raise InvalidParameterError(f"all ports from {PORTS[0]} to {PORTS[-1]} are in use: give a free one with --port")


def start(options: DemoOptions) -> Running:
    """Load, draw and serve; returns at once.

    Raises:
        MissingExtraError: a package of the extra demo is missing. InvalidParameterError: of the options.
    """
    packages = ("gradio", "timm", "transformers", "torchvision", "open_clip", "diffusers", "sklearn", "skimage", "av")
    require("demo", *packages, what="tokred demo")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidParameterError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    port = free_port(options.host, options.port)  # before anything is loaded
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    torch.set_num_threads(options.threads)
    from tokred.demo.models import Shelves
    from tokred.demo.page import build, theme
    from tokred.demo.samples import write_samples

    folder = tempfile.TemporaryDirectory(prefix="tokred-demo-")
    shelves = Shelves(options.device)
    shelves.load_bundled()
    page = build(shelves, write_samples(Path(folder.name)), Path(folder.name))
    page.queue(max_size=32).launch(
        server_name=options.host,
        server_port=port,
        inbrowser=options.browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=f"{LARGEST}mb",
        allowed_paths=[folder.name],
        theme=theme(),
        css_paths=Path(__file__).with_name("page.css"),
    )
    shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    return Running(f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/", page, folder)


def serve(options: DemoOptions) -> None:
    """`start`, say where, and wait for Ctrl-C, or to be told to end."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)  # so that the folder of the examples goes
    began = time.perf_counter()
    print("loading the bundled models ...", flush=True)
    running = start(options)
    try:
        print(f"ready after {time.perf_counter() - began:.0f} s: open {running.url} (Ctrl-C stops it)", flush=True)
        running.page.block_thread()
    finally:
        running.close()
