"""What sessions that act by hooks inside a forward pass share: the state of running passes, and how to find it again.

State belongs to one forward call and to one thread. While the call runs it is found in the thread's `call`; afterwards,
when gradient checkpointing runs a block again, through the tensor that the block received, or through that tensor's
memory (reentrant checkpoints hand over a detached one).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tokred.adapters.swap import swap_class, unswap_class

__all__ = ["Call", "PassSession"]

_STATE = "_tokred_state"  # attribute of a tensor: the pass that it belongs to

StateT = TypeVar("StateT")


class Call(Generic[StateT]):
    """What a running call of one thread keeps at hand; `last` is the state of the pass that ended last."""

    def __init__(self) -> None:
        self.last: StateT | None = None


CallT = TypeVar("CallT", bound=Call[Any])


class PassSession(Generic[CallT, StateT]):
    """Hooks and swapped classes on a model, with a state for each pass.

    Attributes:
        handles: of hooks. seats: modules whose class was swapped.
        passes_kept: recomputations that can be found by memory before those of dead passes are forgotten.
    """

    passes_kept = 64

    def __init__(self, new_call: Callable[[], CallT]) -> None:
        self.new_call = new_call
        self.handles: list[Any] = []
        self.seats: list[nn.Module] = []
        self._reset_runtime()

    def swap(self, module: nn.Module, extend: Callable[[type], dict[str, Any]], seat: Any) -> None:
        """Swap the class of `module` and give it `seat`, by which it finds its session; `remove` undoes it."""
        swap_class(module, extend)
        module._tokred_seat = seat
        self.seats.append(module)

    def remove(self) -> None:
        """Take everything away again, in reverse; safe to call twice."""
        for handle in reversed(self.handles):
            handle.remove()
        for module in reversed(self.seats):
            unswap_class(module)
            module.__dict__.pop("_tokred_seat", None)
        self.handles, self.seats = [], []
        self._reset_runtime()

    # -- the call that runs ------------------------------------------------------------------------------------------

    def _reset_runtime(self) -> None:
        self._local = threading.local()
        self._traced = self.new_call()  # while torch.compile traces: Dynamo follows no thread's storage
        self._newest: StateT | None = None
        self._by_pointer: dict[tuple[int, int], weakref.ref[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        runtime = ("_local", "_traced", "_newest", "_by_pointer")
        return {key: value for key, value in self.__dict__.items() if key not in runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()

    @property
    def call(self) -> CallT:
        """That of this thread."""
        if torch.compiler.is_compiling():
            return self._traced
        if not hasattr(self._local, "call"):
            self._local.call = self.new_call()
        return self._local.call  # type: ignore[no-any-return]

    @property
    def shown(self) -> StateT | None:
        """State of the last pass of this thread, else of any thread."""
        return self.call.last or self._newest

    def ended(self, state: StateT) -> None:
        """Make `state` the last pass."""
        self.call.last = self._newest = state

    # -- passes that are over ----------------------------------------------------------------------------------------

    def tag(self, value: Any, state: StateT | None) -> None:
        """Let a tensor remember the pass that made it."""
        if isinstance(value, Tensor) and state is not None and not torch.compiler.is_compiling():
            setattr(value, _STATE, (weakref.ref(self), state))

    def tagged(self, value: Any) -> StateT | None:
        """The pass that `tag` noted."""
        owner, state = getattr(value, _STATE, (None, None))
        return state if owner is not None and owner() is self else None

    def remember(self, layer: int, x: Tensor, state: StateT) -> None:
        """Let a recomputation of block `layer` find its state: by its input, or by the input's memory."""
        if torch.compiler.is_compiling() or not (x.requires_grad or torch.is_grad_enabled()):
            return
        self.tag(x, state)
        if len(self._by_pointer) > self.passes_kept:
            self._by_pointer = {key: ref for key, ref in list(self._by_pointer.items()) if ref() is not None}
        self._by_pointer[layer, x.data_ptr()] = weakref.ref(state)

    def recall(self, layer: int, x: Tensor) -> StateT | None:
        """What `remember` noted of the memory of `x`."""
        reference = self._by_pointer.get((layer, x.data_ptr()))
        return reference() if reference is not None else None
