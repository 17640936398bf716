"""What a forward pass kept: step by step, in terms of the original tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.core.sites import MediaLayout
from tokred.core.tokens import Keep, Merge, TokenTable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DiffusionStep", "LayerStep", "MediaStep", "PromptStep", "Trace", "TraceStep"]


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One reduction.

    Attributes:
        layer: 0-based block where it happened. method: by name.
        tokens_in, tokens_out: per image, prefix tokens excluded.
        origins: (B, tokens_out) int64, the original token that each token is, or stands for after a merge.
        group: (B, total) int64, the present token of each original one, -1 where it was dropped.
        valid: (B, tokens_out) bool or None; False marks padding.
    """

    layer: int
    method: str
    tokens_in: int
    tokens_out: int
    origins: Tensor
    group: Tensor
    valid: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Alias of `origins`: the kept original indices."""
        return self.origins


@dataclass(frozen=True, eq=False)
class MediaStep:
    """What became of the visual tokens of one image or video, before the language model or inside it.

    Attributes:
        layer: of the language model before which it happened; None for before the language model itself.
        method: by name. sample: row of the batch. layout: how its tokens lay.
        tokens_in, tokens_out: newlines and class tokens apart.
        cells: (tokens_out,) int64, the cell of each token in the order of the prompt, -1 for one that stands for none.
    """

    method: str
    sample: int
    layout: MediaLayout
    tokens_in: int
    tokens_out: int
    cells: Tensor
    layer: int | None = None

    @classmethod
    def of(
        cls,
        method: str,
        sample: int,
        layout: MediaLayout,
        tokens: Tensor,
        layer: int | None = None,
        tokens_in: int | None = None,
    ) -> MediaStep:
        """`tokens` (m,) are positions among the prunable tokens of the layout, -1 for none."""
        cells = torch.tensor(layout.cells, device=tokens.device)
        taken = torch.where(tokens >= 0, cells[tokens.clamp_min(0)], tokens)
        came = cells.shape[0] if tokens_in is None else tokens_in
        return cls(method, sample, layout, came, tokens.shape[0], taken, layer)

    valid: ClassVar[None] = None

    @property
    def origins(self) -> Tensor:
        """(1, tokens_out) int64: the cells, as `TraceStep.origins` has them."""
        return self.cells[None]

    kept = origins

    @property
    def group(self) -> Tensor:
        """(1, cells) int64: the token that took each cell's place, -1 where none did."""
        group = self.cells.new_full((self.layout.total_cells,), -1)
        places = torch.arange(len(self.cells), device=self.cells.device)
        group[self.cells[self.cells >= 0]] = places[self.cells >= 0]
        return group[None]

    @property
    def mask(self) -> Tensor:
        """(partitions, cells of one) bool: which cells are left, or lend their place to a token that is."""
        layout = self.layout
        mask = torch.zeros(layout.total_cells, dtype=torch.bool, device=self.cells.device)
        mask[self.cells[self.cells >= 0]] = True
        return mask.unflatten(0, (layout.partitions, -1))

    @property
    def per_partition(self) -> list[int]:
        """Tokens that each tile or frame has got."""
        partition = self.cells[self.cells >= 0] // self.layout.cells_per_partition
        return torch.bincount(partition, minlength=self.layout.partitions).tolist()

    def to_dict(self) -> dict[str, Any]:
        return {
            "site": "VisualFeatures" if self.layer is None else "language model",
            "layer": self.layer,
            "method": self.method,
            "sample": self.sample,
            "kind": self.layout.kind,
            "grid": list(self.layout.grid),
            "partitions": self.layout.partitions,
            "mosaic": list(self.layout.mosaic) if self.layout.mosaic else None,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "per_partition": self.per_partition,
            "cells": self.cells.tolist(),
        }


