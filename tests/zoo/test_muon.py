"""Muon: the batched step is the step of each matrix alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokred.zoo.muon import Muon, orthogonalise


def test_orthogonalise_moves_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 24, 8), (4, 8, 24), (4, 16, 16)):
        matrices = torch.randn(shape, generator=generator)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        result = orthogonalise(matrices)
        torch.testing.assert_close(u @ (u.mT @ result @ vh.mT) @ vh, result, rtol=0, atol=1e-4)
        values = torch.linalg.svdvals(result)
        assert values.max() < 1.3
        assert values.quantile(0.2) > 0.5


def test_fused_qkv_is_three_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(8, 8, generator=generator) for _ in range(3)]
    grads = [torch.randn(8, 8, generator=generator) for _ in range(3)]
    fused = nn.Parameter(torch.cat(parts))
    fused.grad = torch.cat(grads)
    single = [nn.Parameter(part.clone()) for part in parts]
    for p, grad in zip(single, grads, strict=True):
        p.grad = grad
    Muon([fused]).step()
    Muon(single).step()
    torch.testing.assert_close(fused, torch.cat(list(single)))


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))])
