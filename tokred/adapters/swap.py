"""Give a module a subclass of its class, and take it away again.

The subclass keeps the name, qualified name and module of its base: transformers finds captured outputs and accelerate
its no-split lists by them. Subclasses are cached, so two modules of one class stay of one class, and they pickle.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from tokred.core.errors import UnsupportedModelError

__all__ = ["is_swapped", "swap_class", "unswap_class"]

_CACHE: dict[tuple[type, Callable[..., Any]], type] = {}


def swap_class(module: nn.Module, extend: Callable[[type], dict[str, Any]]) -> None:
    """Replace the class of `module` by a subclass with the attributes `extend(base)`.

    `extend` must be a top-level function: it names the subclass in a pickle.

    Raises:
        UnsupportedModelError: `forward` is set on the instance (accelerate, diffusers hooks), so that a subclass
            would silently be ignored.
    """
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"{type(module).__name__} has a forward() set on the instance (an accelerate or diffusers hook, or a "
            "monkey patch), which would hide the reduction; patch first and add those hooks afterwards"
        )
    base = type(module)
    module.__class__ = _subclass(base, extend)


def unswap_class(module: nn.Module) -> None:
    """Give back the class that `swap_class` replaced; a module that was not swapped is left alone."""
    if is_swapped(module):
        module.__class__ = type(module)._tokred_base  # type: ignore[attr-defined]


def is_swapped(module: nn.Module) -> bool:
    return "_tokred_base" in vars(type(module))


def _subclass(base: type, extend: Callable[[type], dict[str, Any]]) -> type:
    key = (base, extend)
    if key not in _CACHE:
        names = {
            **extend(base),
            "_tokred_base": base,
            "_tokred_extend": staticmethod(extend),
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce_ex,
        }
        _CACHE[key] = types.new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(names))
    return _CACHE[key]


def _reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
    cls = type(self)
    return _rebuild, (cls._tokred_base, cls._tokred_extend), self.__getstate__()


def _rebuild(base: type, extend: Callable[[type], dict[str, Any]]) -> Any:
    return object.__new__(_subclass(base, extend))
