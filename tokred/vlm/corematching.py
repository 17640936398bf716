"""CoreMatching: tokens that match the core neurons of a prompt, MLPs of core neurons (arXiv 2505.19235, ICML 2025).

The neuron half is its forerunner CoreInfer (arXiv 2410.18311; counting as in wangqinsi1/CoreInfer at 38de332). The
released code (wangqinsi1/2025-ICML-CoreMatching at 046b24e) has neither half: it zeroes cached keys and values of image
tokens in 14 layers. The paper's method is the default here, the release is `preset="released"`. Where the paper leaves
a choice open (the base of the pruned layer, positions, early caches), the docstring of the option says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.budget import budget_tokens, check_budget, check_choice, check_count, check_layers, resolve_layers
from tokred.core.decoder import (
    CacheAfterPrefill,
    CacheCut,
    DecoderMethod,
    FeedForward,
    LayerNeeds,
    Neurons,
    PrefillLayer,
    Survivors,
)
from tokred.core.errors import InvalidParameterError, LayerError, RequestError
from tokred.core.sites import DecoderInfo
from tokred.vlm.core_neurons import above_knee, core_counts, core_neurons, match_scores, projections

__all__ = ["CoreMatching"]

Criterion = Literal["core_neurons", "ref_token", "attention", "projection"]

SCORE = "corematching_score"
CRITERIA = ("core_neurons", "ref_token", "attention", "projection")
#: the release acts while 5 < (number of layers that have a cache) < 20
RELEASED_LAYERS = tuple(range(5, 19))
#: fields that say nothing in one of the presets
ONLY_PAPER = ("rho", "beta", "prune_layer", "neuron_layers", "count", "per_image", "prune_early_cache", "batch_neurons")
ONLY_RELEASED = ("zero_layers",)


@dataclass(frozen=True, repr=False)
class CoreMatching(DecoderMethod):
    """Drop the visual tokens that share few active neurons with the whole prompt, and decode with its neurons only.

    In the prefill each layer counts for how many tokens each neuron is one of the largest activations; the most
    frequent ones are its core neurons C. After layer `prune_layer`, those visual tokens stay whose score
    ``S(j) = |Gamma(x_j) & C|`` reaches the knee of the sorted scores (equation 6). Until the next prefill, MLPs use C
    alone. How many tokens stay depends on the prompt.

    Attributes:
        preset: "paper"; or "released": no neurons, and in each of `zero_layers` by itself the cached keys and values
            of tokens that share few active neurons with one token of the prompt become zero, though they stay.
        rho: part of a token's positive activations that count, in (0, 1]. beta: part of the neurons that are core, in
            (0, 1]; 1 leaves every MLP whole.
        prune_layer: 0-based, the last layer that sees all tokens, at most depth - 2. The paper names "the second";
            whether it counts from 0 is not known to us. The authors' own figure of LLaVA-1.5-7B keeps nearly all tokens
            in some of the first layers, and those of the question from the sixth on: 5 ... 12 are worth a try.
        neuron_layers: where MLPs are reduced: "all", "coreinfer" (6 ... depth - 6, as CoreInfer released) or indices.
        count: "shared_limit" counts equally many activations of each token, as released by CoreInfer; "per_token" a
            part of its own, as its paper writes.
        criterion: score of a token at `prune_layer`: "core_neurons" (None, paper); "ref_token" (None, released), active
            neurons shared with the reference token; "attention", what the last token gives it, mean over heads;
            "projection", its part of the last token's attention output (before the output projection).
        ref_position: of "ref_token": place among the tokens of the prompt, negative from its end; or "last_text".
        inclusive: whether tokens at the threshold stay; None is True, and False in the released preset.
        knee: see `tokred.vlm.core_neurons.above_knee`.
        keep_tokens: a count or fraction of the visual tokens, best scores first, instead of the knee; 1.0 drops none,
            which leaves the sparse MLPs (CoreInfer).
        per_image: a knee (or `keep_tokens`) for each image or video instead of one for all.
        prune_early_cache: dropped tokens also leave the cache of layers 0 ... `prune_layer`, as the paper's words on
            memory suggest.
        batch_neurons: neurons in a batch: "per_sample", or "shared", of frequencies summed over the batch. Token
            scores always use a sample's own neurons.
        zero_layers: of the released preset, 0-based; None is 5 ... 18, as far as the model has them.
        positions: see `DecoderMethod`. "compact" also numbers new tokens by the entries in each layer's cache.
    """

    preset: Literal["paper", "released"] = "paper"
    rho: float = 0.2
    beta: float = 0.4
    prune_layer: int = 1
    neuron_layers: Literal["all", "coreinfer"] | tuple[int, ...] = "all"
    count: Literal["shared_limit", "per_token"] = "shared_limit"
    criterion: Criterion | None = None
    ref_position: int | Literal["last_text"] = -5
    inclusive: bool | None = None
    knee: Literal["absolute", "below"] = "absolute"
    keep_tokens: float | int | None = None
    per_image: bool = False
    prune_early_cache: bool = True
    batch_neurons: Literal["per_sample", "shared"] = "per_sample"
    zero_layers: tuple[int, ...] | None = None
    positions: Literal["compact", "original"] | None = None

    name: ClassVar[str] = "corematching"
    title: ClassVar[str] = "CoreMatching"
    paper: ClassVar[str] = "CoreMatching: A Co-adaptive Sparse Inference Framework (ICML 2025, arXiv 2505.19235)"
    sites: ClassVar[tuple[str, ...]] = ("FeedForward", "PrefillLayer", "CacheAfterPrefill")
    refuses: ClassVar[Mapping[str, str]] = {
        "use_cache=False": "core neurons and tokens are those of the prompt, and without a cache each new token would "
        "be a new prompt",
        "assistant_model": "candidates are checked several at a time and the cache is cut back by prompt length, but "
        "pruned prompts have fewer entries there",
        "prompt_lookup_num_tokens": "candidates are checked several at a time and the cache is cut back by prompt "
        "length, but pruned prompts have fewer entries there",
        "prefill_chunk_size": "frequencies and threshold are those of the whole prompt, which must come in one piece",
        "past_key_values": "frequencies and threshold are those of the whole prompt, so its cache must start empty",
        "training": "tokens and neurons are chosen for inference; call model.eval() first",
        "labels": "logits of dropped tokens do not exist, so labels have nothing to be compared with",
    }

    def __post_init__(self) -> None:
        self._check_choices()
        for field in ("rho", "beta"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
                raise InvalidParameterError(f"{field}={value!r}: expected a number in (0, 1]")
            object.__setattr__(self, field, float(value))
        object.__setattr__(self, "prune_layer", check_count("prune_layer", self.prune_layer))
        if self.ref_position != "last_text" and (
            isinstance(self.ref_position, bool) or not isinstance(self.ref_position, Integral)
        ):
            raise InvalidParameterError(f"ref_position={self.ref_position!r}: expected an integer or 'last_text'")
        if isinstance(self.neuron_layers, str):
            check_choice("neuron_layers", self.neuron_layers, ("all", "coreinfer"))
        else:
            object.__setattr__(self, "neuron_layers", check_layers("neuron_layers", self.neuron_layers))
        if self.zero_layers is not None:
            object.__setattr__(self, "zero_layers", check_layers("zero_layers", self.zero_layers))
        if self.keep_tokens is not None:
            object.__setattr__(self, "keep_tokens", check_budget("keep_tokens", self.keep_tokens))
        self._check_combination()

    def _check_choices(self) -> None:
        check_choice("preset", self.preset, ("paper", "released"))
        check_choice("count", self.count, ("shared_limit", "per_token"))
        check_choice("criterion", self.criterion, (None, *CRITERIA))
        check_choice("inclusive", self.inclusive, (None, True, False))
        check_choice("knee", self.knee, ("absolute", "below"))
        check_choice("per_image", self.per_image, (True, False))
        check_choice("prune_early_cache", self.prune_early_cache, (True, False))
        check_choice("batch_neurons", self.batch_neurons, ("per_sample", "shared"))
        check_choice("positions", self.positions, (None, "compact", "original"))

    def _check_combination(self) -> None:
        """Refuse options that would have no effect."""
        idle = ONLY_RELEASED if self.preset == "paper" else ONLY_PAPER
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in idle and value != field.default:
                raise InvalidParameterError(f"{field.name}={value!r}: preset={self.preset!r} makes no use of it")
        if self.preset == "released" and self.criterion not in (None, "ref_token"):
            raise InvalidParameterError(
                f"criterion={self.criterion!r}: preset='released' compares with a reference token, 'ref_token'"
            )
        if self.ref_position != -5 and self._criterion != "ref_token":
            raise InvalidParameterError(f"ref_position={self.ref_position!r}: only criterion='ref_token' reads it")
        if self.keep_tokens is not None and (self.inclusive is not None or self.knee != "absolute"):
            raise InvalidParameterError("keep_tokens stands in for the knee: give no inclusive= and no knee= with it")

    # -- where -------------------------------------------------------------------------------------------------------

    @property
    def decode_position(self) -> Literal["logical", "cache_length"]:  # type: ignore[override]
        return "cache_length" if self.positions == "compact" else "logical"

    def acts_at(self, offered: Sequence[str]) -> tuple[str, ...]:
        if self.preset == "released":
            return ("FeedForward", "CacheAfterPrefill")
        return ("FeedForward", "PrefillLayer") if self._reads_neurons or self.beta < 1 else ("PrefillLayer",)

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        if self.preset == "released":
            return {}
        if self.prune_layer > info.depth - 2:
            raise LayerError(
                f"CoreMatching: prune_layer={self.prune_layer} is the last layer that sees all tokens, so it can be at "
                f"most {info.depth - 2} in a model of {info.depth} layers"
            )
        if self._keeps_all:
            return {}
        return {self.prune_layer + 1: LayerNeeds(previous=not self._reads_neurons)}

    def sparse_layers(self, info: DecoderInfo) -> frozenset[int]:
        return self._scored_layers(info) | self._reduced_layers(info)

    def cuts_cache(self, info: DecoderInfo) -> bool:
        return self.preset == "released"

    @property
    def _keeps_all(self) -> bool:
        """Whether no token is ever dropped: the integer 1 is one token, the float all of them."""
        return isinstance(self.keep_tokens, float) and self.keep_tokens == 1.0

    @property
    def _criterion(self) -> Criterion:
        return self.criterion or ("core_neurons" if self.preset == "paper" else "ref_token")

    @property
    def _reads_neurons(self) -> bool:
        return self._criterion in ("core_neurons", "ref_token")

    @property
    def _inclusive(self) -> bool:
        return self.preset == "paper" if self.inclusive is None else self.inclusive

    def _scored_layers(self, info: DecoderInfo) -> frozenset[int]:
        """Layers whose activations score tokens."""
        if self.preset == "released":
            return frozenset(
                resolve_layers("zero_layers", self.zero_layers, RELEASED_LAYERS, info.depth, "CoreMatching")
            )
        return frozenset({self.prune_layer}) if self._reads_neurons else frozenset()

    def _reduced_layers(self, info: DecoderInfo) -> frozenset[int]:
        """Layers whose MLP decodes with its core neurons."""
        if self.preset == "released" or self.beta == 1:
            return frozenset()
        if self.neuron_layers == "all":
            return frozenset(range(info.depth))
        if self.neuron_layers != "coreinfer":
            return frozenset(resolve_layers("neuron_layers", self.neuron_layers, (), info.depth, "CoreMatching"))
        if info.depth < 12:
            raise LayerError(
                f"CoreMatching: neuron_layers='coreinfer' leaves out the first 6 and the last 5 layers, and this model "
                f"has {info.depth}; name the layers in neuron_layers="
            )
        return frozenset(range(6, info.depth - 5))

    # -- answers -----------------------------------------------------------------------------------------------------

    def neurons(self, view: FeedForward) -> Neurons | None:
        activations, valid = view.activations.detach(), view.valid
        scored = view.layer in self._scored_layers(view.info)
        reduced = view.layer in self._reduced_layers(view.info)
        active, marks = None, {}
        if reduced or (scored and self._criterion == "core_neurons"):
            counts = core_counts(activations, valid, self.rho, self.count)
            own = core_neurons(counts, self.beta)
            if scored and self._criterion == "core_neurons":
                marks[SCORE] = match_scores(activations, valid, own)
            if reduced and self.batch_neurons == "shared":
                active = core_neurons(counts.sum(dim=0, keepdim=True), self.beta).expand_as(own)
            elif reduced:
                active = own
        if scored and self._criterion == "ref_token":
            rows = torch.arange(len(valid), device=valid.device)
            reference = activations[rows, self._reference(view)] > 0
            marks[SCORE] = match_scores(activations, valid, reference)
        return Neurons(active, marks) if reduced or scored else None

    def prune(self, view: PrefillLayer) -> Survivors | None:
        if self._reads_neurons:
            scores = view.marks[SCORE]
        else:
            attention = view.attention_rows(view.last)[:, :, 0]  # (B, H, T)
            scores = attention.mean(dim=1) if self._criterion == "attention" else projections(attention, view.values())
        kept = self._kept(scores, view.visual, view.media if self.per_image else None)
        if torch.equal(kept, view.visual):
            return None
        return Survivors(kept | view.text, cut_earlier_cache=self.prune_early_cache)

    def cuts_early(self, info: DecoderInfo) -> bool:
        return self.preset == "paper" and self.prune_early_cache and not self._keeps_all

    def cut_cache(self, view: CacheAfterPrefill) -> CacheCut | None:
        zero = {}
        for layer in sorted(self._scored_layers(view.info)):
            if SCORE in view.marks.get(layer, {}):
                visual = view.visual[layer]
                zero[layer] = visual & ~self._kept(view.marks[layer][SCORE], visual)
        return CacheCut(zero=zero) if any(dropped.any() for dropped in zero.values()) else None

    def _reference(self, view: FeedForward) -> Tensor:
        """(B,) int64: the place of each row's reference token; any where nothing can be pruned."""
        tokens, position = (view.text, -1) if self.ref_position == "last_text" else (view.valid, self.ref_position)
        assert isinstance(position, int)
        count = tokens.sum(dim=1)
        wanted = torch.full_like(count, position) if position >= 0 else count + position
        outside = ((wanted < 0) | (wanted >= count)) & view.visual.any(dim=1)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise RequestError(
                f"CoreMatching: ref_position={self.ref_position!r} names no token of prompt {row}, which has "
                f"{int(count[row])} to choose from"
            )
        return (tokens & (tokens.cumsum(dim=1) - 1 == wanted[:, None])).long().argmax(dim=1)

    def _kept(self, scores: Tensor, visual: Tensor, media: Tensor | None = None) -> Tensor:
        """(B, T) bool: the visual tokens that stay, by scores (B, T); with `media`, chosen in each by itself."""
        kept = torch.zeros_like(visual)
        for row, of_row in enumerate(visual):
            groups = [of_row] if media is None else [of_row & (media[row] == i) for i in media[row][of_row].unique()]
            for group in groups:
                places = group.nonzero()[:, 0]
                kept[row, places] = self._chosen(scores[row, places])
        return kept

    def _chosen(self, scores: Tensor) -> Tensor:
        """(N,) bool, by scores (N,)."""
        if self.keep_tokens is None:
            return above_knee(scores, self._inclusive, self.knee)
        best = ops.top_indices(scores[None], budget_tokens(self.keep_tokens, len(scores)))[0]
        return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, best, True)

    # -- cost --------------------------------------------------------------------------------------------------------

    def entering(self, info: DecoderInfo, visual: int, kept: int | None = None) -> tuple[int, ...]:
        """See `DecoderMethod`.

        Raises:
            InvalidParameterError: `kept` is missing where the count depends on the input, or is above `visual`.
        """
        if not self.layers(info):
            return (visual,) * info.depth
        if kept is None and self.keep_tokens is not None and not self.per_image:
            kept = budget_tokens(self.keep_tokens, visual)
        if kept is None and visual:
            raise InvalidParameterError(
                "CoreMatching: how many tokens stay depends on the input; give kept= (the authors show 64 of 576; in "
                'tokred.flops it is "kept_tokens" among the sizes), or fix it with keep_tokens='
            )
        kept = kept or 0
        if not 0 <= kept <= visual:
            raise InvalidParameterError(f"kept={kept}: expected 0 to {visual}, the visual tokens of the prompt")
        whole = self.prune_layer + 1
        return (visual,) * whole + (kept,) * (info.depth - whole)

    def scoring_macs(self, info: DecoderInfo, entering: Sequence[int], text: int) -> int:
        """See `DecoderMethod`; finding the largest activations multiplies nothing, though it takes time."""
        if self.preset == "released":
            return sum(entering[layer] * info.neurons for layer in self._scored_layers(info))
        visual = entering[self.prune_layer]
        if self._reads_neurons:
            return visual * (int(self.beta * info.neurons) if self._criterion == "core_neurons" else info.neurons)
        # the last token's row; then its output and the product of each value with it
        return (1 if self._criterion == "attention" else 3) * (visual + text) * info.width

    def cached(self, info: DecoderInfo, entering: Sequence[int]) -> tuple[int, ...]:
        """See `DecoderMethod`; what the released preset makes zero stays."""
        if not self.layers(info) or not self.prune_early_cache:
            return tuple(entering)
        return tuple(min(tokens, entering[self.prune_layer + 1]) for tokens in entering)

    def decode_macs(self, info: DecoderInfo) -> int:
        """Multiply-adds of the weights of all layers for one new token, at most: floor(beta I) neurons where reduced.

        With rho and beta of the paper a Llama layer falls from 202 to 121 million, 1.67 times less: decoding gains no
        more than that on a device that holds the model.
        """
        core = int(self.beta * info.neurons)
        saved = info.mlp_macs - info.mlp_macs * core // info.neurons
        return info.depth * info.layer_macs - len(self._reduced_layers(info)) * saved
