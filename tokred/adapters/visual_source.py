"""What the multimodal hosts hand to a method at the `VisualFeatures` site: tower scores by cell, queries, frames."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.adapters.towers import QwenTower, Seen
from tokred.core.errors import PreEncodedError, RequestError
from tokred.core.scoring import FrameScorer
from tokred.core.sites import MediaLayout, TowerInfo

__all__ = ["GroupSource", "Request", "make_request"]


@dataclass(frozen=True)
class Request:
    """What the caller gave beside the model's inputs: for every sample, image or video the same, or a list of them."""

    query: str | Sequence[str] | None = None
    frames: Any = None
    frame_scores: Any = None
    prunable: Tensor | None = None


def make_request(**given: Any) -> Request:
    """Check the names of what was given to `Patch.request`."""
    known = Request.__dataclass_fields__
    wrong = [name for name in given if name not in known]
    if wrong:
        raise RequestError(f"request({wrong[0]}=...): expected {', '.join(known)}")
    if not any(value is not None for value in given.values()):
        raise RequestError("request() was given nothing; give query=, frames=, frame_scores= or prunable=")
    return Request(**given)


class GroupSource:
    """The `VisualSource` of one group of images or videos.

    Args:
        session: the attachment; its family and processor are asked.
        members: the items, all of one layout and from one call of the encoder.
        features: (G, n, D) what the language model would read for the items.
        embeds: (B, S, D) what would enter the language model. text: (B, S), its text columns. ids: (B, S) or None.
    """

    def __init__(
        self,
        session: Any,
        layout: MediaLayout,
        members: Sequence[Any],
        features: Tensor,
        embeds: Tensor,
        text: Tensor,
        ids: Tensor | None,
        request: Request | None,
    ) -> None:
        self.session, self.layout, self.members, self.features = session, layout, members, features
        self.embeds, self.text, self.ids, self.request = embeds, text, ids, request
        self.seen: Seen = members[0].seen

    # -- tower ---------------------------------------------------------------------------------------------------------

    @property
    def tower(self) -> TowerInfo:
        """The tower, as far as it can be asked for this layout: pooled frames have no tower token each."""
        info: TowerInfo = self.session.tower.info
        return info if not info.projects or self._has_tower_tokens() else dataclasses.replace(info, projects=False)

    def class_attention(self, layer: int) -> Tensor:
        return self._to_cells(self._scores("rows", layer))

    def attention_mass(self, layer: int) -> Tensor:
        return self._to_cells(self._scores("mass", layer))

    def probe_attention(self) -> Tensor:
        return self._to_cells(self._scores("probe", 0))

    def keys(self, layer: int) -> Tensor:
        scores = self._scores("keys", layer)  # (G, P, H, N', d)
        channels_first = scores.transpose(-1, -2)
        pooled = self._to_cells(channels_first.float(), total=False)
        return pooled.transpose(-1, -2)

    def hidden(self) -> Tensor:
        tokens = self._tower_tokens()
        if tokens is not None:
            return tokens
        features = self.features
        cells = torch.tensor(self.layout.cells, device=features.device)
        laid = features.new_zeros(features.shape[0], self.layout.total_cells, features.shape[2])
        laid[:, cells] = features
        return laid.unflatten(1, (self.layout.partitions, -1))

    def class_hidden(self) -> Tensor:
        return self._split(self.session.parts.tower_features(self.seen)[:, 0])

    def project(self, x: Tensor) -> Tensor:
        return self.session.parts.project(x) if self.tower.projects else x

    def dense(self) -> tuple[Tensor, tuple[int, int], Callable[[Tensor], Tensor]]:
        if self.seen.kind == "video" and self.seen.dense:
            frames = torch.cat(self.seen.dense)
            tokens = self._split(frames)
            return tokens, self._tower_grid(tokens.shape[2]), self.session.parts.finish
        return self.features.unflatten(1, (self.layout.partitions, -1)), self.layout.grid, _same

    def default_scorer(self) -> FrameScorer:
        from tokred.adapters.scorers import default_scorer

        return default_scorer()

    def newline(self) -> Tensor | None:
        return self.session.parts.newline()

    def carried(self, item: int) -> Tensor:
        """Cells that stand for the tokens as methods inside the tower left them, tile by tile; all of them, in order,
        where tokens of the tower and cells are not the same things."""
        layout, table = self.layout, self.seen.table
        if table is None or table.total != layout.cells_per_partition:
            return torch.tensor(layout.cells, device=self.features.device)
        if table.origins is None:
            return torch.arange(layout.total_cells, device=self.features.device)
        origins, member = table.origins, self.members[item]
        first = sum(self.session.parts.tiles(self.seen)[: member.index])
        cells = []
        for tile in range(layout.partitions):
            own = origins[first + tile]
            if table.valid is not None:
                own = own[table.valid[first + tile]]
            cells.append(own + tile * layout.cells_per_partition)
        return torch.cat(cells).to(self.features.device)

    def mark(self, name: str) -> Tensor:
        """(G, n, ...): a mark that a method inside the tower wrote, for each token of the prompt; of a token that
        stands for several of the tower, whether any has it, or the mean."""
        table = self.seen.table
        assert table is not None
        values = table.marks[name]
        if table.group is not None:
            index = table.group.clamp_min(0).reshape(*table.group.shape, *[1] * (values.dim() - 2))
            gone = (table.group < 0).reshape(index.shape)
            values = values.gather(1, index.expand(-1, -1, *values.shape[2:])).masked_fill(gone, 0)
        flat = values.flatten(2) if values.dim() > 2 else values[..., None]
        cells = self._to_cells(self._split(flat.float().transpose(1, 2)), total=values.dtype == torch.bool)
        tokens = cells.transpose(2, 3).flatten(1, 2)[:, torch.tensor(self.layout.cells, device=cells.device)]
        tokens = tokens > 0 if values.dtype == torch.bool else tokens.to(values.dtype)
        return tokens if values.dim() > 2 else tokens[..., 0]

    def _scores(self, what: str, layer: int) -> Tensor:
        found = self.seen.get(what, layer)
        if found is None:
            raise PreEncodedError(
                f"the {self.seen.kind} features of this call were encoded before the model was patched for this "
                "method, so the scores of its vision tower are missing; pass pixel values again"
            )
        if isinstance(self.session.tower, QwenTower):
            cells = self.layout.total_cells
            starts = list(itertools.accumulate((one.total_cells for one in self._layouts()), initial=0))
            picked = [found[starts[item.index] : starts[item.index] + cells] for item in self.members]  # joined or not
            return torch.stack(picked).unflatten(1, (self.layout.partitions, -1)).transpose(2, 3)
        return self._split(found)

    def _layouts(self) -> list[MediaLayout]:
        return self.session.parts.layouts(self.seen)

    def _split(self, tiles: Tensor) -> Tensor:
        """(all tiles, ...) -> (G, P, ...)."""
        starts = list(itertools.accumulate(self.session.parts.tiles(self.seen), initial=0))
        return torch.stack([tiles[starts[item.index] : starts[item.index + item.span]] for item in self.members])

    def _to_cells(self, values: Tensor, total: bool = True) -> Tensor:
        """Values (..., N') of the tower's own cells -> (..., N) of the layout's: the sum (or mean) over each."""
        rows, columns = self.layout.grid
        if values.shape[-1] == rows * columns:
            return values
        own = self._tower_grid(values.shape[-1])
        pooled = F.adaptive_avg_pool2d(values.flatten(0, -2).unflatten(-1, own).unsqueeze(1), (rows, columns))
        pooled = pooled.flatten(1).unflatten(0, values.shape[:-1])
        return pooled * (values.shape[-1] / (rows * columns)) if total else pooled

    def _tower_grid(self, cells: int) -> tuple[int, int]:
        rows, columns = self.layout.grid
        if (rows * self.layout.merge) * (columns * self.layout.merge) == cells:
            return rows * self.layout.merge, columns * self.layout.merge
        side = int(cells**0.5)
        return side, side

    def _has_tower_tokens(self) -> bool:
        """Whether the projector reads one tower token for each cell."""
        tokens = self.session.parts.tower_features(self.seen).shape[1] - getattr(self.session.tower, "prefix", 0)
        return bool(tokens == self.layout.cells_per_partition)

    def _tower_tokens(self) -> Tensor | None:
        """(G, P, N, C), where the projector reads one tower token for each cell."""
        if not self.tower.projects:
            return None
        hidden = self.session.parts.tower_features(self.seen)
        return self._split(hidden[:, getattr(self.session.tower, "prefix", 0) :])

    # -- request -------------------------------------------------------------------------------------------------------

    def query(self, item: int) -> str:
        row = self.members[item].row
        given = None if self.request is None else self.request.query
        if given is not None:
            return given if isinstance(given, str) else self._of_sample("query", given, row)
        processor = self.session.processor
        if processor is None or self.ids is None:
            name = type(self.session.method).__name__
            raise RequestError(
                f"{name} reads the question, and nothing here can turn token ids into text; use "
                "tokred.patch(model, method, processor=processor), or with patch.request(query=...): ..."
            )
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = self.ids[row][self.text[row].to(self.ids.device)]
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()

    def question_features(self, item: int) -> Tensor:
        row = self.members[item].row
        return self.embeds[row][self.text[row].to(self.embeds.device)]

    def frames(self, item: int) -> Tensor:
        given = None if self.request is None else self.request.frames
        if given is not None:
            chosen = given if _is_video(given) else self._of_item("frames", given, item)
            frames = torch.as_tensor(_stack(chosen))
            if frames.shape[0] < self.layout.partitions:
                raise RequestError(
                    f"frames has {frames.shape[0]} frames for a video of {self.layout.partitions}; give those that "
                    "the processor was given"
                )
            return frames
        if self.session.processor is None:
            raise RequestError(
                f"{type(self.session.method).__name__} looks at the frames; use tokred.patch(model, method, "
                "processor=processor), which undoes the normalisation, or with patch.request(frames=...): ..., or give "
                "the scores themselves: patch.request(frame_scores=...), or scorer= a tensor of them"
            )
        first, span = self.members[item].index, self.members[item].span
        pictures = [self.session.parts.pictures(self.seen, first + i, self._unscale) for i in range(span)]
        return torch.cat(pictures)

    def frame_scores(self, item: int) -> Tensor | None:
        given = None if self.request is None else self.request.frame_scores
        if given is None:
            return None
        flat = torch.as_tensor(given) if isinstance(given, Tensor) or _numbers(given) else None
        if flat is not None and flat.dim() == 1:
            return flat
        return torch.as_tensor(self._of_item("frame_scores", given, item))

    def _of_item(self, name: str, given: Sequence[Any], item: int) -> Any:
        """What was given for a video; a video made of images is the one of its sample."""
        one = self.members[item]
        if one.span > 1:
            return self._of_sample(name, given, one.row)
        return self._pick(name, given, one.index, len(self._layouts()), self.layout.kind)

    def _of_sample(self, name: str, given: Sequence[Any], row: int) -> Any:
        """What was given for a row of the batch, which `generate` may have repeated (beams)."""
        rows = self.embeds.shape[0]
        repeats = rows // len(given) if len(given) and rows % len(given) == 0 else 1
        return self._pick(name, given, row // repeats, rows // repeats, "sample")

    def _pick(self, name: str, given: Sequence[Any], index: int, count: int, what: str) -> Any:
        if len(given) == 1:
            return given[0]
        if len(given) != count:
            raise RequestError(f"request({name}=...) has {len(given)} entries for {count} {what}s; give one for each")
        return given[index]

    def _unscale(self, pixels: Tensor) -> Tensor:
        """Undo rescaling and normalisation: (T, 3, H, W) -> uint8."""
        processor = self.session.processor
        part = getattr(processor, f"{self.seen.kind}_processor", None) or getattr(
            processor, "image_processor", processor
        )
        pixels = pixels.float()
        if getattr(part, "do_normalize", True):
            mean = torch.tensor(part.image_mean, device=pixels.device)[:, None, None]
            std = torch.tensor(part.image_std, device=pixels.device)[:, None, None]
            pixels = pixels * std + mean
        factor = getattr(part, "rescale_factor", 1 / 255) if getattr(part, "do_rescale", True) else 1.0
        return (pixels / factor).round().clamp(0, 255).to(torch.uint8)


def _same(x: Tensor) -> Tensor:
    return x


def _numbers(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, (int, float)) for one in value)


def _is_video(value: Any) -> bool:
    """Whether `value` is one video: an array (T, H, W, 3), or a list of pictures."""
    if hasattr(value, "ndim"):
        return value.ndim == 4
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and not isinstance(value[0], (list, tuple))
        and not (hasattr(value[0], "ndim") and value[0].ndim == 4)
    )


def _stack(video: Any) -> Any:
    import numpy as np

    return video if hasattr(video, "ndim") else np.stack([np.asarray(frame) for frame in video])
