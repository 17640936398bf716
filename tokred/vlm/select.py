"""What the methods of the `VisualFeatures` site share: budgets of partitions, tower scores by cell, kept sets."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred import ops
from tokred.core.budget import budget_tokens
from tokred.core.errors import InvalidParameterError, LayerError, LayoutError, NoClassTokenError
from tokred.core.sites import MediaLayout, Needs, TowerInfo, VisualFeatures
from tokred.core.tokens import Keep

__all__ = [
    "ClassSource",
    "attention_received",
    "attention_source",
    "check_fits",
    "check_share",
    "exact",
    "groups",
    "keep_marked",
    "needed_attention",
    "partition_budgets",
    "partition_tokens",
    "require_uniform",
    "unit",
]

Budget = TypeVar("Budget", bound=Hashable)
ClassSource = Literal["auto", "cls", "mean_received", "map_head"]


def check_fits(name: str, budget: float | int, total: int) -> None:
    """Refuse a count of more tokens than there are."""
    if isinstance(budget, int) and budget > total:
        raise InvalidParameterError(f"{name}: budget={budget} tokens, but this image or video has {total}")


def check_share(field: str, value: object) -> None:
    """Refuse what is no number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InvalidParameterError(f"{field}={value!r}: expected a number in [0, 1]")


def require_uniform(name: str, layout: MediaLayout) -> None:
    """Refuse a layout whose tokens do not correspond to cells of the vision tower."""
    if not layout.uniform:
        raise LayoutError(
            f"{name} scores cells of the vision tower, but here the tokens were resampled over the tiles of the "
            f"{layout.kind} (OneVision's anyres), so cells and tokens do not correspond; use a method that reads the "
            "tokens themselves, such as DivPrune"
        )


def attention_source(name: str, source: ClassSource, tower: TowerInfo) -> ClassSource:
    """Which attention stands for the class token's: "cls", "mean_received" or "map_head"."""
    if source == "auto":
        return "cls" if tower.has_class else "mean_received"
    if source == "cls" and not tower.has_class:
        raise NoClassTokenError(
            f"{name} was asked for class-token attention, but this vision tower has no class token; "
            "use cls_source='auto' or 'mean_received'"
        )
    if source == "map_head" and not tower.has_probe:
        raise InvalidParameterError(
            f"{name}: cls_source='map_head', but this vision tower ends in no attention pool; use 'auto'"
        )
    return source


def needed_attention(name: str, source: ClassSource, tower: TowerInfo, layers: Sequence[int]) -> Needs:
    """What `attention_received` will read at these layers; a layer that does not exist is refused."""
    for layer in layers:
        if not 0 <= layer < tower.depth:
            raise LayerError(f"{name}: layer {layer}, but this vision tower has layers 0 to {tower.depth - 1}")
    source = attention_source(name, source, tower)
    wanted = frozenset(layers)
    if source == "map_head":
        return Needs(probe=True)
    return Needs(rows=wanted) if source == "cls" else Needs(mass=wanted)


def attention_received(view: VisualFeatures, source: ClassSource, layer: int) -> Tensor:
    """(G, P, N) float32 or wider: attention to each cell, summed over heads.

    Of the class token; without one, of all tokens together (a constant times their mean); or of the pooling head's
    probe, whatever the layer.
    """
    if source == "map_head":
        rows = view.probe_attention()
    else:
        rows = view.class_attention(layer) if source == "cls" else view.attention_mass(layer)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).sum(dim=2)


def partition_tokens(layout: MediaLayout) -> list[list[int]]:
    """For each partition its tokens, as positions among the prunable ones, in raster order."""
    found: list[list[int]] = [[] for _ in range(layout.partitions)]
    for position, cell in sorted(enumerate(layout.cells), key=lambda pair: pair[1]):
        found[cell // layout.cells_per_partition].append(position)
    return found


def partition_budgets(name: str, budget: float | int, layout: MediaLayout) -> list[int]:
    """Tokens of each partition: a fraction of its own tokens (rounded down, at least 1), or an even part of a count."""
    sizes = [len(tokens) for tokens in partition_tokens(layout)]
    check_fits(name, budget, sum(sizes))
    if isinstance(budget, float):
        return [budget_tokens(budget, size) if size else 0 for size in sizes]
    left, budgets = budget, [0] * len(sizes)
    while left:  # what a partition that unpadding made small cannot take goes to the others
        free = [p for p, size in enumerate(sizes) if budgets[p] < size]
        for place, p in enumerate(free):
            part = left * (place + 1) // len(free) - left * place // len(free)
            budgets[p] += min(part, sizes[p] - budgets[p])
        left = budget - sum(budgets)
    return budgets


def groups(layout: MediaLayout, budgets: Sequence[Budget]) -> list[tuple[list[int], Tensor, Budget]]:
    """Partitions that can be worked on together: (their numbers, their tokens (Q, n), the budget of each)."""
    tokens = partition_tokens(layout)
    found: dict[tuple[int, Budget], list[int]] = {}
    for p, budget in enumerate(budgets):
        if tokens[p]:
            found.setdefault((len(tokens[p]), budget), []).append(p)
    return [(members, torch.tensor([tokens[p] for p in members]), budget) for (_, budget), members in found.items()]


def keep_marked(marked: Tensor) -> Keep:
    """Keep the tokens that are True in `marked` (G, n); rows that keep fewer than the longest are padded."""
    counts = marked.sum(dim=1)
    most, fewest = (int(value) for value in torch.stack([counts.max(), counts.min()]).tolist())
    indices = ops.top_indices(marked.to(torch.uint8), most)
    return Keep(indices, None if most == fewest else marked.gather(1, indices))


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 or wider; a row of zeros stays, what is not a number becomes zero."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).nan_to_num()
    return F.normalize(x, dim=-1)


def exact(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast in the matrix products of scores."""
    return torch.autocast(x.device.type, enabled=False)
