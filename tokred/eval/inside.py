"""Methods inside a language model as the benchmarks run them: their settings there, controls, and what layers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.budget import budget_tokens
from tokred.core.decoder import DecoderMethod, LayerNeeds, PrefillLayer, Prompt, PromptMethod, Survivors
from tokred.core.method import Method, registered
from tokred.core.sites import DecoderInfo
from tokred.core.trace import Trace
from tokred.vlm.survivors import keep_best, kept_of_rows, spread

__all__ = [
    "SETTINGS",
    "RandomLayer",
    "RandomPrompt",
    "Read",
    "budget_field",
    "fit_threshold",
    "inside_method",
    "tokens_read",
]

#: Settings for the bundled VLM, whose language model has six layers, by the labels of the table: (method, parameters).
#: What differs from the library's defaults, which are for models of 28 layers and more, was chosen on 300 validation
#: questions with 36 tokens left (± 2 points). PyramidDrop and SparseVLM have too few of their default stages here.
#: FastV has 88 % at layer 3 and 79 % at its default, 2, with 16 tokens left.
#: CoreMatching has 89 % at layer 3 and 75 % at its default, 1. GemFilter has 85 % at layers 2 and 3, 71 to 78 % at
#: others. MustDrop has 82 % with windows of 0.9, 78 % with its default, 0.8, and 91 % if it merges none (2): after
#: merging, this model miscounts digits. CoreMatching and MustDrop have one row with all of their parts and one without.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "FastV": ("fastv", {"layer": 3}),
    "PyramidDrop": ("pyramiddrop", {"stages": (2, 3, 4)}),
    "DART": ("dart", {}),
    "SparseVLM": ("sparsevlm", {"stages": (1, 2, 3)}),
    "MustDrop": ("mustdrop", {"pruning_layers": (1, 3), "spatial_threshold": 0.9}),
    "MustDrop, unmerged": ("mustdrop", {"pruning_layers": (1, 3), "spatial_threshold": 2.0}),
    "CoreMatching": ("corematching", {"prune_layer": 3, "beta": 1.0}),
    "CoreMatching, MLP": ("corematching", {"prune_layer": 3}),
    "GemFilter": ("gemfilter", {"scope": "visual", "layer": 3}),
}
#: the parameter that is the budget, where it is not `budget`; MustDrop's thresholds are fitted instead
_BUDGETS = {"corematching": "keep_tokens", "gemfilter": "k", "mustdrop": None}


def budget_field(name: str) -> str | None:
    """The parameter of a method that says how many tokens are left, None if none does."""
    return _BUDGETS.get(name, "budget")


def inside_method(name: str, tokens: int, parameters: Mapping[str, Any]) -> Method:
    """The method `name` with a budget of `tokens`, as far as it has one."""
    field = budget_field(name)
    return registered()[name](**parameters, **({} if field is None else {field: tokens}))  # type: ignore[call-arg]


def fit_threshold(left: Callable[[float], float], target: int, steps: int = 8) -> float:
    """The threshold in 1e-5 ... 1 behind which about `target` tokens are left; `left` falls with it.

    Bisected in logarithms and rounded to three digits, so that a printed threshold is the one that was measured.
    """
    low, high = 1e-5, 1.0
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if left(middle) > target else (low, middle)
    return float(f"{(low * high) ** 0.5:.3g}")


# -- controls ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class RandomLayer(DecoderMethod):
    """Before a layer, keep random visual tokens: the twin of `DART` at the same cost.

    Attributes:
        layer: 1 ... depth - 1. budget: visual tokens that stay. seed: of the choice, the same for every prompt.
    """

    layer: int = 2
    budget: float | int = 0.5
    seed: int = 0

    name: ClassVar[str] = "random_layer"
    title: ClassVar[str] = "Random inside"
    paper: ClassVar[str] = "control"
    listed: ClassVar[bool] = False

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        return {self.layer: LayerNeeds()}

    def prune(self, view: PrefillLayer) -> Survivors | None:
        counts = kept_of_rows(view, self.budget)
        if counts is None:
            return None
        return Survivors(keep_best(_noise(view.columns, self.seed), view.visual, counts) | view.text)

    def entering(self, info: DecoderInfo, visual: int, kept: int | None = None) -> tuple[int, ...]:
        return spread(visual, {self.layer: budget_tokens(self.budget, visual)}, info.depth)


@dataclass(frozen=True, repr=False)
class RandomPrompt(PromptMethod):
    """Let random tokens of a prompt and all of its end go on: what `GemFilter` has to beat.

    Attributes:
        k: tokens to keep, those of the end included. keep_last: tokens of the end, the question.
        seed: of the choice, the same for every prompt.
    """

    k: int = 64
    keep_last: int = 4
    seed: int = 0

    name: ClassVar[str] = "random_prompt"
    title: ClassVar[str] = "Random"
    paper: ClassVar[str] = "control"
    listed: ClassVar[bool] = False

    def filter_layer(self, info: DecoderInfo, probe: Any) -> int:
        return 0

    def bypasses(self, visual: int, text: int) -> bool:
        return self.k >= visual + text

    def choose(self, view: Prompt) -> Tensor:
        place = view.valid.cumsum(dim=1)
        end = view.valid & (place > place[:, -1:] - self.keep_last)
        scores = _noise(view.columns, self.seed).masked_fill(end, torch.inf)
        return keep_best(scores, view.valid, view.valid.sum(dim=1).clamp_max(self.k))

    def kept(self, visual: int, text: int, images: Sequence[int] = ()) -> int:
        return min(self.k, visual + text)


def _noise(columns: Tensor, seed: int) -> Tensor:
    """(B, T): a number for each column of the prompt, always the same one for a seed."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(int(columns.max()) + 1, generator=generator).to(columns.device)
    return found[columns.clamp_min(0)]


# -- what layers read --------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """Visual tokens of each prompt of a batch.

    Attributes:
        entered: that entered the language model. left: behind its last layer. mean: that its layers read, on average
            (a first pass that only chooses, as of GemFilter, counts in full).
    """

    entered: list[int]
    left: list[int]
    mean: list[float]


def tokens_read(trace: Trace | None, visual: Tensor, depth: int) -> Read:
    """What a trace of one image a prompt says; None is of an unpatched model.

    Args:
        visual: (B, S) bool, visual tokens of the caller's prompts. depth: layers of the language model.
    """
    whole = visual.sum(dim=1).tolist()
    if trace is None:
        return Read(whole, whole, [float(count) for count in whole])
    now = list(whole)
    for media in trace.media:
        now[media.sample] = media.tokens_out
    entered, total = list(now), [0] * len(now)
    for choice in trace.prompt:
        total = [choice.layer * count for count in now]
        now = _count(choice.kept, visual)
    for layer in range(depth):
        for step in trace.layers:
            if step.layer == layer:
                now = _count(step.kept, visual)
        total = [before + count for before, count in zip(total, now, strict=True)]
    for step in trace.layers:
        if step.layer == depth:
            now = _count(step.kept, visual)
    return Read(entered, now, [count / depth for count in total])


def _count(kept: Sequence[Sequence[int]], visual: Tensor) -> list[int]:
    """Visual tokens among the kept columns of each prompt."""
    return [int(visual[row, list(columns)].sum()) for row, columns in enumerate(kept)]
