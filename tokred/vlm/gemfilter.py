"""GemFilter: an early layer chooses what the model reads of a prompt (arXiv 2409.17422, ACL Findings 2026)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_budget, check_choice, check_count, check_fraction
from tokred.core.decoder import Probe, Prompt, PromptMethod
from tokred.core.errors import InvalidParameterError, LayerError
from tokred.core.sites import DecoderInfo

__all__ = ["GemFilter", "choose_top", "covering_layer", "needle_coverage", "pool_scores", "prompt_scores"]

Pool = Literal["avg", "max"]


class _Published(NamedTuple):
    """A filter layer of the paper: part of a checkpoint's name, or family, depth, dim, heads and vocabulary."""

    layer: int
    names: tuple[str, ...]
    shape: tuple[str, int, int, int, int]


_PUBLISHED = (
    _Published(13, ("llama-3.1-8b",), ("llama", 32, 4096, 32, 128256)),
    _Published(19, ("mistral-nemo-instruct", "mistral-nemo-base"), ("mistral", 40, 5120, 32, 131072)),
    _Published(19, ("phi-3.5-mini",), ("phi3", 32, 3072, 32, 32064)),
)

#: Llama-3.1's published layer as a part of its depth: the guess where measuring finds nothing
_GUESS = 0.42
#: probe prompts of the automatic choice: how many, of how many ids, how many of these are selected
_PROBES, _PROBE_LENGTH, _PROBE_BUDGET = 40, 256, 32
#: a layer finds needles if it covers more of them than luck would by this many standard errors; the first layer that
#: covers nearly as much as the best is taken, for it is the cheapest
_SIGMAS, _NEARLY = 4.0, 0.9
#: ids of a needle that the end of a probe prompt says again
_CUE = 3