@dataclass(frozen=True, eq=False)
class PromptStep:
    """What part of each prompt went on to the language model, by a method that read the whole of it first.

    Attributes:
        method: by name. layer: the one that chose, 0-based.
        tokens_in: tokens of each row that were read. kept: for each row the columns of the caller's prompt, ascending.
        ids: (B, S) token ids of the caller's prompt, None where embeddings were given. length: S.
        media: what went on of each image and video.
    """

    method: str
    layer: int
    tokens_in: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    ids: Tensor | None
    length: int
    media: tuple[MediaStep, ...] = ()

    valid: ClassVar[None] = None

    @property
    def tokens_out(self) -> tuple[int, ...]:
        """Tokens of each row that went on."""
        return tuple(len(row) for row in self.kept)

    def words(self, tokenizer: Any, row: int = 0, gap: str = " ... ") -> str:
        """The text that went on, runs of neighbours apart by `gap`.

        Args:
            tokenizer: a tokenizer or processor, with ``decode(ids)``.
        """
        if self.ids is None:
            raise InvalidParameterError("the prompt was given as embeddings; there are no words to show")
        runs: list[list[int]] = []
        for column in self.kept[row]:
            if not runs or column != runs[-1][-1] + 1:
                runs.append([])
            runs[-1].append(column)
        return gap.join(tokenizer.decode(self.ids[row, run].tolist()) for run in runs)

    def to_dict(self) -> dict[str, Any]:
        return {"site": "Prompt", **_step_dict(self)}


@dataclass(frozen=True, eq=False)
class LayerStep:
    """What was left of each prompt before a layer of the language model.

    Attributes:
        layer: 0-based; the number of layers stands for behind the last. method: by name.
        tokens_in: tokens of each row before. kept: for each row the columns of the caller's prompt that are left, in
            their order. media: what is left of each image and video.
    """

    layer: int
    method: str
    tokens_in: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    media: tuple[MediaStep, ...] = ()

    valid: ClassVar[None] = None

    @property
    def tokens_out(self) -> tuple[int, ...]:
        """Tokens of each row that are left."""
        return tuple(len(row) for row in self.kept)

    def to_dict(self) -> dict[str, Any]:
        return {"site": "PrefillLayer", **_step_dict(self)}


@dataclass(frozen=True, eq=False)
class DiffusionStep:
    """What one block of a denoiser ran on in its last pass; behind it every token was there again.

    Attributes:
        layer: 0-based. path: of the block in the model. method: by name. grid: (rows, columns) of its tokens.
        reduced: "tokens" merged, or "keys" alone were fewer. tokens_in, tokens_out: image tokens, or keys of them.
        origins: (B, tokens_out) int64, the token that each one is or stands for.
        group: (B, tokens_in) int64, what each token merged into; of keys, -1 where a token was none.
    """

    layer: int
    path: str
    method: str
    grid: tuple[int, int]
    reduced: str
    tokens_in: int
    tokens_out: int
    origins: Tensor
    group: Tensor

    valid: ClassVar[None] = None

    @classmethod
    def of(cls, layer: int, path: str, method: str, grid: tuple[int, int], change: Keep | Merge) -> DiffusionStep:
        total = grid[0] * grid[1]
        if isinstance(change, Merge):
            kept = change.representative
            return cls(layer, path, method, grid, "tokens", total, kept.shape[1], kept, change.assignment)
        kept = change.indices
        slots = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        group = kept.new_full((kept.shape[0], total), -1).scatter(1, kept, slots)
        return cls(layer, path, method, grid, "keys", total, kept.shape[1], kept, group)

    @property
    def kept(self) -> Tensor:
        """Alias of `origins`."""
        return self.origins

    def to_dict(self) -> dict[str, Any]:
        return {
            "site": "DiffusionBlock",
            "layer": self.layer,
            "path": self.path,
            "method": self.method,
            "grid": list(self.grid),
            "reduced": self.reduced,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "kept": self.origins.tolist(),
            "group": self.group.tolist(),
        }


def _step_dict(step: PromptStep | LayerStep) -> dict[str, Any]:
    return {
        "method": step.method,
        "layer": step.layer,
        "tokens_in": list(step.tokens_in),
        "tokens_out": list(step.tokens_out),
        "kept": [list(row) for row in step.kept],
        "media": [one.to_dict() for one in step.media],
    }


