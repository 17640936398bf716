"""MustDrop: tokens go in the vision encoder, in the prefill and from the KV cache (arXiv 2411.10803).

Written from the released code, liuting20/MustDrop at 909afa5: its paper was out of reach, so no equation is quoted.
Sections are those of our notes on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred import ops
from tokred.core.budget import check_choice, check_count, check_layers, resolve_layers
from tokred.core.carried import CarriedTokens
from tokred.core.decoder import CacheAfterPrefill, CacheCut, DecoderMethod, LayerNeeds, PrefillLayer, Survivors
from tokred.core.errors import InvalidParameterError, LayerError, LayoutError
from tokred.core.method import EncoderMethod, keep_top
from tokred.core.sites import DecoderInfo, EncoderBlock, EncoderInfo
from tokred.core.tokens import Keep, Merge
from tokred.vlm.select import check_share

__all__ = [
    "KEY_MARK",
    "MustDrop",
    "WindowMerge",
    "cache_survivors",
    "filter_tokens",
    "merge_windows",
    "text_attention",
    "window_similarity",
]

Order = Literal["official", "raster"]
Rule = Literal["merge", "key"]

#: mark of the tokens that the filter never drops
KEY_MARK = "mustdrop_key"
#: (global, individual) thresholds of the released scripts for LLaVA-1.5-7B, by the token count that names them
PRESETS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}
#: without a preset, as released: nothing is below an individual threshold of 0
NO_FILTER = (1.0, 0.0)
STAGES = ("encoder", "prefill", "decode")
#: entries of attention that are formed at once
_ENTRIES = 2**25


# -- stage 1: windows and key tokens in the vision encoder (section 2) -------------------------------------------------


def window_similarity(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, W) float32 (float64 of float64): mean cosine between two different tokens of each window.

    ``S = (|sum_a u_a|^2 - sum_a |u_a|^2) / (m (m - 1))`` with u the unit vectors of the m tokens of a window.

    Args:
        x: (B, rows * columns, C), tokens in raster order. grid: (rows, columns), divisible by `window`.
        window: (height, width) in tokens, m of them; windows do not overlap and count in raster order.
    """
    (rows, columns), (height, width) = grid, window
    u = F.normalize(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-8)
    u = u.unflatten(1, (rows // height, height, columns // width, width))
    squares = u.sum(dim=(2, 4)).square().sum(dim=-1) - u.square().sum(dim=(2, 4, 5))
    m = height * width
    return squares.flatten(1) / (m * (m - 1))


def merge_windows(
    similarity: Tensor, counts: Tensor, grid: tuple[int, int], window: tuple[int, int], order: Order = "official"
) -> Merge | None:
    """Merge the most similar windows of each image into one token each; None where no image merges any.

    Args:
        similarity: (B, W), as of `window_similarity`; ties go to the lower window, what is not a number comes last.
        counts: (B,) int64, how many windows each image merges.
        order: of the tokens that result: merged windows from the most similar on, then the others in raster order
            ("official", the order that the language model reads), or all by their first cell ("raster").

    Returns:
        A `Merge` of (B, N) tokens. Images that are left with fewer tokens than others are padded at the end.
    """
    (rows, columns), (height, width) = grid, window
    device, batch, n, m = similarity.device, similarity.shape[0], rows * columns, height * width
    most, fewest = (int(count) for count in torch.stack([counts.max(), counts.min()]).tolist())
    if most == 0:
        return None
    cell = torch.arange(n, device=device)
    y, x = cell // columns, cell % columns
    own = y // height * (columns // width) + x // width  # (N,) the window of each token
    first = y // height * height * columns + x // width * width  # (N,) the first token of its window
    place = ops.rank(similarity).argsort(dim=1)  # (B, W) of each window among the windows of its image
    merged = (place < counts[:, None])[:, own]
    head = torch.where(merged, first, cell)  # (B, N) the token that lends its place
    if order == "raster":
        slot = (head == cell).cumsum(dim=1) - 1
    else:
        slot = torch.where(merged, place[:, own], counts[:, None] + (~merged).cumsum(dim=1) - 1)
    assignment = slot.gather(1, head)
    representative = assignment.new_zeros(batch, n - fewest * (m - 1)).scatter(1, assignment, head)
    if most == fewest:
        return Merge(assignment, representative)
    slots = torch.arange(representative.shape[1], device=device)
    return Merge(assignment, representative, valid=slots < n - counts[:, None] * (m - 1))


@dataclass(frozen=True, repr=False)
class WindowMerge(EncoderMethod):
    """What `MustDrop` does inside a vision encoder; its fields say what they mean.

    Attributes:
        common: every image of a batch merges as many windows as the one with the fewest (released code).
    """

    merge_layer: int = 0
    window: tuple[int, int] = (3, 3)
    spatial_threshold: float = 0.8
    key_rate: float = 0.08
    order: Order = "official"
    retained_tokens: int | None = None
    common: bool = False

    name: ClassVar[str] = "mustdrop"
    title: ClassVar[str] = "MustDrop, vision encoder"
    paper: ClassVar[str] = "Multi-Stage Vision Token Dropping (arXiv 2411.10803)"
    listed: ClassVar[bool] = False

    def bind(self, info: EncoderInfo) -> dict[int, Rule]:
        rules: dict[int, Rule] = {}
        if self.spatial_threshold <= 1 or self.retained_tokens is not None:
            rules[resolve_layers("merge_layer", (self.merge_layer,), (), info.depth, "MustDrop")[0]] = "merge"
        if self.key_rate > 0:
            last = info.depth - 1
            if last in rules:
                raise LayerError(
                    f"MustDrop: merge_layer={last} is the last block of this vision encoder, which chooses the key "
                    "tokens among merged ones; merge in an earlier block, or choose none (key_rate=0)"
                )
            rules[last] = "key"
        return rules

    def count(self, tokens: int, rule: Rule) -> int:
        """Tokens that remain: how many windows are similar depends on the image, so none without `retained_tokens`."""
        return tokens - self._forced(tokens) * (self._area - 1) if rule == "merge" else tokens

    def acts(self, tokens: int, rule: Rule) -> bool:
        return True

    def reduce(self, view: EncoderBlock, rule: Rule) -> Merge | None:
        if rule == "key":
            kept = self.key_tokens(view)
            chosen = torch.zeros(view.tokens.shape[0], view.count, dtype=torch.bool, device=view.tokens.device)
            real = torch.ones_like(kept.indices, dtype=torch.bool) if kept.valid is None else kept.valid
            view.mark(KEY_MARK, chosen.scatter(1, kept.indices, real))
            return None
        grid = self._grid(view)
        similarity = window_similarity(view.tokens[:, view.prefix :], grid, self.window)
        if self.retained_tokens is not None:
            counts = torch.full_like(similarity[:, 0], self._forced(view.count), dtype=torch.long)
        else:
            counts = (similarity >= self.spatial_threshold).sum(dim=1)
        if self.common:
            counts = counts.amin().expand_as(counts)
        return merge_windows(similarity, counts, grid, self.window, self.order)

    def key_tokens(self, view: EncoderBlock) -> Keep:
        """The ceil(key_rate N') of the N' tokens of each image with most attention of the class token, mean over heads.

        Without a class token (ours): of all tokens.
        """
        scores = view.attention_mass() if view.info.class_tokens == 0 else view.class_attention()
        return keep_top(view, scores.mean(dim=1), lambda n: math.ceil(self.key_rate * n))

    def cost(self, info: EncoderInfo, tokens: int, rule: Rule) -> int:
        if rule == "merge":
            return 2 * tokens * info.dim  # lengths of the tokens, and of their sums
        queries = 1 if info.class_tokens else tokens + info.prefix
        return queries * (tokens + info.prefix) * info.heads * info.head_dim

    @property
    def _area(self) -> int:
        return self.window[0] * self.window[1]

    def _forced(self, tokens: int) -> int:
        """Windows that `retained_tokens` merges: ``(1 + N - T) // (m - 1)``, as far as there are any."""
        if self.retained_tokens is None:
            return 0
        return min(max((1 + tokens - self.retained_tokens) // (self._area - 1), 0), tokens // self._area)

    def _grid(self, view: EncoderBlock) -> tuple[int, int]:
        grid, (height, width) = view.table.grid, self.window
        if grid is None or grid[0] * grid[1] != view.count or view.table.steps:
            raise LayoutError(
                f"MustDrop: windows of {height} x {width} need the whole grid of patch tokens, but the {view.count} "
                f"tokens after block {view.layer} {'no longer form one' if view.table.steps else 'form none'}; "
                "spatial_threshold=2 merges nothing"
            )
        if grid[0] % height or grid[1] % width:
            raise InvalidParameterError(
                f"window={self.window!r}: the grid of {grid[0]} x {grid[1]} patch tokens is no multiple of it; pass "
                "another window, or spatial_threshold=2 to merge nothing"
            )
        return grid


# -- stage 2: dual-attention filtering (section 3) ---------------------------------------------------------------------


def text_attention(attention: Tensor, asked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Global and individual scores, both (B, T) float32: mean over heads, then the sum over queries and the largest.

    Args:
        attention: (B, H, R, T), softmax over all keys, of text queries. asked: (B, R) bool, False for no query at all.
    """
    mean = attention.to(torch.promote_types(attention.dtype, torch.float32)).mean(dim=1)
    if asked is not None:
        mean = mean.masked_fill(~asked[:, :, None], 0)
    return mean.sum(dim=1), mean.amax(dim=1)


def filter_tokens(
    global_score: Tensor,
    individual_score: Tensor,
    prunable: Tensor,
    global_threshold: float,
    individual_threshold: float,
    key: Tensor | None = None,
) -> Tensor:
    """(B, T) bool: tokens that stay.

    Of those that are `prunable`, j goes if ``g_j < gamma sum_i g_i`` and ``u_j < alpha`` and it is no key token; the
    sum runs over all prunable ones.

    Args:
        global_score, individual_score: (B, T), g and u as of `text_attention`. prunable, key: (B, T) bool.
    """
    total = global_score.masked_fill(~prunable, 0).sum(dim=1, keepdim=True)
    ignored = (global_score < global_threshold * total) & (individual_score < individual_threshold)
    if key is not None:
        ignored = ignored & ~key
    return ~(prunable & ignored)


# -- stage 3: the cache (section 4) ------------------------------------------------------------------------------------


def cache_survivors(columns: Sequence[Tensor], valid: Sequence[Tensor], visual: Sequence[Tensor]) -> list[Tensor]:
    """For each layer (B, T_l) bool: the entries whose column the last layer still has, and those that are not visual.

    Args:
        columns: for each layer (B, T_l) int64. valid, visual: for each layer (B, T_l) bool.
    """
    outside = max(int(one.max()) for one in columns if one.numel()) + 1
    left = torch.where(valid[-1], columns[-1], outside)
    present = left.new_zeros(left.shape[0], outside + 1, dtype=torch.bool).scatter(1, left, True)
    present[:, outside] = False
    return [
        present.gather(1, torch.where(real, own, outside)) | (real & ~seen)
        for own, real, seen in zip(columns, valid, visual, strict=True)
    ]


# -- the method --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class MustDrop(DecoderMethod):
    """Merge alike windows in the vision encoder, drop what the text ignores in the prefill, cut the cache for decoding.

    Stage 1: after encoder block `merge_layer`, windows of mean cosine >= tau become one token, their mean; tokens that
    the class token attends to in the last block are key tokens. Stage 2: after four layers of the language model,
    tokens that get little attention of the text behind the image, globally and from each text token, are dropped, key
    tokens never. Stage 3: after the prefill, every layer from the first of these on keeps only what survived them all.

    All counts depend on the data. Those that presets are named after are averages over layers (each counted as its
    pruning leaves it) over a benchmark, reported for LLaVA-1.5-7B; thresholds for other models were not published.

    Attributes:
        preset: 192, 128 or 64, the thresholds of the released scripts; None drops nothing in the prefill unless
            thresholds are given.
        official: the released code: all images of a batch merge as many windows as the one with the fewest; tiles
            follow each other unpadded, without row ends; only the first image of a prompt loses tokens to the filter,
            and later ones vote as text; `decode_position` "cache_length". Not its crashes (no text behind the image).
        global_threshold: gamma >= 0, a share of the attention to all visual tokens present. None is the preset's.
        individual_threshold: alpha >= 0, an attention weight. None is the preset's.
        pruning_layers: 0-based layers of the language model, after which the filter acts, with their attention. None
            is the released (2, 6, 10, 14), as far as the model has them.
        window: (height, width) in tokens, of which the encoder's grid must be a multiple.
        spatial_threshold: tau; above 1 nothing is merged, at -1 everything.
        merge_layer: 0-based encoder block after which windows are merged.
        key_rate: in [0, 1], key tokens of an image, as a share of its tokens after merging, rounded up.
        order: of the tokens behind the encoder: merged windows from the most similar on, then the others ("official"),
            or all in raster order ("raster", ours).
        retained_tokens: T, instead of tau: the ``(1 + N - T) // (m - 1)`` most similar windows of m tokens are merged,
            which leaves about T of N tokens, and exactly 192, 128 or 64 of 576 (LightCompress).
        decode_position: see `DecoderMethod`; None is "cache_length" if `official`, else "logical". Positions by
            "cache_length" disagree with those of the older entries of a cut layer.
        stages: those that act, of "encoder", "prefill" and "decode". "decode" without "prefill" cuts the cache to what
            another method left at the last layer. Key tokens are of the encoder's stage, and of use in the prefill's.
        positions: see `DecoderMethod`.
    """

    preset: Literal[192, 128, 64] | None = 192
    official: bool = False
    global_threshold: float | None = None
    individual_threshold: float | None = None
    pruning_layers: Sequence[int] | None = None
    window: tuple[int, int] = (3, 3)
    spatial_threshold: float = 0.8
    merge_layer: int = 0
    key_rate: float = 0.08
    order: Order = "official"
    retained_tokens: int | None = None
    decode_position: Literal["logical", "cache_length"] | None = None  # type: ignore[assignment]
    stages: Sequence[str] = STAGES
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "mustdrop"
    title: ClassVar[str] = "MustDrop"
    paper: ClassVar[str] = "Multi-Stage Vision Token Dropping (arXiv 2411.10803)"
    without_encoder: ClassVar[str] = 'stages=("prefill", "decode")'
    sites: ClassVar[tuple[str, ...]] = ("EncoderBlock", "VisualFeatures", "PrefillLayer", "CacheAfterPrefill")
    own_positions: ClassVar[Literal["compact", "original"]] = "compact"
    default_layers: ClassVar[tuple[int, ...]] = (2, 6, 10, 14)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, (None, *PRESETS))
        for field in ("global_threshold", "individual_threshold"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, _number(field, getattr(self, field), minimum=0))
        if self.pruning_layers is not None:
            object.__setattr__(self, "pruning_layers", check_layers("pruning_layers", self.pruning_layers))
        object.__setattr__(self, "window", _window(self.window))
        object.__setattr__(self, "spatial_threshold", _number("spatial_threshold", self.spatial_threshold))
        check_count("merge_layer", self.merge_layer)
        check_share("key_rate", self.key_rate)
        check_choice("order", self.order, ("official", "raster"))
        if self.retained_tokens is not None:
            check_count("retained_tokens", self.retained_tokens, minimum=1)
        check_choice("decode_position", self.decode_position, (None, "logical", "cache_length"))
        check_choice("positions", self.positions, (None, "compact", "original"))
        object.__setattr__(self, "stages", _stages(self.stages))

    def thresholds(self) -> tuple[float, float]:
        """(gamma, alpha): as given, else the preset's."""
        gamma, alpha = NO_FILTER if self.preset is None else PRESETS[self.preset]
        return (
            gamma if self.global_threshold is None else self.global_threshold,
            alpha if self.individual_threshold is None else self.individual_threshold,
        )

    @property
    def own_decode_position(self) -> Literal["logical", "cache_length"]:
        """What `decode_position` None stands for."""
        return "cache_length" if self.official else "logical"

    @property
    def filters(self) -> bool:
        """Whether the prefill can lose any token: scores are not negative, so thresholds of 0 drop none."""
        return "prefill" in self.stages and min(self.thresholds()) > 0

    # -- what the host asks --------------------------------------------------------------------------------------------

    def acts_at(self, offered: Sequence[str]) -> tuple[str, ...]:
        inside = {"encoder": self.sites[:2], "prefill": self.sites[2:3], "decode": self.sites[3:]}
        return tuple(site for stage in self.stages for site in inside[stage])

    def encoder_part(self) -> WindowMerge | None:
        if "encoder" not in self.stages:
            return None
        return WindowMerge(
            merge_layer=self.merge_layer,
            window=self.window,
            spatial_threshold=self.spatial_threshold,
            key_rate=self.key_rate if self.filters else 0.0,
            order=self.order,
            retained_tokens=self.retained_tokens,
            common=self.official,
        )

    def visual_part(self) -> CarriedTokens | None:
        return CarriedTokens(flat=self.official, positions=self.positions) if "encoder" in self.stages else None

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        return {layer + 1: LayerNeeds(previous=True) for layer in self._pruning_layers(info)}

    def prune(self, view: PrefillLayer) -> Survivors | None:
        prunable, asked = self._parties(view)
        scores = _scores(view, asked)
        if scores is None:
            return None
        return Survivors(filter_tokens(*scores, prunable, *self.thresholds(), view.marks.get(KEY_MARK)))

    def cuts_cache(self, info: DecoderInfo) -> bool:
        return "decode" in self.stages

    def cut_cache(self, view: CacheAfterPrefill) -> CacheCut | None:
        counts = torch.stack([valid.sum(dim=1) for valid in view.valid]).cpu()  # (L, B)
        if self.filters:
            first = self._pruning_layers(view.info)[0]
        else:  # the layer before the first that is shorter: what dropped tokens acted behind it
            shorter = (counts < counts[0]).any(dim=1).tolist()
            first = shorter.index(True) - 1 if True in shorter else len(shorter)
        longer = (counts > counts[-1]).any(dim=1).tolist()
        cut = [layer for layer in range(first, len(longer)) if longer[layer]]
        if not cut:
            return None
        kinds = (view.columns, view.valid, view.visual)
        keep = cache_survivors(*([kind[layer] for layer in (*cut, -1)] for kind in kinds))
        return CacheCut(dict(zip(cut, keep, strict=False)))

    def entering(self, info: DecoderInfo, visual: int, kept: int | None = None) -> tuple[int, ...]:
        """Visual tokens that enter each layer, as if the first filter dropped all that are dropped.

        Raises:
            InvalidParameterError: no `kept`; how many tokens each filter drops depends on the prompt.
        """
        layers = self._pruning_layers(info)
        if not layers:
            return (visual,) * info.depth
        if kept is None:
            raise InvalidParameterError(
                "MustDrop drops by thresholds, so how many visual tokens are left depends on the input; give kept=, "
                'the number behind the last filter (a patch\'s trace has it; in tokred.flops it is "kept_tokens" '
                "among the sizes)"
            )
        whole = layers[0] + 1
        return (visual,) * whole + (min(kept, visual),) * (info.depth - whole)

    def scoring_macs(self, info: DecoderInfo, entering: Sequence[int], text: int) -> int:
        """At each filter all text queries (those before the image, which are not asked, too) meet all keys."""
        return sum(text * (entering[layer] + text) * info.width for layer in self._pruning_layers(info))

    def cached(self, info: DecoderInfo, entering: Sequence[int]) -> tuple[int, ...]:
        """Visual tokens of each layer's cache: of the last layer's, from the first that is cut on."""
        if "decode" not in self.stages:
            return tuple(entering)
        if self.filters:
            first = self._pruning_layers(info)[0]
        else:
            first = next((layer - 1 for layer, tokens in enumerate(entering) if tokens < entering[0]), info.depth)
        return tuple(tokens if layer < first else entering[-1] for layer, tokens in enumerate(entering))

    # -- the rule ------------------------------------------------------------------------------------------------------

    def _pruning_layers(self, info: DecoderInfo) -> tuple[int, ...]:
        layers = resolve_layers("pruning_layers", self.pruning_layers, self.default_layers, info.depth, "MustDrop")
        return layers if self.filters else ()

    def _parties(self, view: PrefillLayer) -> tuple[Tensor, Tensor]:
        """(B, T) bool: which tokens can go, and which are asked: those of the text behind the first visual token."""
        begun = view.visual.cumsum(dim=1) > 0
        if not self.official:
            return view.visual, view.text & (view.media < 0) & begun  # row ends are no text
        first = view.media.gather(1, view.visual.to(torch.uint8).argmax(dim=1, keepdim=True))
        return view.visual & (view.media == first), view.valid & (view.media != first) & begun


def _scores(view: PrefillLayer, asked: Tensor) -> tuple[Tensor, Tensor] | None:
    """`text_attention` of the tokens that `asked` (B, T) marks, a part of the queries at a time; None without any."""
    count = int(asked.sum(dim=1).max())
    if count == 0:
        return None
    rows = ops.rank(asked.to(torch.uint8))[:, :count]
    real = asked.gather(1, rows)
    step = max(_ENTRIES // (asked.numel() * max(view.info.heads, 1)), 1)
    total, largest = text_attention(view.attention_rows(rows[:, :step]), real[:, :step])
    for start in range(step, count, step):
        part = slice(start, start + step)
        more = text_attention(view.attention_rows(rows[:, part]), real[:, part])
        total, largest = total + more[0], torch.maximum(largest, more[1])
    return total, largest


def _number(field: str, value: object, minimum: float = -math.inf) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < minimum:  # type: ignore[operator]
        bound = "" if minimum == -math.inf else f" >= {minimum}"
        raise InvalidParameterError(f"{field}={value!r}: expected a finite number{bound}")
    return float(value)  # type: ignore[arg-type]


def _window(value: object) -> tuple[int, int]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise InvalidParameterError(f"window={value!r}: expected (height, width) in tokens, e.g. (3, 3)")
    height, width = (check_count("window", side, minimum=1) for side in value)
    if height * width < 2:
        raise InvalidParameterError(f"window={value!r}: expected two tokens or more; spatial_threshold=2 merges none")
    return height, width


def _stages(value: object) -> tuple[str, ...]:
    named = () if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
    if not named or len(set(named)) < len(named) or not set(named) <= set(STAGES):
        raise InvalidParameterError(f"stages={value!r}: expected some of {', '.join(map(repr, STAGES))}, each once")
    return tuple(stage for stage in STAGES if stage in named)
