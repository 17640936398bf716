"""Finds the host of a model. Hosts are imported only when the model's own library is loaded already."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from tokred.core.errors import UnsupportedModelError
from tokred.core.host import Host

__all__ = ["HOSTS", "denoiser_of", "find_host", "host_classes"]

#: (library, module, class): a host and the library without which no model of its family can exist
HOSTS: tuple[tuple[str, str, str], ...] = (
    ("timm", "tokred.adapters.timm_vit", "TimmHost"),
    ("open_clip", "tokred.adapters.open_clip", "OpenClipHost"),
    ("transformers", "tokred.adapters.hf_vlm", "HFVLMHost"),
    ("transformers", "tokred.adapters.hf_vision", "HFVisionHost"),
    ("transformers", "tokred.adapters.hf_llm", "HFLLMHost"),
    ("diffusers", "tokred.adapters.diffusion", "DiffusersHost"),
)


def host_classes(loaded_only: bool = False) -> Iterator[type[Host]]:
    """All hosts whose library is installed (or, `loaded_only`, imported already), in order of priority."""
    for library, module, name in HOSTS:
        if loaded_only and library not in sys.modules:
            continue
        try:
            yield getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != library:
                raise


def find_host(model: nn.Module) -> Host:
    """Return the host of `model`, or of the one part of it that a host serves.

    Raises:
        UnsupportedModelError: no host serves it, a host refuses it by name, or several parts could be meant.
    """
    hosts = list(host_classes(loaded_only=True))
    found: list[tuple[str, nn.Module, type[Host]]] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") or outer == "" for outer, _, _ in found):
            continue
        family = next((h for h in hosts if h.matches(module)), None)
        if family is not None:
            found.append((path, module, family))
    if len(found) == 1:
        host = found[0][2](found[0][1])  # type: ignore[call-arg]
        host.place(model)
        return host
    if found:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds several models that could be meant "
            f"({', '.join(path for path, _, _ in found)}); patch one of them"
        )
    raise UnsupportedModelError(_explain(model, list(host_classes())))


def denoiser_of(pipeline: Any) -> nn.Module:
    """Return the one part of a diffusion pipeline (an object with named `components`) that a host of denoisers serves.

    Raises:
        UnsupportedModelError: it has none, or several could be meant.
    """
    from tokred.core.patch import unwrap

    serving = [host for host in host_classes(loaded_only=True) if "DiffusionBlock" in host.sites]
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found = {name: unwrap(part) for name, part in parts.items()}
    found = {name: part for name, part in found.items() if any(host.matches(part) for host in serving)}
    if len(found) == 1:
        return next(iter(found.values()))
    name = type(pipeline).__name__
    if found:
        raise UnsupportedModelError(f"{name} has several denoisers; patch one of them: {', '.join(found)}")
    held = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items())
    raise UnsupportedModelError(f"no part of {name} is a denoiser that a host serves; it holds {held or 'no models'}")


def _explain(model: nn.Module, hosts: list[type[Host]]) -> str:
    """Why nothing serves `model`: a refusal by name of it, or else of a part of it; or what would be served."""
    name = type(model).__name__
    for module in model.modules():
        lines = [cls.__name__ for cls in type(module).__mro__]
        for host in hosts:
            for refused, reason in host.refusals.items():
                if any(line.startswith(refused) for line in lines):
                    part = "" if module is model else f": its {type(module).__name__}"
                    return f"{name} is refused by the {host.family} host{part}: {reason}"
    served = "; ".join(f"{host.family}: {', '.join(host.classes)}" for host in hosts)
    return f"no host serves {name}. Served are {served or 'no models, for no model library is installed'}"
