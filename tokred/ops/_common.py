"""What every op shares: dtype rules, argument checks, and the way to the Triton kernels."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int64,)


def score_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``), that is, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def kernels(x: Tensor) -> ModuleType | None:
    """The module of Triton kernels if they can run on ``x``, else None (then the caller takes the plain path)."""
    if x.dtype not in KERNEL_DTYPES or not (x.is_cuda or interpreting()):
        return None
    return _load_kernels()


@functools.cache
def _load_kernels() -> ModuleType | None:
    # Triton is imported at first use only. A broken installation (seen: triton without setuptools) raises other errors
    # than ImportError, and must cost speed, not correctness.
    if os.environ.get("TOKRED_TRITON", "1") == "0":
        return None
    try:
        import tokred.ops.triton as module
    except Exception as error:
        warnings.warn(f"tokred: Triton kernels are unavailable ({error!r}); using plain torch.", stacklevel=2)
        return None
    return module


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Scores stay in float32: autocast would turn their matrix products into half precision."""
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def describe(x: object) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" if isinstance(x, Tensor) else repr(x)


def check_rank(name: str, x: Tensor, rank: int, shape: str, *, at_least: bool = False) -> None:
    """``x`` is a tensor with ``rank`` dimensions (or more); ``shape`` is how the error names them."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(x).__name__}.")
    if x.dim() < rank or (x.dim() > rank and not at_least):
        raise ValueError(f"{name}: expected shape {shape}, got {describe(x)}.")


def check_float(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {describe(x)}; convert it with .float().")


def check_index(name: str, index: Tensor, x_name: str, x: Tensor) -> None:
    """``index`` is int64 (B, K), with the batch size and the device of ``x``."""
    check_rank(name, index, 2, "(B, K)")
    if index.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: expected int64, got {describe(index)}; convert it with .long().")
    check_same_batch(name, index, x_name, x)


def check_same_batch(name: str, t: Tensor, x_name: str, x: Tensor) -> None:
    if t.shape[0] != x.shape[0]:
        raise ValueError(f"{name} {describe(t)} and {x_name} {describe(x)} differ in batch size.")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device} and {x_name} on {x.device}; move them to one device.")


def check_shape(name: str, t: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {what} = {tuple(shape)}, got {describe(t)}.")
