"""TokenFlow's generator: a language model that writes the codes of a picture scale by scale, from coarse to fine.

Qu et al., TokenFlow, arXiv 2412.03069, and the released code, which is followed where they differ.
After a prompt, one pass of the model gives all codes of the next scale at once: the last word of the prompt predicts
the 1x1 scale, and what is read at the places of scale k is the sum of the scales before it, resized to s_k x s_k and
projected. Attention is causal, and free inside a scale.

The body is transformers' `Exaone4ForCausalLM`, which has the residual order and the norms of queries and keys of the
released model. Codes become features by the tokenizer's `lookup` (`tokred.generation.tokenflow`), which is given to the
functions that need it: the codebooks are the tokenizer's, not the generator's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Exaone4Config,
    Exaone4ForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers import PreTrainedModel as PreTrainedModel  # diffusers looks for the base that loads in this module
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokred.core.errors import InvalidParameterError

__all__ = ["Lookup", "TokenFlowARConfig", "TokenFlowARModel", "next_scale_features", "visible_positions"]

#: codes (B, s * s) int64 of one scale to their features (B, s * s, D), `TokenFlow.lookup`
Lookup = Callable[[Tensor], Tensor]
IGNORED = -100  # labels that do not count, as everywhere in transformers
GUIDANCE = ("linear", "constant")


class TokenFlowARConfig(Exaone4Config):
    """Sizes of a `TokenFlowARModel`; the defaults are those of the released 7B text-to-image model.

    The further fields are those of `Exaone4Config`; attention is never windowed.

    Args:
        scales: sides s_1 < s_2 < ... of the tokenizer's scales; s_1 is 1, the last word predicts it.
        codebook_size: codes K that there are. code_dim: width D of a code's features (semantic and pixel half).
        image_token_start: id of code 0; the ids of texts are below it, or behind the last code.
        vocab_size: ids that the model predicts; 32000 words, [PAD] and the codes in the released one (UNVERIFIED).
        head_dim: None is `hidden_size` / `num_attention_heads`. num_key_value_heads: 0 is `num_attention_heads`.
        qk_norm_eps: epsilon of the norms of queries and keys, other than that of the blocks, `rms_norm_eps`.

    Raises:
        InvalidParameterError: scales that do not grow from 1, codes that reach beyond the vocabulary, a size below 1.
    """

    model_type = "tokenflow_ar"

    vocab_size: int = 64769
    intermediate_size: int = 11008
    num_key_value_heads: int = 0
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    rope_parameters: Any = None
    bos_token_id: int | None = 1
    pad_token_id: int | None = 32000
    scales: list[int] | tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    codebook_size: int = 32768
    code_dim: int = 40
    image_token_start: int = 32001
    head_dim: int | None = None
    qk_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        self.scales = list(self.scales)
        if self.num_key_value_heads == 0:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.layer_types = self.layer_types or ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        for name in ("hidden_size", "num_hidden_layers", "codebook_size", "code_dim", "image_token_start"):
            if getattr(self, name) < 1:
                raise InvalidParameterError(f"{name}={getattr(self, name)!r}: expected at least 1")
        grows = all(low < high for low, high in zip(self.scales, self.scales[1:], strict=False))
        if not self.scales or self.scales[0] != 1 or not grows:
            raise InvalidParameterError(f"scales={self.scales}: expected sides that grow, of which the first is 1")
        if self.image_token_start + self.codebook_size > self.vocab_size:
            raise InvalidParameterError(
                f"vocab_size={self.vocab_size}: {self.codebook_size} codes from id {self.image_token_start} on need at "
                f"least {self.image_token_start + self.codebook_size}"
            )

    @property
    def num_tokens(self) -> int:
        """Codes of a whole picture, N."""
        return sum(side * side for side in self.scales)

    @property
    def ends(self) -> list[int]:
        """Codes up to each scale, (s_1^2, s_1^2 + s_2^2, ..., N)."""
        return list(accumulate(side * side for side in self.scales))


# -- what is read at the places of a scale -----------------------------------------------------------------------------


def _resized(sums: Tensor, side: int) -> Tensor:
    """A running sum (B, D, s, s) at the next scale, F_k: (B, D, side, side)."""
    return F.interpolate(sums, (side, side), mode="bicubic", align_corners=False)


def _as_map(features: Tensor, side: int) -> Tensor:
    """(B, s * s, D), row by row, to (B, D, s, s)."""
    return features.mT.unflatten(2, (side, side))


def _as_rows(sums: Tensor) -> Tensor:
    """(B, D, s, s) to (B, s * s, D)."""
    return sums.flatten(2).mT


def _sums(codes: Tensor, scales: Sequence[int], lookup: Lookup) -> Iterator[tuple[Tensor, Tensor]]:
    """For each scale: what is read there, F_k (B, D, s, s), and with its own codes added, f_k."""
    before: Tensor | None = None
    for side, some in zip(scales, codes.split([side * side for side in scales], dim=1), strict=True):
        own = _as_map(lookup(some), side)
        read = torch.zeros_like(own) if before is None else _resized(before, side)
        before = read + own
        yield read, before


def next_scale_features(codes: Tensor, scales: Sequence[int], lookup: Lookup, refined: int | None = None) -> Tensor:
    """What the model reads for the scales after the first: (B, n, D) float, scale by scale.

    The running sum is resized from each scale to the next, as released: that is not the resized sum of
    the decoder.

    Args:
        codes: (B, o_m) int64 of the first m scales; the result then has the places of scales 2 .. m + 1.
        scales: sides of all scales. lookup: features of codes.
        refined: index (from 1) of a scale whose places hold its own codes too, as in a refinement pass.

    Raises:
        InvalidParameterError: codes that do not end with a scale.
    """
    known = _whole_scales(codes.shape[1], scales)
    rows = []
    for k, (read, sums) in enumerate(_sums(codes, scales[:known], lookup)):
        if k:
            rows.append(_as_rows(sums if k == refined else read))
        if k == known - 1 and known < len(scales):
            rows.append(_as_rows(_resized(sums, scales[known])))
    if not rows:  # one scale in all
        return lookup(codes)[:, :0]
    return torch.cat(rows, dim=1)


def _whole_scales(count: int, scales: Sequence[int], missing: int = 0) -> int:
    """How many scales have `count` codes, or `missing` more."""
    ends = list(accumulate(side * side for side in scales))
    if count + missing not in ends:
        raise InvalidParameterError(
            f"{count} places given: whole scales of sides {', '.join(map(str, scales))} end after "
            f"{', '.join(str(end - missing) for end in ends)}"
        )
    return ends.index(count + missing) + 1


def visible_positions(text_mask: Tensor, levels: Sequence[int], tail: int = 0) -> Tensor:
    """Which keys each query sees: (B, L, L) bool for T words, the picture and `tail` places behind it.

    Causal everywhere, and free inside a scale; padding is seen by nobody.

    Args:
        text_mask: (B, T) bool, False where the prompt is padded. levels: of the picture's places, the first of which
            is the last word, T - 1.
    """
    words = text_mask.shape[1] - 1
    device = text_mask.device
    level = torch.tensor([*[0] * words, *levels, *[0] * tail], device=device)
    length = len(level)
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    scale = (level[:, None] >= level[None]) & (level[:, None] > 0) & (level[None] > 0)
    keys = F.pad(text_mask, (0, length - text_mask.shape[1]), value=True)
    return (seen | scale) & keys[:, None]


class TokenFlowARModel(Exaone4ForCausalLM):
    """Codes of pictures from prompts, all of the next scale in one pass (TokenFlow, arXiv 2412.03069).

    `generate` draws codes (B, N); `forward` is the pass of training, with the loss. A prompt is any text: for a class
    it is the word of the class. `from_official` reads the released layout.
    """

    config: TokenFlowARConfig
    config_class = TokenFlowARConfig
    _supports_flash_attn = False  # its masks are causal or none
    _supports_flex_attn = False

    def __init__(self, config: TokenFlowARConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.projector = nn.Sequential(nn.Linear(config.code_dim, width), nn.GELU(), nn.Linear(width, width))
        self.level_embed = nn.Embedding(len(config.scales) + 1, width)  # row 0: words; row 1 is never read
        self.positions = nn.Parameter(torch.zeros(config.num_tokens, width))
        for layer in self.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.variance_epsilon = config.qk_norm_eps
        self.post_init()

    @classmethod
    def from_official(cls, path: str, **options: Any) -> TokenFlowARModel:
        """A model from the released layout: `tokred.generation.tokenflow_ar_official.load_official`."""
        from tokred.generation.tokenflow_ar_official import load_official

        return load_official(path, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenFlowARModel):
            init.normal_(module.positions, std=self.config.initializer_range)

    # -- one pass ----------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        tail_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits (B, n + 1 + R, V) of a picture's codes and of what follows it, from the last word of the prompt on.

        Args:
            input_ids: (B, T) int64 prompts, padded on the left. attention_mask: (B, T), 0 where there is padding; None
                is none.
            image_features: (B, n, D) of `next_scale_features` for whole scales; None is none, and logits of the first
                scale.
            labels: (B, n + 1) codes to predict, -100 where they do not count. The loss is the mean cross-entropy over
                them and over `tail_ids`, as released; the paper counts codes alone, which is without `tail_ids`.
            tail_ids: (B, R) ids of the text that closes a picture, behind a whole one.

        Raises:
            InvalidParameterError: ids, codes, masks or features of another shape or range, parts of a scale.
        """
        words, mask = self._checked_prompt("input_ids", input_ids, attention_mask)
        x, levels = self._embedded(words, image_features, tail_ids)
        tail = 0 if tail_ids is None else tail_ids.shape[1]
        seen = visible_positions(mask, levels, x.shape[1] - words.shape[1] + 1 - len(levels))
        hidden = self._run(x, seen, None)[:, words.shape[1] - 1 :]
        logits = self.lm_head(hidden[:, : len(levels) + tail])
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, tail_ids)
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None, tail_ids: Tensor | None = None) -> Tensor:
        """What enters the first block: (B, T + n, D_h), and 1 + R places more with a tail. Arguments of `forward`."""
        words, _ = self._checked_prompt("input_ids", input_ids, None)
        return self._embedded(words, image_features, tail_ids)[0]

    def _embedded(self, words: Tensor, features: Tensor | None, tail_ids: Tensor | None) -> tuple[Tensor, list[int]]:
        """Inputs of the body, and the levels of the picture's places, the last word's first."""
        parts, levels = [self._words(words)], [1]
        if features is not None:
            parts.append(self._places(self._checked_features(features, len(words))))
            known = _whole_scales(features.shape[1], self.config.scales, missing=1)
            levels += [k for k in range(2, known + 1) for _ in range(self.config.scales[k - 1] ** 2)]
        if tail_ids is not None:
            if len(levels) != self.config.num_tokens:
                raise InvalidParameterError(
                    f"tail_ids behind {len(levels)} of {self.config.num_tokens} codes: a text follows whole pictures"
                )
            self._check_ids("tail_ids", tail_ids)
            after = self.model.embed_tokens(tail_ids.to(words.device))
            parts.append(
                F.pad(after, (0, 0, 1, 0)) + self.level_embed.weight[0]
            )  # zeros in the last place (as released)
        return torch.cat(parts, dim=1), levels

    def _words(self, ids: Tensor) -> Tensor:
        """Inputs (B, T, D_h) of a prompt, whose last word is the place of the first scale."""
        x = self.model.embed_tokens(ids) + self.level_embed.weight[0]
        return torch.cat([x[:, :-1], x[:, -1:] + self.positions[0]], dim=1)

    def _places(self, features: Tensor, scale: int | None = None) -> Tensor:
        """Inputs (B, n, D_h) of the scales from the second on, or of one scale alone (index from 0)."""
        sides, ends = self.config.scales, self.config.ends
        x = self.projector(features.to(self.level_embed.weight))
        start = 1 if scale is None else ends[scale - 1]
        level = torch.cat([torch.full((side * side,), k + 1) for k, side in enumerate(sides)]).to(x.device)
        rows = slice(start, start + x.shape[1])
        return x + self.level_embed(level[rows]) + self.positions[rows]

    def _run(self, x: Tensor, seen: Tensor, cache: DynamicCache | None) -> Tensor:
        """The body on inputs (B, L, D_h), whose queries see keys (B, L, S) bool: (B, L, D_h)."""
        hidden_by = torch.finfo(x.dtype).min  # finite: queries at padding see nothing at all
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, hidden_by)[:, None]
        output = self.model(
            inputs_embeds=x,
            attention_mask={"full_attention": mask},
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _loss(self, logits: Tensor, labels: Tensor, tail_ids: Tensor | None) -> Tensor:
        own = labels.to(logits.device)
        tail = 0 if tail_ids is None else tail_ids.shape[1]
        if own.shape != (len(logits), logits.shape[1] - tail):
            raise InvalidParameterError(
                f"labels: shape {tuple(labels.shape)} given, expected {(len(logits), logits.shape[1] - tail)}"
            )
        counted = own != IGNORED
        self._check_codes(own[counted])
        wanted = torch.where(counted, own + self.config.image_token_start, own)
        if tail_ids is not None:
            wanted = torch.cat([wanted, tail_ids.to(wanted)], dim=1)
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dtype != torch.int64:
            raise InvalidParameterError(f"codes of {codes.dtype} given, expected int64")
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.config.codebook_size):
            raise InvalidParameterError(
                f"codes from {int(codes.min())} to {int(codes.max())} given, expected 0 to "
                f"{self.config.codebook_size - 1}"
            )

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise InvalidParameterError(f"{name}: {ids.dtype} {tuple(ids.shape)} given, expected int64 (B, T)")
        first, config = self.config.image_token_start, self.config
        codes = (ids >= first) & (ids < first + config.codebook_size)
        if bool((codes | (ids < 0) | (ids >= config.vocab_size)).any()):
            raise InvalidParameterError(
                f"{name}: ids from {int(ids.min())} to {int(ids.max())} given, expected those of words: below {first}, "
                f"or from {first + config.codebook_size} to {config.vocab_size - 1}"
            )

    def _checked_prompt(self, name: str, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids (B, T) and mask (B, T) bool on the model's device."""
        self._check_ids(name, ids)
        ids = ids.to(self.device)
        if mask is None:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        known = mask.to(self.device).bool()
        if known.shape != ids.shape:
            raise InvalidParameterError(
                f"{name}: a mask {tuple(mask.shape)} given beside ids {tuple(ids.shape)}, expected equal shapes"
            )
        if not bool(known[:, -1].all()) or not bool((known[:, 1:] >= known[:, :-1]).all()):
            raise InvalidParameterError(f"{name}: expected prompts that are padded on the left, and end with a word")
        return ids, known

    def _checked_features(self, features: Tensor, batch: int) -> Tensor:
        if features.ndim != 3 or len(features) != batch or features.shape[2] != self.config.code_dim:
            raise InvalidParameterError(
                f"image_features: shape {tuple(features.shape)} given, expected ({batch}, n, {self.config.code_dim})"
            )
        return features.to(self.device)

    # -- generate ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        lookup: Lookup,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        guidance_scale: float = 7.5,
        guidance: str = "linear",
        top_k: int | Sequence[int] = (1200, 100, 1),
        top_p: float | Sequence[float] = (0.8, 0.8, 0.0),
        temperature: float = 1.0,
        num_scales: int | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        callback_on_prefix: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Draw codes (B, N) int64 of one picture a prompt, all codes of a scale at once.

        The first scale takes one pass of the model, each later one as many as `top_k` has numbers: a further pass
        draws the whole scale again, reading in its places what the pass before has drawn. Defaults are the paper's
        (1 + 8 x 3 passes for 9 scales); the released script's are top_k=600, top_p=0.6.

        Args:
            input_ids, attention_mask: prompts (B, T) as in `forward`. lookup: the tokenizer's.
            negative_input_ids, negative_attention_mask: (B or 1, T') the prompt without condition, which guidance
                needs; padded here to one length.
            guidance_scale: s >= 0 of (1 + t) l_c - t l_u; 0 is none. guidance: "linear", t = s (k - 1) / (M - 1) at
                scale k of M, as released; or "constant", t = s.
            top_k, top_p: filters of each pass: the k largest logits (0: all), then the smallest set of at least that
                probability (0 or 1: all). One number is one pass.
            temperature: > 0; logits are divided by it before the filters.
            num_scales: stop after so many scales; None is all. A tokenizer decodes any whole scales.
            use_cache: keep keys and values of what was read; without, each pass reads everything again, with the same
                result.
            generator: source of randomness; None is torch's own.
            callback_on_prefix: called with the codes so far (B, o_k) after each pass, those of the running scale as
                last drawn; a true answer stops there.

        Raises:
            InvalidParameterError: an option outside its range, guidance without a negative prompt, or as in `forward`.
        """
        filters = _filters(top_k, top_p, temperature)
        scales = self._first_scales(num_scales)
        if guidance not in GUIDANCE:
            raise InvalidParameterError(f"guidance={guidance!r}: expected one of {', '.join(GUIDANCE)}")
        if not 0 <= guidance_scale < math.inf:
            raise InvalidParameterError(f"guidance_scale={guidance_scale!r}: expected a number of at least 0")
        words, mask = self._checked_prompt("input_ids", input_ids, attention_mask)
        if guidance_scale:
            words, mask = self._both(words, mask, negative_input_ids, negative_attention_mask, guidance_scale)
        reader = _Reader(self, words, mask, use_cache)
        repeats, first = 2 if guidance_scale else 1, self.config.image_token_start
        found: list[Tensor] = []
        sums: Tensor | None = None
        for k, side in enumerate(scales):
            read = None if sums is None else _resized(sums, side)
            reached = k / (len(self.config.scales) - 1) if guidance == "linear" and k else float(guidance == "constant")
            codes, own = torch.empty(0), torch.empty(0)
            for turn, warpers in enumerate(filters if k else filters[:1]):
                places = None if read is None else _as_rows(read if turn == 0 else read + own)
                rows = None if places is None else places.repeat(repeats, 1, 1)
                logits = self.lm_head(reader(k, rows, refined=turn > 0))
                logits = logits[..., first : first + self.config.codebook_size].float()
                if guidance_scale:
                    given, free = logits.chunk(2)
                    logits = given + guidance_scale * reached * (given - free)
                codes = _drawn(warpers(None, logits.flatten(0, 1)), generator).view(len(logits), -1)
                own = _as_map(lookup(codes), side)
                if callback_on_prefix is not None and callback_on_prefix(torch.cat([*found, codes], dim=1)):
                    return torch.cat([*found, codes], dim=1)
            found.append(codes)
            sums = own if read is None else read + own
        return torch.cat(found, dim=1)

    def _first_scales(self, count: int | None) -> list[int]:
        every = list(self.config.scales)
        if count is None:
            return every
        if not isinstance(count, int) or not 1 <= count <= len(every):
            raise InvalidParameterError(f"num_scales={count!r}: expected an integer from 1 to {len(every)}")
        return every[:count]

    def _both(
        self, words: Tensor, mask: Tensor, negative: Tensor | None, negative_mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Prompts, then negative ones, as one batch (2 B, T)."""
        if negative is None:
            raise InvalidParameterError(
                f"guidance_scale={scale} without negative_input_ids: give the prompt without condition, or "
                "guidance_scale=0"
            )
        free, free_mask = self._checked_prompt("negative_input_ids", negative, negative_mask)
        if len(free) not in (1, len(words)):
            raise InvalidParameterError(f"negative_input_ids: {len(free)} rows given, expected 1 or {len(words)}")
        length = max(words.shape[1], free.shape[1])
        ids, masks = [], []
        for some, seen in ((words, mask), (free.expand(len(words), -1), free_mask.expand(len(words), -1))):
            missing = length - some.shape[1]
            ids.append(F.pad(some, (missing, 0)))  # what stands there is seen by nobody
            masks.append(F.pad(seen, (missing, 0)))
        return torch.cat(ids), torch.cat(masks)


class _Reader:
    """Hidden states of the places of one scale after the other, with or without a cache."""

    def __init__(self, model: TokenFlowARModel, words: Tensor, mask: Tensor, cached: bool) -> None:
        self.model, self.mask = model, mask
        self.words = model._words(words)
        self.cache = DynamicCache(config=model.config) if cached else None
        self.before = self.cache  # what was read before the running scale
        self.places: list[Tensor] = []  # inputs of the scales so far

    def __call__(self, scale: int, features: Tensor | None, refined: bool) -> Tensor:
        """Hidden states (B, s * s, D_h) of the scale `scale` (from 0), whose places hold `features` (B, s * s, D).

        What a refinement pass reads is forgotten after it: later scales see the first pass's.
        """
        x = self.words if features is None else self.model._places(features, scale)
        count = 1 if features is None else x.shape[1]
        if self.cache is not None:
            if not refined:
                self.before = _shared_copy(self.cache)
            cache = _shared_copy(self.before) if refined else self.cache
            known = cache.get_seq_length()
            if known == 0:
                seen = visible_positions(self.mask, [1])
            else:
                seen = F.pad(self.mask, (0, known + count - self.mask.shape[1]), value=True)[:, None]
                seen = seen.expand(-1, count, -1)
            return self.model._run(x, seen, cache)[:, -count:]
        places = [*(self.places[:-1] if refined else self.places), *([] if features is None else [x])]
        if not refined:
            self.places = places
        levels = [1, *(k for k, some in enumerate(places, 2) for _ in range(some.shape[1]))]
        seen = visible_positions(self.mask, levels)
        return self.model._run(torch.cat([self.words, *places], dim=1), seen, None)[:, -count:]


def _shared_copy(cache: DynamicCache) -> DynamicCache:
    """A cache that grows on its own from the same keys and values, which are not copied."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def _filters(
    top_k: int | Sequence[int], top_p: float | Sequence[float], temperature: float
) -> list[LogitsProcessorList]:
    """Processors of each pass."""
    ks = [top_k] if isinstance(top_k, int) else list(top_k)
    ps = [top_p] if isinstance(top_p, (int, float)) else list(top_p)
    if len(ks) != len(ps) or not ks:
        raise InvalidParameterError(f"top_k={top_k!r}, top_p={top_p!r}: expected one of each for every pass")
    if not all(isinstance(k, int) and k >= 0 for k in ks) or not all(0 <= p <= 1 for p in ps):
        raise InvalidParameterError(
            f"top_k={top_k!r}, top_p={top_p!r}: expected integers of at least 0, and numbers from 0 to 1"
        )
    if not 0 < temperature < math.inf:
        raise InvalidParameterError(f"temperature={temperature!r}: expected a number above 0; top_k=1 is the largest")
    passes = []
    for k, p in zip(ks, ps, strict=True):
        found = LogitsProcessorList()
        if temperature != 1:
            found.append(TemperatureLogitsWarper(float(temperature)))
        if k:
            found.append(TopKLogitsWarper(k))
        if 0 < p < 1:
            found.append(TopPLogitsWarper(float(p)))
        passes.append(found)
    return passes


def _drawn(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index (n,) for each row of scores (n, K)."""
    chances = scores.softmax(dim=-1)
    if generator is not None:
        chances = chances.to(generator.device)
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(scores.device)
