"""Imports a module right after timm: methods must not load timm, and our models must be there once it is."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_with_timm"]


def register_with_timm(module: str) -> None:
    """Import `module` as soon as somebody imports timm."""
    sys.meta_path.insert(0, _Follower(module))


class _Follower(MetaPathFinder):
    """Finds timm as the finders behind it do, and lets `module` be imported once timm is there."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("timm")
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module(self.module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
