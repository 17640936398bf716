"""Muon with batched Newton-Schulz steps, for the small models that are trained here on a CPU.

``torch.optim.Muon`` (torch 2.9 and later) takes a fused qkv weight for one matrix and orthogonalises one matrix at a
time, in bfloat16. Here the three parts of a qkv weight are matrices of their own, all matrices of a shape go through
one batched product in float32, and torch 2.8 is enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # K. Jordan, "Muon", 2024


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration: singular values of each of (M, R, C) moved near 1, directions kept."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov, orthogonalised update, scale ``sqrt(max(1, rows / columns))``, decoupled weight decay.

    A parameter of shape (3 C, C) is taken for a fused qkv weight and updated as three matrices.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon updates matrices only, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for weight, part in zip(p.chunk(parts), update.chunk(parts), strict=True):
                    by_shape[weight.shape].append((weight, part))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalise(torch.stack([part for _, part in pairs]))
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.sub_(update, alpha=scale)
