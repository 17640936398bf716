"""Records of what there is: methods, hosts, and which fits which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokred.core.method import Method, registered

__all__ = ["HostRecord", "MethodRecord", "compatibility", "hosts", "methods"]


@dataclass(frozen=True)
class MethodRecord:
    """One method: its registry name, class name, paper, sites and fields with defaults."""

    name: str
    cls: str
    paper: str
    sites: tuple[str, ...]
    parameters: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class HostRecord:
    """One model family: the classes served, its sites, what it refuses with the reason, and its options of `patch`."""

    family: str
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    refusals: dict[str, str]
    options: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def methods() -> list[MethodRecord]:
    """Every method, those of other packages included once they are imported."""
    records = []
    for name, cls in sorted(registered().items()):
        declared = dataclasses.fields(cls)  # type: ignore[arg-type]
        fields = {f.name: "required" if f.default is dataclasses.MISSING else f.default for f in declared}
        records.append(MethodRecord(name, cls.__name__, cls.paper, tuple(cls.sites), fields))
    return records


def hosts() -> list[HostRecord]:
    """Every host whose model library is installed."""
    from tokred.adapters.registry import host_classes

    return [
        HostRecord(h.family, tuple(h.classes), tuple(h.sites), dict(h.refusals), _options(h.sites))
        for h in host_classes()
    ]


def _options(sites: Sequence[str]) -> dict[str, str]:
    """{option of `patch`: its meaning} of a host with these sites."""
    from tokred.core.patch import OPTIONS

    return {name: meaning for name, (site, meaning) in OPTIONS.items() if site in sites}


def compatibility() -> dict[str, dict[str, bool]]:
    """{method: {host family: whether the host has the sites where the method acts}}."""
    known = registered()
    return {name: {h.family: _fits(cls, h) for h in hosts()} for name, cls in sorted(known.items())}


def _fits(method: type[Method], host: HostRecord) -> bool:
    sites = set(method.sites)
    return bool(sites & set(host.sites)) if method.any_site else sites <= set(host.sites)
