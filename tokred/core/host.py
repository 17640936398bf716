"""The base of every host: a model family that offers sites. Concrete hosts live in `tokred.adapters`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from tokred.core.method import Method
from tokred.core.trace import Trace

__all__ = ["Attachment", "Host"]


class Attachment(Protocol):
    """Methods at work on one model: what `Host.attach` returns."""

    @property
    def trace(self) -> Trace: ...

    def remove(self) -> None: ...


class Host(ABC):
    """One model family. Subclasses know where its sites are, and no method.

    Class attributes:
        family: for tables. classes: names of the model classes served. sites: what the family offers.
        refusals: what is refused, by class name or option, with the reason.
    """

    family: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    sites: ClassVar[tuple[str, ...]]
    refusals: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this host serves `model` itself (not a part of it)."""

    def place(self, root: nn.Module) -> None:  # noqa: B027
        """Look, before `attach`, at the model that the user gave: it may be larger than the part served."""

    @abstractmethod
    def attach(self, methods: Sequence[Method], options: Mapping[str, Any]) -> Attachment:
        """Install the methods; on any error leave the model as it was."""
