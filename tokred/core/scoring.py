"""What a frame scorer is: how relevant each frame of a video is to a question. No model library in here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokred.core.errors import ScorerError

__all__ = ["Decoupled", "Decoupler", "FrameScorer", "score_frames", "validate_scores"]


@runtime_checkable
class FrameScorer(Protocol):
    """Anything that scores frames; a plain function of this signature is one."""

    def __call__(self, frames: Sequence[Any], query: str, objects: Sequence[str] = ()) -> Tensor:
        """Return (T,) scores in [0, 1], one for each frame.

        Args:
            frames: T pictures, PIL images or uint8 arrays or tensors (H, W, 3).
            query: the question. objects: what to look for, from a `Decoupler`; empty where there is none.
        """
        ...


class Decoupled(NamedTuple):
    """What a scorer is to be asked: the question (as it was, or shorter), and the objects that it turns on."""

    query: str
    objects: tuple[str, ...] = ()


@runtime_checkable
class Decoupler(Protocol):
    """Anything that prepares a question for a scorer; a plain function of this signature is one."""

    def __call__(self, query: str) -> Decoupled:
        """Return what the scorer of the frames is to be asked in place of `query`."""
        ...


def score_frames(
    scorer: FrameScorer | Tensor, frames: Sequence[Any], query: str, objects: Sequence[str] = ()
) -> Tensor:
    """Run a scorer, or take a tensor of scores as it is: (T,) float64 on the CPU, checked by `validate_scores`."""
    if isinstance(scorer, Tensor):
        return validate_scores(scorer, len(frames))
    if not callable(scorer):
        raise ScorerError(
            f"scorer={scorer!r}: expected a callable (frames, query, objects) -> (T,) scores, or a tensor of scores"
        )
    return validate_scores(scorer(frames, query, objects), len(frames))


def validate_scores(scores: Tensor | Sequence[float], frames_count: int) -> Tensor:
    """Return scores as (T,) float64 on the CPU, clamped to [0, 1] with a warning.

    Raises:
        ScorerError: no numbers, not one-dimensional, not one a frame, or not finite.
    """
    try:
        p = torch.as_tensor(scores, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScorerError(f"frame scores: expected {frames_count} numbers, got {type(scores).__name__}") from error
    if p.shape != (frames_count,):
        raise ScorerError(f"frame scores have shape {tuple(p.shape)}: expected ({frames_count},), one for each frame")
    if not p.isfinite().all():
        bad = int((~p.isfinite()).nonzero()[0])
        raise ScorerError(f"frame scores: expected finite numbers in [0, 1], got {p[bad].item()} at frame {bad}")
    if ((p < 0) | (p > 1)).any():
        low, high = p.min().item(), p.max().item()
        warnings.warn(f"frame scores from {low:.4g} to {high:.4g} are clamped to [0, 1]", stacklevel=2)
        p = p.clamp(0, 1)
    return p
