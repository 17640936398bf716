"""Compiles every Triton kernel to machine code of a GPU that need not be there; prints the number of compilations.

    python tests/ops/compile_kernels.py 90

A stand-in for the driver names the target, and every launch becomes a compilation. The arguments are those of real
launches, so types, specialisations and constants are too. What this cannot see: results, launch limits, speed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

compiled: list[str] = []


class NoDevice:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(launch: Any) -> Any:
    def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        assert kernel.asm["cubin"]
        compiled.append(self.__name__)
        return kernel

    return run


def main(capability: int) -> None:
    driver.set_active(NoDevice(capability))
    JITFunction.run = compile_only(JITFunction.run)
    from tokred.ops import triton as kernels

    where = torch.zeros(2, 3, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(2, 7, 384, dtype=dtype)
        kernels.gather_rows(x, where)
        kernels.gather_rows(x[:, :1, :1], where[:, :1])
        kernels.merge_rows(x, torch.arange(14), torch.arange(11), torch.ones(14), 5)
        q, k = torch.randn(2, 4, 33, 64, dtype=dtype), torch.randn(2, 2, 65, 64, dtype=dtype)
        sizes, weights = torch.zeros(2, 65), torch.ones(2, 33)
        kernels.attention_rows(q, k, 0.1, None, None)
        kernels.attention_mass(q, k, 0.1, torch.ones(1, 1, 33, 65, dtype=torch.bool), sizes, weights)
        kernels.bipartite_match(x, x, "cosine", None, None)
        kernels.page_rank(
            torch.rand(2, 2, 197, 197).to(dtype), torch.rand(2, 2, 197), 30, weights[:, :1] > 0, True, 0.1
        )
    kernels.attention_rows(q[:, :, :1], k, 0.1, torch.zeros(2, 1, 1, 65), sizes)
    kernels.bipartite_match(x, x, "dot", None, torch.ones(2, 7, dtype=torch.bool))
    for power in (0, 2, 5):
        kernels.bipartite_match(x, x, "distance", power, None)
    kernels.page_rank(torch.rand(1, 1, 1, 1), torch.rand(1, 1, 1), 1, None, False, 0.0)
    print(len(compiled), *sorted(set(compiled)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
