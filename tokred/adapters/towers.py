"""Exact scores of the vision tower of a multimodal model, beside whatever attention it runs.

A tower is told which scores to compute (`Needs`); hooks on the chosen layers catch queries and keys as they are made,
and the scores are formed at once, so that no q, k or N x N matrix outlives its layer. Scores go to the `Seen` of the
running call: what one call of `get_image_features` leaves behind for the `VisualFeatures` site.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokred import ops
from tokred.core.errors import LayerError, NoClassTokenError, UnsupportedModelError
from tokred.core.sites import Needs, TowerInfo
from tokred.core.tokens import TokenTable

__all__ = ["PlainTower", "QwenTower", "Seen", "Tower"]

_KINDS = ("rows", "mass", "keys")


class Seen:
    """What one call of `get_image_features` or `get_video_features` saw.

    Attributes:
        kind: "image" or "video". arguments: of the call, by name. output: what it returned.
        scores: {(kind of score, layer): pieces}, one piece a call of the tower.
        dense: frame features before the host pooled them, where they were asked for.
        parts: {layer: q, k and the like} of layers that are running. session: whose patch watched the call.
        table: of the tokens inside the tower, where methods act there.
        plans: {item: (the `generate` call it is of, the method's answer)}, so that all its passes use one choice.
    """

    def __init__(self, kind: str, arguments: Mapping[str, Any]) -> None:
        self.kind = kind
        self.arguments = dict(arguments)
        self.output: Any = None
        self.scores: dict[tuple[str, int], list[Tensor]] = {}
        self.dense: list[Tensor] = []
        self.plans: dict[int, Any] = {}
        self.parts: dict[int, dict[str, Any]] = {}
        self.session: weakref.ref[Any] | None = None
        self.table: TokenTable | None = None

    def add(self, what: str, layer: int, value: Tensor) -> None:
        self.scores.setdefault((what, layer), []).append(value)

    def get(self, what: str, layer: int) -> Tensor | None:
        pieces = self.scores.get((what, layer))
        return None if pieces is None else torch.cat(pieces) if len(pieces) > 1 else pieces[0]


class Tower(ABC):
    """A vision tower. Scores of cells are (tiles, H, N), N in raster order of the tower's own grid.

    Attributes:
        module: the tower. info: in numbers.
    """

    info: TowerInfo

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def watch(self, needs: Needs, current: Callable[[], Seen | None]) -> list[Any]:
        """Hook the layers that `needs` names; `current` gives the `Seen` to fill, None while nothing is asked.

        Raises:
            LayerError, NoClassTokenError: the tower has no such layer, or no class token.
        """
        wanted: dict[int, set[str]] = {}
        for kind in _KINDS:
            for layer in getattr(needs, kind):
                wanted.setdefault(layer, set()).add(kind)
        for layer in wanted:
            if not 0 <= layer < self.info.depth:
                raise LayerError(f"tower layer {layer}: this vision tower has layers 0 to {self.info.depth - 1}")
        if needs.rows and not self.info.has_class:
            raise NoClassTokenError("class-token scores were asked of a vision tower without a class token")
        handles: list[Any] = []
        for layer, kinds in sorted(wanted.items()):
            handles += self.hook_layer(layer, frozenset(kinds), current)
        if needs.probe:
            handles += self.hook_probe(current)
        return handles

    @abstractmethod
    def hook_layer(self, layer: int, kinds: frozenset[str], current: Callable[[], Seen | None]) -> list[Any]:
        """Hook one layer so that the scores `kinds` of it go to `current()`."""

    def hook_probe(self, current: Callable[[], Seen | None]) -> list[Any]:
        raise UnsupportedModelError(f"{type(self.module).__name__} has no pooling head whose probe could be asked")


class PlainTower(Tower):
    """CLIP, SigLIP, InternVL's and Idefics' vision transformers: q_proj and k_proj, one sequence a tile."""

    def __init__(self, module: nn.Module, feature_layer: int | None, projects: bool) -> None:
        super().__init__(module)
        inner: Any = getattr(module, "vision_model", module)
        stack: Any = getattr(inner, "encoder", inner)
        layers = getattr(stack, "layers", None)
        self.layers: nn.ModuleList = layers if layers is not None else stack.layer
        embeddings = inner.embeddings
        attention = self._attention(0)
        classes = any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))
        self.prefix = 1 if classes else 0
        head = getattr(inner, "head", None)
        self.head: Any = head if hasattr(head, "probe") else None
        self.heads = _first(attention, "num_heads", "num_attention_heads")
        depth = len(self.layers)
        self.info = TowerInfo(
            depth=depth,
            heads=self.heads,
            has_class=classes,
            feature_layer=depth - 1 if feature_layer is None else feature_layer,
            has_probe=self.head is not None,
            projects=projects,
            dim=_width(attention),
        )

    def _attention(self, layer: int) -> Any:
        block = self.layers[layer]
        return block.self_attn if hasattr(block, "self_attn") else block.attention

    def hook_layer(self, layer: int, kinds: frozenset[str], current: Callable[[], Seen | None]) -> list[Any]:
        attention = self._attention(layer)
        watcher = LayerWatch(self, layer, kinds, current)
        q, k = (
            getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj", None) for name in ("q", "k")
        )
        if q is None or k is None:
            raise UnsupportedModelError(f"{type(attention).__name__} has no q_proj and k_proj to take scores from")
        return [
            q.register_forward_hook(Part(watcher, "q")),
            k.register_forward_hook(Part(watcher, "k")),
            attention.register_forward_pre_hook(Before(watcher), with_kwargs=True),
            attention.register_forward_hook(After(watcher)),
        ]

    def hook_probe(self, current: Callable[[], Seen | None]) -> list[Any]:
        if self.head is None:
            return super().hook_probe(current)
        return [self.head.register_forward_pre_hook(Probe(self, current))]

    def score(self, layer: int, kinds: frozenset[str], seen: Seen, parts: dict[str, Any]) -> None:
        """Form the scores of one layer from its q and k (tiles, N, H d)."""
        attention = self._attention(layer)
        q, k = (parts[name].detach().unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("q", "k"))
        scale = float(_first(attention, "scale", "scaling"))
        mask, table = parts.get("mask"), self._table(layer)
        if "rows" in kinds:
            rows = ops.attention_rows(q[:, :, :1], k, scale, mask=None if mask is None else mask[:, :, :1])
            seen.add("rows", layer, _scatter(rows[:, :, 0, self.prefix :], table))
        if "mass" in kinds:
            mass = ops.attention_mass(q, k, scale, mask=mask, query_weights=_real_tokens(mask, q.shape[0]))
            seen.add("mass", layer, _scatter(mass[:, :, self.prefix :], table))
        if "keys" in kinds:
            keys = k[:, :, self.prefix :].transpose(2, 3)  # (tiles, H, d, N)
            seen.add("keys", layer, _scatter(keys, table).transpose(2, 3))

    def _table(self, layer: int) -> TokenTable | None:
        """What became of the tower's tokens before this layer, where a method acts inside the tower."""
        seats = (vars(module).get("_tokred_seat") for module in self.module.modules())
        session = next((seat.session for seat in seats if seat is not None), None)
        state = None if session is None else session.call.running.get(layer)
        return None if state is None else state.entry[layer]

    def score_probe(self, seen: Seen, x: Tensor) -> None:
        """Attention of the pooling head's probe to the tokens x (tiles, N, C) that enter the head."""
        pool: nn.MultiheadAttention = self.head.attention
        width, heads = pool.embed_dim, pool.num_heads
        weight, bias = pool.in_proj_weight.detach(), pool.in_proj_bias.detach()
        probe = self.head.probe.detach().to(x.dtype).expand(x.shape[0], -1, -1)
        q = torch.nn.functional.linear(probe, weight[:width], bias[:width])
        k = torch.nn.functional.linear(x.detach(), weight[width : 2 * width], bias[width : 2 * width])
        q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
        seen.add("probe", 0, ops.attention_rows(q, k, (width // heads) ** -0.5)[:, :, 0, self.prefix :])


class QwenTower(Tower):
    """Qwen's vision transformers: all images in one sequence, cut into segments, in blocks of merged cells.

    Scores are those of merged cells (a token of the language model), (total tokens, H): attention summed over the cells
    that one token merges, in raster order of the token grid. In a windowed layer attention stays inside its window.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.blocks: nn.ModuleList = module.blocks  # type: ignore[assignment]
        attention: Any = self.blocks[0].attn
        self.heads = attention.num_heads
        self.unit = int(module.spatial_merge_size) ** 2  # type: ignore[arg-type]
        self.names = tuple(inspect.signature(type(attention).forward).parameters)[1:]
        depth = len(self.blocks)
        self.info = TowerInfo(
            depth=depth, heads=self.heads, has_class=False, feature_layer=depth - 1, dim=attention.proj.in_features
        )

    def hook_layer(self, layer: int, kinds: frozenset[str], current: Callable[[], Seen | None]) -> list[Any]:
        attention: Any = self.blocks[layer].attn
        watcher = LayerWatch(self, layer, kinds, current)
        return [
            attention.qkv.register_forward_hook(Part(watcher, "qkv")),
            attention.register_forward_pre_hook(Before(watcher), with_kwargs=True),
            attention.register_forward_hook(After(watcher)),
        ]

    def score(self, layer: int, kinds: frozenset[str], seen: Seen, parts: dict[str, Any]) -> None:
        attention: Any = self.blocks[layer].attn
        q, k, _ = parts["qkv"].detach().unflatten(-1, (3, self.heads, -1)).unbind(1)  # (L, H, d)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        q, k = rotate(q, k, *parts["rotary"])
        scale = float(_first(attention, "scaling", "scale"))
        if "mass" in kinds:
            mass = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            bounds = parts["segments"].tolist()
            for start, end in itertools.pairwise(bounds):
                piece = ops.attention_mass(
                    q[start:end].transpose(0, 1)[None], k[start:end].transpose(0, 1)[None], scale
                )
                mass[start:end] = piece[0].T
            seen.add("mass", layer, self._raster(seen, mass.unflatten(0, (-1, self.unit)).sum(1)))
        if "keys" in kinds:
            seen.add("keys", layer, self._raster(seen, k.unflatten(0, (-1, self.unit)).mean(1)))

    def _raster(self, seen: Seen, units: Tensor) -> Tensor:
        """Undo the window order of Qwen2.5-VL: (units, ...) as the merger gives them out."""
        module: Any = self.module
        if not hasattr(module, "window_size"):
            return units
        grid = seen.arguments.get(f"{seen.kind}_grid_thw")
        windows = sys.modules[type(module).__module__].get_vision_window_index(
            grid,
            spatial_merge_size=module.spatial_merge_size,
            window_size=module.window_size,
            patch_size=module.patch_size,
            kwargs={},
        )[0]
        return units[torch.argsort(windows.to(units.device))]


class LayerWatch:
    """What the hooks of one layer share: where its parts go, and what is made of them."""

    def __init__(
        self, tower: PlainTower | QwenTower, layer: int, kinds: frozenset[str], current: Callable[[], Seen | None]
    ) -> None:
        self.tower, self.layer, self.kinds, self.current = tower, layer, kinds, current

    def begin(self, parts: dict[str, Any]) -> None:
        seen = self.current()
        if seen is not None:
            seen.parts[self.layer] = parts

    def put(self, name: str, value: Tensor) -> None:
        seen = self.current()
        if seen is not None and self.layer in seen.parts:
            seen.parts[self.layer][name] = value

    def end(self) -> None:
        seen = self.current()
        if seen is None:
            return
        parts = seen.parts.pop(self.layer)
        with torch.no_grad():
            self.tower.score(self.layer, self.kinds, seen, parts)


class Part:
    """Forward hook of a projection (or the norm behind it): keep its output while the attention uses it."""

    def __init__(self, watch: LayerWatch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.watch.put(self.name, output)


class Before:
    """Forward pre-hook of an attention: its mask, rotary tables and segments."""

    def __init__(self, watch: LayerWatch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = getattr(self.watch.tower, "names", ("hidden_states", "attention_mask"))
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask.bool()[:, None, None]
        self.watch.begin(
            {
                "mask": mask if isinstance(mask, Tensor) else None,
                "rotary": given.get("position_embeddings"),
                "segments": given.get("cu_seqlens"),
            }
        )


class After:
    """Forward hook of an attention: its parts are complete."""

    def __init__(self, watch: LayerWatch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.watch.end()


class Probe:
    """Forward pre-hook of an attention pool."""

    def __init__(self, tower: PlainTower, current: Callable[[], Seen | None]) -> None:
        self.tower, self.current = tower, current

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen = self.current()
        if seen is not None:
            with torch.no_grad():
                self.tower.score_probe(seen, args[0])


def _scatter(values: Tensor, table: TokenTable | None) -> Tensor:
    """Values (tiles, H, ..., n) of present tokens -> (tiles, H, ..., N) of all cells: a merged token gives its value to
    every cell that it stands for, a dropped cell has 0."""
    group = None if table is None else table.group
    if group is None:
        return values
    flat = ops.unmerge_tokens(values.flatten(1, -2).transpose(1, 2), group)  # (tiles, N, H ...)
    return flat.transpose(1, 2).unflatten(1, values.shape[1:-1])


def _real_tokens(mask: Tensor | None, tiles: int) -> Tensor | None:
    """(tiles, N) float: 0 for padding, which asks for nothing; None where every token is real."""
    if mask is None:
        return None
    keys = mask[:, 0, 0].expand(tiles, -1)
    real = keys if keys.dtype == torch.bool else keys > torch.finfo(keys.dtype).min / 2
    return real.float()


def _first(module: nn.Module, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _width(attention: nn.Module) -> int:
    """Channels of all heads together."""
    return int(attention.q_proj.out_features)  # type: ignore[union-attr,arg-type]
