"""Selection by a stable sort: the same tokens for the same scores, whatever the batch size or device."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.ops._common import check_rank


def rank(scores: Tensor, descending: bool = True) -> Tensor:
    """Positions (B, n) int64 in order of their score; ties to the lower position, NaN last in both directions.

    ``scores``: (B, n), floating or integer. ``torch.topk`` is not used because its choice among equal scores may differ
    from call to call.
    """
    check_rank("scores", scores, 2, "(B, n)")
    scores = scores.detach()
    if scores.is_floating_point():
        # torch puts NaN last in ascending order and first in descending order. The zero also makes -0.0 a 0.0, which a
        # radix sort of the bits would set apart.
        return torch.argsort(0.0 - scores if descending else 0.0 + scores, dim=1, stable=True)
    return torch.argsort(scores, dim=1, descending=descending, stable=True)


def top_indices(scores: Tensor, k: int, largest: bool = True) -> Tensor:
    """Positions (B, k) int64, ascending, of the k best of ``scores`` (B, n); ties to the lower position, NaN last.

    Raises ``ValueError`` unless 0 <= k <= n.
    """
    check_rank("scores", scores, 2, "(B, n)")
    if not 0 <= k <= scores.shape[1]:
        raise ValueError(f"k: expected 0 <= k <= n = {scores.shape[1]}, got {k}.")
    return rank(scores, descending=largest)[:, :k].sort(dim=1).values
