"""Telling a hub that cannot be reached from everything else that may go wrong while something is loaded."""

from __future__ import annotations

__all__ = ["unreachable", "what_to_do"]

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
