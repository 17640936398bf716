"""Telling a hub that cannot be reached from everything else that may go wrong while something is loaded."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from tokred.core.errors import InvalidParameterError, nearest

__all__ = ["brief", "impatient", "pretrained", "reachable", "unreachable", "what_to_do"]

PATIENCE = 4  # seconds in which the hub has to answer

#: classes by name: huggingface_hub, requests, httpx, urllib3, urllib and datasets have their own
_SIGNS = {
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "MaxRetryError",
    "NewConnectionError",
    "OfflineModeIsEnabled",
    "ReadTimeout",
    "Timeout",
    "URLError",
    "gaierror",
}


def unreachable(error: BaseException | None) -> bool:
    """Whether a failed connection, or being told to stay offline, is behind `error`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if any(cls.__name__ in _SIGNS for cls in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def what_to_do(what: str, local: str) -> str:
    """The message for a hub that cannot be reached: `what` was wanted, `local` is how to do without."""
    return (
        f"{what} is not in the cache here and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set); fetch "
        f"it once where there is a network (hf download) and copy the cache (HF_HOME), or {local}"
    )


def brief(error: BaseException) -> str:
    """An error of another library in one line: its kind, where it says little, and at most 240 letters of it."""
    text = " ".join(str(error).split()).rstrip(".")
    text = text if " " in text else f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 240 else f"{text[:237]}..."


def pretrained(name: str, readers: Sequence[Any], bundled: Sequence[str], what: str, dtype: Any) -> tuple[Any, Any]:
    """A model of transformers in eval mode, and its tokenizer or processor.

    Args:
        name: a folder, or an id of the hub. readers: the Auto classes of the model and of what goes with it.
        bundled: names that would have done, for the message. what: the model is expected to be. dtype: of its weights.

    Raises:
        InvalidParameterError: there is no such model, it is another kind, or the hub cannot be reached.
    """
    if not name or (not Path(name).exists() and "/" not in name):
        raise InvalidParameterError(
            f"no model {name!r}{nearest(name, bundled)}; expected {', '.join(bundled)}, a folder, or an id of the hub"
        )
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise InvalidParameterError(
            f"--model {name} has no config.json in it: expected a folder as save_pretrained writes it"
        )
    model_reader, other_reader = readers
    try:
        with impatient(name):
            other = other_reader.from_pretrained(name)
            return model_reader.from_pretrained(name, dtype=dtype).eval(), other
    except Exception as error:
        if unreachable(error):
            raise InvalidParameterError(what_to_do(f"the model {name}", "give --model a folder with it")) from error
        raise InvalidParameterError(f"--model {name} cannot be loaded as a {what}: {brief(error)}") from error


def reachable() -> bool:
    """Whether it makes sense to ask the hub: something listens there, or requests go through a proxy, or it is to be
    left alone (then its client says so at once).
    """
    from huggingface_hub import constants

    if _OFFLINE.inside:  # it is we who turned it off
        return False
    if constants.HF_HUB_OFFLINE or getproxies():
        return True
    place = urlsplit(constants.ENDPOINT)
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname, port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


class _Offline:
    """The hub's switch is the whole process's: the first who needs it off turns it, the last one turns it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.inside = 0
        self._before = False

    @contextmanager
    def held(self) -> Iterator[None]:
        from huggingface_hub import constants

        with self._lock:
            if self.inside == 0:
                self._before = constants.HF_HUB_OFFLINE
                constants.HF_HUB_OFFLINE = True
            self.inside += 1
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1
                if self.inside == 0:
                    constants.HF_HUB_OFFLINE = self._before


_OFFLINE = _Offline()


@contextmanager
def impatient(name: str) -> Iterator[None]:
    """Inside, the hub is given up at once if nothing listens there: its client would try again for a minute.

    Nothing is changed where `name` is a folder or file, or the hub's client is not installed.
    """
    if Path(name).exists() or importlib.util.find_spec("huggingface_hub") is None or reachable():
        yield
        return
    with _OFFLINE.held():
        yield
