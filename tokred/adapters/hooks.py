"""Hooks as top-level objects, so that a patched model copies and pickles."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Hook"]


class Hook:
    """Calls a method of a session with what torch hands a hook, the module left out, behind what was `given` before."""

    def __init__(self, session: Any, method: str, *given: Any) -> None:
        self.session, self.method, self.given = session, method, given

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return getattr(self.session, self.method)(*self.given, *args)
