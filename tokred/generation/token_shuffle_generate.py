"""Drawing pictures with Token-Shuffle: s^2 codes a step, through `generate` of transformers.

Token-Shuffle, arXiv 2504.17789. `generate` prepares cache, samplers and configuration as ever and calls a
loop of ours (`custom_generate`): one call of the transformer for each of the m windows, the prompt's being the first.
With guidance, B rows without prompt run beside the B rows with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerateDecoderOnlyOutput,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError, UnsupportedGenerationError
from tokred.generation.token_shuffle_host import positions_of
from tokred.generation.token_shuffle_inputs import code_positions, places_of, read_pictures
from tokred.generation.token_shuffle_ops import EMPTY, SCHEDULES, guidance_at, unwindow, window

__all__ = ["TokenShuffleGeneration"]

#: Those of transformers that look at one row of logits and at nothing before it.
STATELESS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
)
#: Stops that an unfinished picture never meets.
HARMLESS = (MaxLengthCriteria, EosTokenCriteria)


@dataclass(frozen=True, eq=False)
class _Drawing:
    """What one call of `generate` draws."""

    grid: tuple[int, int]  #: codes down and across, a multiple of the window
    asked: tuple[int, int]  #: the same before it was filled up
    scale: float
    schedule: str
    pictures: list[Tensor]  #: codes of pictures in the prompts
    generator: torch.Generator | None
    streamer: Any
    on_window: Callable[[int, int, Tensor], object] | None


class TokenShuffleGeneration(GenerationMixin):
    """`generate` and `generate_codes` of a `TokenShuffle`."""

    config: Any

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *,
        grid: int | tuple[int, int] | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        negative_prompt_ids: Tensor | None = None,
        image_codes: Tensor | Sequence[Tensor] | None = None,
        pad: bool = False,
        generator: torch.Generator | None = None,
        on_window: Callable[[int, int, Tensor], object] | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts by text (`grid=None`, as the language model does) or by one picture each.

        Args:
            inputs: prompts (B, T) int64, also as `input_ids`; for a picture they end with SOI. `attention_mask` is 0
                where they are padded, on the left.
            grid: codes down and across, or one number for both.
            guidance_scale: G; 1 is none, None is the configuration's. guidance_schedule: see `guidance_at`.
            negative_prompt_ids: (B or 1, T') ending with SOI, what guidance leads away from; None is BOS (where the
                language model has one) and SOI.
            image_codes: pictures in the prompts, as in `forward`; an image continues what they show.
            pad: fill up a grid that the window does not divide, and cut the picture to it in the end.
            generator: source of randomness; None is torch's own.
            on_window: called with (windows drawn, m, their codes (B, s^2)) after each step.
            streamer: of transformers; gets the prompts, then the s^2 ids of each step (B s^2,).
            kwargs: of transformers' `generate`: sampling, `num_return_sequences`, `cache_implementation`,
                `return_dict_in_generate` (with `output_scores`, `output_logits`: (B, s^2, K) a step).

        Returns:
            (B, T + m s^2) ids: the prompt, then the codes in the order in which they are drawn (window by window), as
            ids of the vocabulary; `codes_of` makes grids of them. EOI, which is what follows, is left to the caller.

        Raises:
            InvalidParameterError: an option outside its range, a prompt without SOI at its end.
            UnsupportedGenerationError: beams, processors of logits that look back, stops before the last window.
        """
        if grid is None:
            given = {"guidance_schedule": guidance_schedule, "generator": generator, "on_window": on_window}
            for name, value in (given | {"pad": pad or None}).items():
                if value is not None:
                    raise InvalidParameterError(f"{name} without grid: it belongs to pictures; give the grid of one")
            passed = {
                "guidance_scale": guidance_scale,
                "negative_prompt_ids": negative_prompt_ids,
                "image_codes": image_codes,
                "streamer": streamer,
            }
            return super().generate(inputs, **{k: v for k, v in passed.items() if v is not None}, **kwargs)
        config, size = self.config, self.config.window
        asked = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(asked) != 2:
            raise InvalidParameterError(f"grid={grid!r}: expected a number of codes, or how many down and across")
        height, width = (check_count("grid", side, 1) for side in asked)
        if (height % size or width % size) and not pad:
            raise InvalidParameterError(
                f"grid={grid!r}: the window {size} does not divide it; give sides that it divides, or pad=True"
            )
        full = (height + -height % size, width + -width % size)
        scale = config.cfg_scale if guidance_scale is None else guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < float("inf"):
            raise InvalidParameterError(f"guidance_scale={scale!r}: expected a number of at least 0; 1 is no guidance")
        schedule = config.cfg_schedule if guidance_schedule is None else guidance_schedule
        check_choice("guidance_schedule", schedule, SCHEDULES)
        ids, mask = self._prompts(inputs, kwargs)
        count, steps = full[0] * full[1], full[0] * full[1] // size**2
        for name, least in (("max_new_tokens", 0), ("max_length", ids.shape[1])):
            if kwargs.get(name) not in (None, least + count):
                raise InvalidParameterError(f"{name}={kwargs[name]}: a picture of {full} needs {least + count}")
            kwargs.pop(name, None)
        for name in ("past_key_values", "assistant_model", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise UnsupportedGenerationError(f"{name} with a grid: s^2 codes are drawn a step, which it is not for")
        self._check_length(ids.shape[1] + steps)
        if streamer is not None:
            streamer.put(ids.cpu())
        pictures = [] if image_codes is None else list(image_codes)
        if scale != 1:
            ids, mask = self._with_negative(ids, mask, negative_prompt_ids)
        drawing = _Drawing(full, (height, width), scale, schedule, pictures, generator, streamer, on_window)
        kwargs.setdefault("pad_token_id", 0)
        return super().generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            custom_generate=partial(draw_windows, drawing=drawing),
            **kwargs,
        )

    def generate_codes(
        self, prompts: Sequence[Sequence[int] | Tensor] | Tensor, grid: int | tuple[int, int], **options: Any
    ) -> Tensor:
        """Draw the codes (B, H, W) int64 of one picture a prompt.

        Args:
            prompts: rows of text ids, of any lengths, without SOI. grid: H and W, or one number for both.
            options: of `generate`. With `num_return_sequences`, the pictures of a prompt follow one another.
        """
        rows = [torch.tensor([*torch.as_tensor(row).flatten().tolist(), self.config.soi_token_id]) for row in prompts]
        if not rows:
            raise InvalidParameterError("prompts=[]: expected at least one")
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EMPTY, padding_side="left")
        ids = ids.to(self.get_input_embeddings().weight.device)
        mask = ids != EMPTY
        found = self.generate(ids.masked_fill(~mask, 0), attention_mask=mask.long(), grid=grid, **options)
        found = found if isinstance(found, Tensor) else found.sequences
        return self.codes_of(found, grid)

    def codes_of(self, sequences: Tensor, grid: int | tuple[int, int]) -> Tensor:
        """The codes (B, H, W) of what `generate` returned for this grid."""
        size = self.config.window
        height, width = (grid, grid) if isinstance(grid, int) else grid
        full = (height + -height % size, width + -width % size)
        drawn = sequences[:, -full[0] * full[1] :] - self.config.image_token_start
        return unwindow(drawn.unflatten(1, (-1, size**2)), size, full)[:, :height, :width]

    # -- preparation -------------------------------------------------------------------------------------------------

    def _prompts(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        ids, mask = kwargs.pop("input_ids", None), kwargs.pop("attention_mask", None)
        ids = inputs if ids is None else ids
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
            what = tuple(ids.shape) if isinstance(ids, Tensor) else ids
            raise InvalidParameterError(f"inputs: {what} given, expected ids (B, T)")
        soi = self.config.soi_token_id
        if (ids[:, -1] != soi).any():
            raise InvalidParameterError(
                f"prompts end with {sorted(set(ids[:, -1].tolist()))}, expected SOI ({soi}); generate_codes adds it"
            )
        mask = torch.ones_like(ids) if mask is None else mask.to(ids)
        if mask.shape != ids.shape or (mask[:, 1:] < mask[:, :-1]).any():
            raise InvalidParameterError("attention_mask: expected the shape of the prompts, padded on the left")
        return ids, mask

    def _with_negative(self, ids: Tensor, mask: Tensor, negative: Tensor | None) -> tuple[Tensor, Tensor]:
        """The prompts, and below them as many rows that guidance leads away from, padded on the left."""
        if negative is None:
            start = self.config.text_config.bos_token_id
            first = [] if start is None else [start[0] if isinstance(start, list) else start]
            negative = torch.tensor([[*first, self.config.soi_token_id]], device=ids.device)
        if (
            negative.ndim != 2
            or len(negative) not in (1, len(ids))
            or (negative[:, -1] != self.config.soi_token_id).any()
        ):
            raise InvalidParameterError(
                f"negative_prompt_ids: {tuple(negative.shape)} given, expected (1 or {len(ids)}, T') ending with SOI"
            )
        negative = negative.to(ids).expand(len(ids), -1)
        length = max(ids.shape[1], negative.shape[1])
        both = [F.pad(part, (length - part.shape[1], 0)) for part in (ids, negative)]
        masks = [F.pad(part, (length - part.shape[1], 0)) for part in (mask, torch.ones_like(negative))]
        return torch.cat(both), torch.cat(masks)


def draw_windows(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    drawing: _Drawing,
    **model_kwargs: Any,
) -> Any:
    """The loop that `generate` of transformers calls: the prompts' rows, with guidance those without prompt below."""
    _check_processors(logits_processor, stopping_criteria)
    if (generation_config.num_beams or 1) > 1:
        raise UnsupportedGenerationError("num_beams with a grid: s^2 codes are drawn a step, which it is not for")
    size, start = model.config.window, model.config.image_token_start
    (height, width), columns = drawing.grid, drawing.grid[1] // size
    steps, slots = height * width // size**2, size**2
    guided = drawing.scale != 1
    rows = len(input_ids) // 2 if guided else len(input_ids)
    length = input_ids.shape[1]
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    padded = bool((mask == 0).any())
    mask = F.pad(mask, (0, steps), value=1)
    positions = positions_of(mask)
    real = window(_real(drawing), size).to(input_ids.device)
    cache = model_kwargs.get("past_key_values")
    sequences = F.pad(input_ids[:rows], (0, steps * slots))
    kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
    x, places = _prefill(model, input_ids, positions[:, :length], drawing)
    first = positions[:, length]  # of the picture's first window
    for step in range(1, steps + 1):
        seen = length + step - 1
        out = model.decode_step(
            x,
            positions[:, seen - x.shape[1] : seen],
            places,
            attention_mask=mask[:, :seen] if padded else None,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        raw = model.split(out.last_hidden_state[:, -1]).float()  # (B or 2 B, s^2, K)
        if guided:
            g = guidance_at(step, steps, drawing.scale, drawing.schedule)
            given, free = raw.chunk(2)
            raw = given if g == 1 else free + g * (given - free)
        before = sequences[:, : length + (step - 1) * slots].repeat_interleave(slots, dim=0)
        scores = logits_processor(before, raw.flatten(0, 1))
        if generation_config.do_sample:
            drawn = torch.multinomial(scores.softmax(dim=-1), 1, generator=drawing.generator)
        else:
            drawn = scores.argmax(dim=-1, keepdim=True)
        codes = drawn.view(rows, slots)
        sequences[:, length + (step - 1) * slots : length + step * slots] = codes + start
        if generation_config.return_dict_in_generate:
            kept["logits"] += [raw] if generation_config.output_logits else []
            kept["scores"] += [scores.view_as(raw)] if generation_config.output_scores else []
        if drawing.streamer is not None:
            drawing.streamer.put((codes + start).flatten().cpu())
        if drawing.on_window is not None:
            drawing.on_window(step, steps, codes)
        if step == steps:
            break
        fused = model.fuse(codes.masked_fill(~real[step - 1], EMPTY))[:, None].to(x.dtype)
        fused = torch.cat([fused, fused]) if guided else fused
        place = torch.stack([first + (step - 1) // columns, first + (step - 1) % columns], dim=-1)[:, None]
        if cache is None:  # everything is read again
            x = torch.cat([x, fused], dim=1)
            places = None if places is None else torch.cat([places, place], dim=1)
        else:
            x, places = fused, place
    if drawing.streamer is not None:
        drawing.streamer.end()
    if not generation_config.return_dict_in_generate:
        return sequences
    found = {name: tuple(values) or None for name, values in kept.items()}
    return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache, **found)


def _real(drawing: _Drawing) -> Tensor:
    """Where the grid (H, W) holds what was asked for."""
    real = torch.zeros(drawing.grid, dtype=torch.bool)
    real[: drawing.asked[0], : drawing.asked[1]] = True
    return real


def _prefill(model: Any, ids: Tensor, positions: Tensor, drawing: _Drawing) -> tuple[Tensor, Tensor | None]:
    """Inputs (B, T, d) of the prompts, their pictures included, and the places of those."""
    x, here = model.get_input_embeddings()(ids), code_positions(model.config, ids)
    places = torch.full((*ids.shape, 2), -1, device=ids.device)
    if not drawing.pictures and (model.config.window == 1 or not here.any()):
        return x, places
    pictures = read_pictures(model.config, _repeated(drawing.pictures, here) or None, ids, here)
    x = x.masked_scatter(here[..., None], model.fuse(pictures.windows).to(x.dtype))
    found = places_of(model.config, pictures, here, positions, 0)
    return x, places if found is None else found


def _repeated(pictures: Sequence[Tensor], here: Tensor) -> list[Tensor]:
    """The pictures of the rows, where each prompt's row stands there several times (`num_return_sequences`)."""
    runs = (here & ~F.pad(here, (1, 0))[:, :-1]).sum(dim=1).tolist()
    times = sum(runs) // max(len(pictures), 1)
    if times < 2:
        return list(pictures)
    found, left = [], iter(pictures)
    for count in runs[::times]:
        found += list(islice(left, count)) * times
    return found


def _check_processors(processors: LogitsProcessorList, stops: StoppingCriteriaList) -> None:
    for one in processors:
        if type(one).__module__.startswith("transformers.") and not isinstance(one, STATELESS):
            raise UnsupportedGenerationError(
                f"{type(one).__name__} looks back or names ids of the vocabulary, but the slots of a window are drawn "
                "at once and from the codes alone: take its option out (of generation_config, too)"
            )
    for stop in stops:
        if not isinstance(stop, HARMLESS):
            raise UnsupportedGenerationError(
                f"{type(stop).__name__}: a picture needs all of its windows; on_window sees each of them"
            )