class Trace:
    """The reductions of one forward pass.

    `len(trace)`, iteration and indexing give a `TraceStep` for each reduction inside a vision encoder, then a
    `MediaStep` for each image or video that was reduced before the language model, then a `PromptStep` and
    `LayerStep`s for what happened in it; of a denoiser a `DiffusionStep` for each block that ran on fewer tokens. A
    model that was not run yet, or from which nothing was removed, has none.

    Attributes:
        media: the `MediaStep`s before the language model alone. language: the steps in it.
        denoiser: the `DiffusionStep`s.
    """

    def __init__(
        self,
        table: TokenTable | None,
        prefix: int = 0,
        media: Sequence[MediaStep] = (),
        language: Sequence[PromptStep | LayerStep] = (),
        denoiser: Sequence[DiffusionStep] = (),
    ) -> None:
        self.media = tuple(media)
        self.language = tuple(language)
        self.denoiser = tuple(denoiser)
        self.prefix = prefix
        self.total = table.total if table is not None else None
        self.grid = table.grid if table is not None else None
        self._table = table
        self._steps: list[TraceStep] | None = None

    @property
    def steps(self) -> list[TraceStep | MediaStep | PromptStep | LayerStep | DiffusionStep]:
        """All reductions, in the order of the data."""
        return [*self.encoder, *self.media, *self.language, *self.denoiser]

    @property
    def prompt(self) -> list[PromptStep]:
        """The choices that a method made of the prompt as a whole."""
        return [step for step in self.language if isinstance(step, PromptStep)]

    @property
    def layers(self) -> list[LayerStep]:
        """The reductions between layers of the language model."""
        return [step for step in self.language if isinstance(step, LayerStep)]

    @property
    def encoder(self) -> list[TraceStep]:
        """The reductions inside a vision encoder."""
        if self._steps is None:
            self._steps = list(_steps(self._table)) if self._table is not None else []
        return self._steps

    def followed_by(self, later: Trace) -> Trace:
        """This trace (of an encoder) and what came after it."""
        return Trace(self._table, self.prefix, (*self.media, *later.media), (*self.language, *later.language))

    def __len__(self) -> int:
        encoder = len(self._table.steps) if self._table is not None else 0
        return encoder + len(self.media) + len(self.language) + len(self.denoiser)

    def __getitem__(self, index: int) -> TraceStep | MediaStep | PromptStep | LayerStep | DiffusionStep:
        return self.steps[index]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """[(layer, tokens that leave it)], prefix excluded."""
        return [(step.layer, step.tokens_out) for step in self._table.steps] if self._table is not None else []

    def __repr__(self) -> str:
        if not len(self):
            return "Trace(nothing removed)"
        parts = []
        if self.counts:
            chain = " -> ".join([str(self.total), *(f"{count} (block {layer})" for layer, count in self.counts)])
            parts.append(f"tokens per image: {chain}")
        parts += [f"{m.layout.kind} of sample {m.sample}: {m.tokens_in} -> {m.tokens_out}" for m in self.media[:4]]
        more = [f"and {len(self.media) - 4} more"] if len(self.media) > 4 else []
        for step in self.language:
            where = "prompt" if isinstance(step, PromptStep) else f"before layer {step.layer}"
            more.append(f"{where}: {_range(step.tokens_in)} -> {_range(step.tokens_out)} tokens")
        for (reduced, before, after), steps in Counter(
            (step.reduced, step.tokens_in, step.tokens_out) for step in self.denoiser
        ).items():
            more.append(f"{before} -> {after} {reduced} in {steps} block{'s' if steps > 1 else ''}")
        return f"Trace({'; '.join([*parts, *more])})"

    def restore(self, tokens: Tensor, fill: str = "nearest") -> Tensor:
        """Scatter reduced tokens back to every original position.

        Args:
            tokens: (B, n, C), or (B, prefix + n, C) with the prefix tokens in front (they stay in front).
            fill: "nearest" surviving token or "zeros" at positions whose token was dropped.

        Returns:
            (B, total, C), or (B, prefix + total, C).
        """
        if self._table is None:
            return tokens
        present = tokens.shape[1] - self._table.count
        if present not in (0, self.prefix):
            raise InvalidParameterError(
                f"tokens have length {tokens.shape[1]}, expected {self._table.count} "
                f"or {self._table.count + self.prefix} with the {self.prefix} prefix tokens"
            )
        body = self._table.restore(tokens[:, present:], fill)  # type: ignore[arg-type]
        return torch.cat([tokens[:, :present], body], dim=1) if present else body

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types: totals, grid, and each step with its kept original indices and groups."""
        return {
            "total": self.total,
            "grid": list(self.grid) if self.grid else None,
            "prefix": self.prefix,
            "steps": [
                {
                    "layer": step.layer,
                    "method": step.method,
                    "tokens_in": step.tokens_in,
                    "tokens_out": step.tokens_out,
                    "kept": step.origins.tolist(),
                    "group": step.group.tolist(),
                }
                for step in self.encoder
            ],
            "media": [step.to_dict() for step in self.media],
            "language": [step.to_dict() for step in self.language],
            "denoiser": [step.to_dict() for step in self.denoiser],
        }

    def draw(self, image: object, step: int = -1, sample: int = 0, item: int = 0) -> Image:
        """Draw what was kept of an image or video: dropped patches fade out, merged ones share their mean colour.

        After the steps of an encoder comes one for images and videos that were reduced before a language model, then
        one for each place inside it where visual tokens were dropped, and one for each block of a denoiser that ran on
        fewer (the picture is what its latents show). Of an image of one tile all patches are drawn in place; of one cut
        into tiles the overview and the mosaic, each tile with its number of
        tokens; of a video every frame with its number of tokens and a bar, at the resolution of its tokens where the
        method resized it.

        Args:
            image: PIL image, or an array or tensor (3, H, W) or (H, W, 3), uint8 or float in [0, 1], as the encoder saw
                it (a crop, where the processor crops); one cut into tiles whole, at any size. Of a video its frames: a
                list of pictures, (T, H, W, 3) or (T, 3, H, W).
            step: which reduction; -1 is the last. sample: which image of the batch, or which row of prompts.
            item: which image or video of that row.

        Returns:
            A PIL image, of the size of `image` where there are no tiles and frames.
        """
        if not len(self):
            raise InvalidParameterError("nothing to draw: no forward pass removed a token yet")
        drawn = [step.media for step in self.language if step.media]
        pictures = [self.media, *drawn] if self.media else drawn
        stages = len(self.encoder) + len(pictures) + len(self.denoiser)
        if stages == 0:
            raise InvalidParameterError("nothing to draw: no image or video lost a token")
        if not -stages <= step < stages:
            raise InvalidParameterError(f"step={step}: there are {stages} to draw, 0 to {stages - 1}")
        if step % stages >= stages - len(self.denoiser):
            found = self.denoiser[step % stages - stages]
            return _draw_group(image, found.group, sample, found.grid)
        if step % stages >= len(self.encoder):
            from tokred.core.draw_media import draw_media

            return draw_media(image, _media_of(pictures[step % stages - len(self.encoder)], sample, item))
        if self.grid is None:
            raise InvalidParameterError("nothing to draw: the tokens of this model form no grid")
        return _draw_group(image, self.encoder[step % stages].group, sample, self.grid)


def _draw_group(image: object, group: Tensor, sample: int, grid: tuple[int, int]) -> Image:
    from tokred.core.draw import draw_step

    if not -len(group) <= sample < len(group):
        raise InvalidParameterError(f"sample={sample}: the batch has {len(group)} images")
    return draw_step(image, group[sample], grid)


def _media_of(steps: Sequence[MediaStep], sample: int, item: int) -> MediaStep:
    own = [step for step in steps if step.sample == sample]
    if not own:
        rows = sorted({step.sample for step in steps})
        raise InvalidParameterError(f"sample={sample}: rows with an image or video are {rows}")
    if not 0 <= item < len(own):
        raise InvalidParameterError(f"item={item}: row {sample} has {len(own)}, numbered from 0")
    return own[item]


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _steps(table: TokenTable) -> Sequence[TraceStep]:
    steps = []
    for end, step in enumerate(table.steps, start=1):
        partial = TokenTable(table.batch, table.total, table.steps[:end], grid=table.grid)
        origins, group = partial.origins, partial.group
        assert origins is not None
        assert group is not None
        valid = getattr(step.change, "valid", None)
        steps.append(TraceStep(step.layer, step.method, step.tokens_in, step.tokens_out, origins, group, valid))
    return steps
