"""Which layer of a model finds what a prompt asks for: the paper's way of choosing GemFilter's layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from tokred.core.decoder import Probe, Prompt, PromptMethod
from tokred.core.patch import patch
from tokred.core.sites import DecoderInfo
from tokred.vlm.gemfilter import Pool, covering_layer

__all__ = ["find_filter_layer"]


def find_filter_layer(
    model: nn.Module,
    prompts: Tensor,
    needle_spans: Sequence[tuple[int, int]],
    k: float | int,
    share: float = 0.9,
    kernel_size: int = 5,
    pool: Pool | None = "avg",
) -> int | None:
    """The first layer whose selection covers a known needle in nearly all prompts (figure 5); None if there is none.

    Args:
        model: a language model or a multimodal one, not patched. prompts: (P, n) int64 token ids without padding, which
            end with what asks for the needle. needle_spans: (start, stop) of each.
        k: tokens to select, a count or a fraction. share: part of the prompts whose needle a layer must cover.
        kernel_size, pool: as of `GemFilter`.

    Raises:
        InvalidParameterError: a span that does not lie in its prompt, or not one span a prompt.
    """
    finder = _Finder(prompts, tuple(needle_spans), k, share, kernel_size, pool)
    with patch(model, finder):
        return finder.found[0]


@dataclass(frozen=True, repr=False, eq=False)
class _Finder(PromptMethod):
    """Asks a model when it is patched, and reduces nothing."""

    prompts: Tensor
    spans: tuple[tuple[int, int], ...]
    k: float | int
    share: float
    kernel_size: int
    pool: Pool | None
    found: list[int | None] = field(default_factory=list)

    name: ClassVar[str] = "filter_layer_finder"
    title: ClassVar[str] = "Filter layer finder"
    paper: ClassVar[str] = ""
    listed: ClassVar[bool] = False

    def filter_layer(self, info: DecoderInfo, probe: Probe) -> int:
        found = covering_layer(probe, info, self.prompts, self.spans, self.k, self.share, self.kernel_size, self.pool)
        self.found.append(found)
        return found or 0

    def bypasses(self, visual: int, text: int) -> bool:
        return True

    def choose(self, view: Prompt) -> Tensor:
        return view.valid