def prompt_scores(query: Tensor, keys: Tensor) -> Tensor:
    """(B, n) float32 (float64 for float64): what the last position's query sees in each key, summed over heads.

    Plain dot products without scale, mask or softmax (section 3 of the paper). Queries that share a key are summed
    first, which is exact. Nothing is a matrix product, so neither autocast nor TF32 touches the scores, and sums of
    float16 inputs do not overflow.

    Args:
        query: (B, H, d), after norm and rotary embedding; head h reads key head ``h // (H / H_kv)``.
        keys: (B, H_kv, n, d), after norm and rotary embedding.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = keys.shape[1]
    summed = query.detach().to(dtype).unflatten(1, (groups, -1)).sum(dim=2)  # (B, H_kv, d)
    scores = torch.zeros(keys.shape[0], keys.shape[2], dtype=dtype, device=keys.device)
    for g in range(groups):  # one key head at a time: keys of a long prompt are large
        scores += (keys[:, g].detach().to(dtype) * summed[:, g, None]).sum(dim=2)
    return scores


def pool_scores(scores: Tensor, valid: Tensor, kernel_size: int = 5, pool: Pool | None = "avg") -> Tensor:
    """(B, n): scores smoothed over `kernel_size` neighbours; -inf at padding.

    "avg" follows the paper's listing and the released code: outside the prompt the score is 0 and counts in the
    divisor, so that the first and last tokens are weakened. "max" is the prose of appendix C.2: the largest score among
    the neighbours that exist. Padding is outside, so a padded row is smoothed as it would be alone.

    Args:
        scores: (B, n) of `prompt_scores`. valid: (B, n) bool, real tokens. kernel_size: odd.
    """
    _check_kernel(kernel_size)
    scores = scores.masked_fill(~valid, -math.inf if pool == "max" else 0.0)
    if pool is not None:
        smooth = F.avg_pool1d if pool == "avg" else F.max_pool1d
        scores = smooth(scores[:, None], kernel_size, stride=1, padding=kernel_size // 2)[:, 0]
    return scores.masked_fill(~valid, -math.inf)


def choose_top(scores: Tensor, allowed: Tensor, counts: Tensor, forced: Tensor | None = None) -> Tensor:
    """(B, n) bool: the `counts` (B,) best of each row among `allowed` (B, n); ties to the lower position.

    A row with fewer allowed tokens keeps all of them. Tokens in `forced` (B, n) bool come before all others, the first
    ones first. Scores that are not a number rank last.
    """
    lowest = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=lowest, neginf=lowest)
    if forced is not None:
        scores = scores.masked_fill(forced, math.inf)
    order = ops.rank(scores.masked_fill(~allowed, -math.inf))
    chosen = torch.arange(order.shape[1], device=order.device) < counts.to(order.device)[:, None]
    return torch.zeros_like(allowed).scatter(1, order, chosen) & allowed


def covering_layer(
    probe: Probe,
    info: DecoderInfo,
    prompts: Tensor,
    needle_spans: Sequence[tuple[int, int]],
    k: float | int,
    share: float = 0.9,
    kernel_size: int = 5,
    pool: Pool | None = "avg",
) -> int | None:
    """The first layer whose selection covers a known needle: the paper's rule (its figure 5), None if there is none.

    Args:
        probe: ``probe(ids, layers)``, see `Probe`; called once, for all layers. info: the model in numbers.
        prompts: (P, n) int64 token ids, without padding. They end with what asks for the needle.
        needle_spans: for each prompt (start, stop), the positions start ... stop - 1 that must all be selected.
        k: tokens to select, a count or a fraction. share: part of the prompts whose needle a layer must cover.
        kernel_size, pool: as of `GemFilter`.

    Raises:
        InvalidParameterError: a span that does not lie in its prompt, or not one span a prompt.
    """
    share = check_fraction("share", share)
    covered = needle_coverage(probe, info, prompts, needle_spans, k, kernel_size, pool) == 1
    enough = covered.double().mean(dim=1) >= share - 1e-9
    return int(enough.long().argmax()) if bool(enough.any()) else None


def needle_coverage(
    probe: Probe,
    info: DecoderInfo,
    prompts: Tensor,
    needle_spans: Sequence[tuple[int, int]],
    k: float | int,
    kernel_size: int = 5,
    pool: Pool | None = "avg",
) -> Tensor:
    """(depth, P): the part of each prompt's needle that each layer's selection of k tokens covers.

    Args, Raises: as of `covering_layer`.
    """
    k = check_budget("k", k)
    count, n = prompts.shape
    if len(needle_spans) != count:
        raise InvalidParameterError(f"needle_spans: expected {count}, one for each prompt, got {len(needle_spans)}")
    needle = torch.zeros(count, n, dtype=torch.bool)
    for row, (start, stop) in enumerate(needle_spans):
        if not 0 <= start < stop <= n:
            raise InvalidParameterError(f"needle_spans[{row}]={(start, stop)}: expected 0 <= start < stop <= {n}")
        needle[row, start:stop] = True
    layers = range(info.depth)
    views = probe(prompts, layers)
    covered = []
    for layer in layers:
        view = views[layer]
        scores = pool_scores(prompt_scores(view.query, view.keys), view.valid, kernel_size, pool)
        chosen = choose_top(scores, view.valid, _budgets(k, view.valid.sum(dim=1))).cpu()
        covered.append((chosen & needle).sum(dim=1) / needle.sum(dim=1))
    return torch.stack(covered)


def _probe_prompts(vocabulary: int, kernel_size: int) -> tuple[Tensor, list[tuple[int, int]]] | None:
    """Probe prompts (P, n) and their needles; None for a vocabulary too small to have needles.

    Each prompt is random ids with a needle of distinct ids somewhere, and ends with the first ids of the needle, its
    cue. What must be selected is what follows the cue in the needle, as far as a window around the first id behind
    the cue reaches: a query that looks for what came next (an induction head) covers it, one that looks for ids like
    its own is a position short. No id of a needle stands anywhere else.
    """
    low, high = min(16, vocabulary // 8), vocabulary - vocabulary // 16  # special ids lie at both ends
    rest = min(kernel_size // 2 + 1, _PROBE_BUDGET)
    length = _CUE + rest
    if high - low <= length:
        return None
    rng = torch.Generator().manual_seed(0)
    room = _PROBE_LENGTH - 2 * _CUE - length  # before the needle; between it and the end stand as many ids as the cue
    prompts, spans = [], []
    for p in range(_PROBES):
        ids = low + torch.randperm(high - low, generator=rng)
        needle, others = ids[:length], ids[length:]
        start = room * (2 * p + 1) // (2 * _PROBES)
        prompt = others[torch.randint(len(others), (_PROBE_LENGTH,), generator=rng)]
        prompt[start : start + length] = needle
        prompt[-_CUE:] = needle[:_CUE]
        prompts.append(prompt)
        spans.append((start + _CUE, start + length))
    return torch.stack(prompts), spans


def _budgets(k: float | int, counts: Tensor) -> Tensor:
    """(B,) int64: tokens to keep of `counts` (B,): a count at most all of them, a fraction rounds up (at least 1)."""
    if isinstance(k, int):
        return counts.clamp_max(k)
    return torch.minimum((k * counts.double() - 1e-6).ceil().clamp_min(1).long(), counts)


def _budget(k: float | int, count: int) -> int:
    return int(_budgets(k, torch.tensor([count])))


def _check_kernel(kernel_size: object) -> None:
    if check_count("kernel_size", kernel_size, 1) % 2 == 0:  # type: ignore[operator]
        raise InvalidParameterError(f"kernel_size={kernel_size!r}: expected an odd number >= 1")


@dataclass(frozen=True, repr=False)
class GemFilter(PromptMethod):
    """Let layer r choose k tokens of a prompt, and the model read only these, as if they were the prompt.

    Follows SalesforceAIResearch/GemFilter at 5f79b1a in everything that decides which tokens stay, except that scores
    are float32 there where the released code has float16. The prompt goes through the first r layers; the query of its
    last token scores every position; the best ones, in their order, enter the model anew, with positions 0 ... k - 1.
    Nothing is kept by force, neither the first token nor the question.

    The first pass costs about r of the model's layers over the whole prompt. A prompt of at most k tokens goes on
    untouched; one that is not several times longer than k (or than 2,000 tokens) is a net loss of time.

    Attributes:
        k: tokens to keep: a count, or a fraction of each row's own tokens, rounded up. Paper: 1024, 2048, 4096.
        layer: r, 0-based. None is the paper's for the models that it names, recognised by name or shape (Llama-3.1-8B
            13, Mistral-Nemo 19, Phi-3.5-mini 19), and "auto" for others. "auto" measures it on needles planted in
            prompts of random ids: the first layer whose selection covers nearly as much of them as the best layer's.
            The rule is the paper's in spirit, the prompts are ours; where no layer does better than luck, 0.42 of the
            depth is taken, with a warning. `tokred.vlm.find_filter_layer` goes by the paper's words,
            on prompts of your own.
        kernel_size: of the pooling over neighbours, odd. pool: "avg" as released, "max" as the paper's prose says, or
            None.
        keep_first, keep_last: so many tokens at either end of the prompt stay in any case, as a part of k; where a
            fraction leaves less room than that, the first of them. Ours.
        scope: which tokens compete for k places: "all" (paper), or only "visual" or only "text" ones, and then all
            others stay on top. Ours.
        per_image: with scope "visual", k is of each image or video, not of all of a prompt's. Ours.
        positions: "compact" (own) or "original", see `PromptMethod`.
    """

    k: float | int = 1024
    layer: int | Literal["auto"] | None = None
    kernel_size: int = 5
    pool: Pool | None = "avg"
    keep_first: int = 0
    keep_last: int = 0
    scope: Literal["all", "visual", "text"] = "all"
    per_image: bool = False
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "gemfilter"
    title: ClassVar[str] = "GemFilter"
    paper: ClassVar[str] = (
        "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction "
        "(ACL Findings 2026, arXiv 2409.17422)"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_budget("k", self.k))
        if isinstance(self.layer, str) and self.layer != "auto":
            raise InvalidParameterError(f"layer={self.layer!r}: expected a 0-based layer, 'auto' or None")
        if self.layer is not None and self.layer != "auto":
            object.__setattr__(self, "layer", check_count("layer", self.layer))
        _check_kernel(self.kernel_size)
        check_choice("pool", self.pool, ("avg", "max", None))
        check_choice("scope", self.scope, ("all", "visual", "text"))
        check_choice("per_image", self.per_image, (False, True))
        check_choice("positions", self.positions, (None, "compact", "original"))
        ends = check_count("keep_first", self.keep_first) + check_count("keep_last", self.keep_last)
        if isinstance(self.k, int) and ends > self.k:
            raise InvalidParameterError(
                f"keep_first={self.keep_first} and keep_last={self.keep_last} are more than k={self.k}"
            )
        if self.per_image and self.scope != "visual":
            raise InvalidParameterError(f"per_image=True: expected scope='visual' with it, got scope={self.scope!r}")

    def filter_layer(self, info: DecoderInfo, probe: Probe) -> int:
        """r for this model, 0 ... depth - 1; always the same for the same model.

        Raises:
            LayerError: the model does not have the layer that was given.
        """
        if isinstance(self.layer, int):
            if self.layer >= info.depth:
                raise LayerError(
                    f"GemFilter: layer={self.layer}, but this model has {info.depth} layers (0 to {info.depth - 1})"
                )
            return self.layer
        published = _published_layer(info) if self.layer is None else None
        if published is not None:
            return published
        found = self._measured_layer(info, probe)
        if found is not None:
            return found
        guess = min(round(_GUESS * info.depth), info.depth - 1)
        warnings.warn(
            f"GemFilter: no layer of this model finds needles in prompts of random tokens; layer {guess} of "
            f"{info.depth} is a guess. Pass layer= to choose one.",
            UserWarning,
            stacklevel=2,
        )
        return guess

    def _measured_layer(self, info: DecoderInfo, probe: Probe) -> int | None:
        made = _probe_prompts(info.vocabulary, self.kernel_size)
        if made is None:
            return None
        covered = needle_coverage(probe, info, *made, _PROBE_BUDGET, self.kernel_size, self.pool).mean(dim=1)
        chance = _PROBE_BUDGET / _PROBE_LENGTH
        luck = chance + _SIGMAS * math.sqrt(chance * (1 - chance) / _PROBES)  # as if the ids of a needle went together
        if float(covered.max()) < luck:
            return None
        return int((covered >= _NEARLY * covered.max()).long().argmax())

    def bypasses(self, visual: int, text: int) -> bool:
        return self.kept(visual, text) == visual + text

    def choose(self, view: Prompt) -> Tensor:
        """(B, n) bool: what goes on (sections 3 and C.2 of the paper)."""
        scores = pool_scores(prompt_scores(view.query, view.keys), view.valid, self.kernel_size, self.pool)
        competing = {"all": view.valid, "visual": view.visual, "text": view.text}[self.scope]
        place = view.valid.cumsum(dim=1)
        ends = (place <= self.keep_first) | (place > place[:, -1:] - self.keep_last)
        pools = [competing]
        if self.per_image:
            images = view.media[competing].unique().tolist()
            pools = [competing & (view.media == image) for image in images]
        chosen = view.valid & ~competing
        for tokens in pools:
            chosen = chosen | choose_top(scores, tokens, _budgets(self.k, tokens.sum(dim=1)), ends & tokens)
        return chosen

    def kept(self, visual: int, text: int, images: Sequence[int] = ()) -> int:
        competing = {"all": visual + text, "visual": visual, "text": text}[self.scope]
        pools = images if self.per_image and images else (competing,)
        return sum(_budget(self.k, pool) for pool in pools) + visual + text - competing

    def scoring_macs(self, info: DecoderInfo, tokens: int) -> int:
        """One product for each entry of each key: queries that share a key are summed first."""
        return tokens * info.kv_heads * info.head_dim


def _published_layer(info: DecoderInfo) -> int | None:
    """The paper's layer for this model, None for a model that it does not name."""
    name, shape = info.name.lower(), (info.family, info.depth, info.dim, info.heads, info.vocabulary)
    for known in _PUBLISHED:
        named = any(part in name for part in known.names) and info.depth == known.shape[1]
        if named or shape == known.shape:
            return known.layer
    return None
