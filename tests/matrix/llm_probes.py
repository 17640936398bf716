"""Small methods inside a language model, each a way of answering, and the slow oracle of what a host must do.

The oracle calls the model's own layers one by one on a single unpadded prompt, with masks, rotary tables and a store of
keys and values that are made here. Prompt tokens run as in a prefill, each layer on those present there; a new token
attends, at each layer, to the entries that the definition leaves there. Attention is the library's eager one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tests.matrix.llm_models import Request
from tests.matrix.vlm_models import SUPPRESS
from tests.matrix.vlm_probes import Evenly, additive, evenly
from tests.matrix.vlm_probes import Reference as VisualReference
from tokred.core.decoder import (
    CacheAfterPrefill,
    CacheCut,
    DecoderMethod,
    FeedForward,
    LayerNeeds,
    Neurons,
    PrefillLayer,
    Prompt,
    PromptMethod,
    Survivors,
)
from tokred.core.method import Method
from tokred.core.sites import DecoderInfo

__all__ = ["Attended", "Chosen", "Firing", "Folded", "Reference", "Signed", "Spaced", "Trim"]

Positions = Literal["compact", "original"] | None
DecodePosition = Literal["logical", "cache_length"] | None


def layer_of(layer: int, depth: int) -> int:
    """A layer; negative ones count from `depth`, behind the last."""
    return layer if layer >= 0 else depth + 1 + layer


class Probe(DecoderMethod):
    """A method that drops tokens before the layers `before`."""

    paper: ClassVar[str] = "test"
    listed: ClassVar[bool] = False
    before: tuple[int, ...]

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        return {layer_of(layer, info.depth): self.needs() for layer in self.before}

    def needs(self) -> LayerNeeds:
        return LayerNeeds()

    def number(self, layer: int, depth: int) -> int:
        """Which of `before` a layer is."""
        return [layer_of(one, depth) for one in self.before].index(layer)


def chosen_of(visual: Tensor, keep: int) -> Tensor:
    """(B, T) bool: `keep` evenly spaced ones of each row's visual tokens."""
    chosen = torch.zeros_like(visual)
    for row, flags in enumerate(visual):
        places = flags.nonzero()[:, 0]
        if len(places):
            chosen[row, places[evenly(len(places), keep)]] = True
    return chosen


@dataclass(frozen=True, repr=False)
class Spaced(Probe):
    """Keeps `keep` evenly spaced visual tokens of each row, None for all of them."""

    before: tuple[int, ...] = (1, 3)
    keep: tuple[int | None, ...] = (5, 3)
    positions: Positions = None
    cut: bool = False
    decode_position: DecodePosition = None

    name: ClassVar[str] = "probe_spaced"
    title: ClassVar[str] = "Spaced"

    def prune(self, view: PrefillLayer) -> Survivors | None:
        keep = self.keep[self.number(view.layer, view.info.depth)]
        if keep is None:
            return Survivors(view.valid, cut_earlier_cache=self.cut)
        return Survivors(chosen_of(view.visual, keep), cut_earlier_cache=self.cut)


@dataclass(frozen=True, repr=False)
class Signed(Probe):
    """Keeps the visual tokens whose first feature is positive: as many as there are, maybe none."""

    before: tuple[int, ...] = (2,)
    positions: Positions = None
    cut: bool = False

    name: ClassVar[str] = "probe_signed"
    title: ClassVar[str] = "Signed"

    def prune(self, view: PrefillLayer) -> Survivors:
        return Survivors(view.hidden[..., 0] > 0, cut_earlier_cache=self.cut)


@dataclass(frozen=True, repr=False)
class Attended(Probe):
    """Keeps the `keep` visual tokens that the last one attends to most."""

    before: tuple[int, ...] = (2, 4)
    keep: int = 4
    own: bool = False
    positions: Positions = None
    seen: list = field(default_factory=list, compare=False)

    name: ClassVar[str] = "probe_attended"
    title: ClassVar[str] = "Attended"

    def needs(self) -> LayerNeeds:
        return LayerNeeds(previous=not self.own, own=self.own, embeddings=True)

    def prune(self, view: PrefillLayer) -> Survivors:
        rows = view.attention_rows(view.last, own=self.own)
        self.seen.append((view, rows, view.embeddings()))
        scores = rows.mean(dim=1)[:, 0].masked_fill(~view.visual, -1)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        return Survivors(torch.zeros_like(view.visual).scatter(1, best, True))


@dataclass(frozen=True, repr=False)
class Folded(Probe):
    """Keeps evenly spaced visual tokens in reversed order, with the mean of those that go added to each."""

    before: tuple[int, ...] = (2,)
    keep: int = 4
    positions: Positions = None

    name: ClassVar[str] = "probe_folded"
    title: ClassVar[str] = "Folded"

    def prune(self, view: PrefillLayer) -> Survivors:
        keep = chosen_of(view.visual, self.keep)
        gone = view.visual & ~keep
        mean = (view.hidden * gone[..., None]).sum(1, keepdim=True) / gone.sum(1).clamp_min(1)[:, None, None]
        hidden = torch.where(keep[..., None], view.hidden + mean, view.hidden)
        places = torch.arange(keep.shape[1]).expand_as(view.visual)
        first = view.visual.long().argmax(dim=1, keepdim=True)
        last = torch.where(view.visual, places, -1).amax(dim=1, keepdim=True)
        return Survivors(keep, order=torch.where(view.visual, first + last - places, places), hidden=hidden)


@dataclass(frozen=True, repr=False)
class Trim(Probe):
    """Takes every second visual entry from the cache of some layers, and zeroes every third of others."""

    keep_at: tuple[int, ...] = (1, 3)
    zero_at: tuple[int, ...] = (5,)
    decode_position: DecodePosition = None
    before: tuple[int, ...] = ()
    seen: list = field(default_factory=list, compare=False)

    name: ClassVar[str] = "probe_trim"
    title: ClassVar[str] = "Trim"
    sites: ClassVar[tuple[str, ...]] = ("CacheAfterPrefill",)

    def cuts_cache(self, info: DecoderInfo) -> bool:
        return True

    def cut_cache(self, view: CacheAfterPrefill) -> CacheCut:
        self.seen.append(view)
        number = [visual.long().cumsum(dim=1) - 1 for visual in view.visual]
        return CacheCut(
            keep={i: ~(view.visual[i] & (number[i] % 2 == 1)) for i in self.keep_at},
            zero={i: view.visual[i] & (number[i] % 3 == 0) for i in self.zero_at},
        )


@dataclass(frozen=True, repr=False)
class Firing(Probe):
    """Decodes with the neurons that fire at the last token of each prompt, and marks tokens that fire more than not."""

    at: tuple[int, ...] = (0, 2)
    before: tuple[int, ...] = ()
    positions: Positions = None

    name: ClassVar[str] = "probe_firing"
    title: ClassVar[str] = "Firing"
    sites: ClassVar[tuple[str, ...]] = ("FeedForward", "PrefillLayer")

    def sparse_layers(self, info: DecoderInfo) -> frozenset[int]:
        return frozenset(self.at)

    def neurons(self, view: FeedForward) -> Neurons:
        active = view.activations[:, -1] > 0
        return Neurons(active, {"probe_fires": view.activations.sum(dim=-1) > 0})

    def prune(self, view: PrefillLayer) -> Survivors:
        return Survivors(view.marks["probe_fires"])


@dataclass(frozen=True, repr=False)
class Chosen(PromptMethod):
    """Keeps `rate` of the columns of each prompt, evenly spaced; all of prompts that have no more than `least`."""

    rate: float = 0.5
    layer: int = 1
    least: int = 0
    positions: Positions = None
    seen: list = field(default_factory=list, compare=False)

    name: ClassVar[str] = "probe_chosen"
    title: ClassVar[str] = "Chosen"
    paper: ClassVar[str] = "test"
    listed: ClassVar[bool] = False

    def filter_layer(self, info: DecoderInfo, probe: Any) -> int:
        return self.layer

    def bypasses(self, visual: int, text: int) -> bool:
        return visual + text <= self.least or self.rate == 1

    def choose(self, view: Prompt) -> Tensor:
        self.seen.append(view)
        keep = torch.zeros_like(view.valid)
        for row, valid in enumerate(view.valid):
            places = valid.nonzero()[:, 0]
            keep[row, places[self.picks(len(places))]] = True
        return keep

    def picks(self, count: int) -> list[int]:
        return list(range(count)) if count <= self.least else evenly(count, max(1, round(self.rate * count)))


class Store:
    """Keys and values by layer, in the place of a KV cache of the library."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer in self.keys:
            keys = torch.cat([self.keys[layer], keys], dim=2)
            values = torch.cat([self.values[layer], values], dim=2)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values


@dataclass
class Present:
    """The tokens at a layer, n of them: x (1, n, D), positions (..., 1, n), and lists of n values."""

    x: Tensor
    positions: Tensor
    columns: list[int]
    visual: list[bool]
    types: list[int]
    deep: list[Tensor]
    fires: list[bool] = field(default_factory=list)

    def take(self, places: Sequence[int]) -> Present:
        index = torch.tensor(places)
        return Present(
            self.x[:, index],
            self.positions[..., index],
            [self.columns[p] for p in places],
            [self.visual[p] for p in places],
            [self.types[p] for p in places],
            [rows[index] for rows in self.deep],
            [self.fires[p] for p in places] if self.fires else [],
        )


class Reference:
    """One unpadded prompt under some probes, run and decoded by hand.

    Attributes:
        kept: {layer: columns of the prompt that are left}. rows: {layer: (H, n) attention of the last token there}.
    """

    def __init__(self, model: Any, request: Request, methods: Method | Sequence[Method]) -> None:
        assert len(request.rows) == 1
        methods = list(methods) if isinstance(methods, Sequence) else [methods]
        self.model, self.request, self.host = model, request, request.host
        self.prompts = [m for m in methods if isinstance(m, Chosen)]
        self.visual = next((m for m in methods if isinstance(m, Evenly)), None)
        self.methods = [m for m in methods if isinstance(m, Probe)]
        self.decoder = self.host.decoder(model)
        config = self.decoder.config
        self.depth = config.num_hidden_layers
        self.kinds = getattr(config, "layer_types", None) or [None] * self.depth
        self.window = getattr(config, "sliding_window", None)
        self.start = self._start()
        self.kept: dict[int, list[int]] = {}
        self.rows: dict[int, Tensor] = {}

    # -- the prompt ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self) -> Present:
        """What enters the language model."""
        if self.host.visual is not None:
            return self._visual_start()
        ids = self.request.inputs["input_ids"]
        n = ids.shape[1]
        assert self.request.prunable is not None
        visual = self.request.prunable[0].tolist()
        start = Present(
            self.model.get_input_embeddings()(ids), torch.arange(n)[None], list(range(n)), visual, [0] * n, []
        )
        self.step = torch.tensor([[n]])
        return self._choose(start)

    def _visual_start(self) -> Present:
        """By the oracle of what comes before the language model."""
        method = self.visual or Evenly(None, positions="original", keep_newline=True)
        assert self.host.visual is not None
        before = VisualReference(self.model, self.host.visual, self.request.prompt, method)
        media = {column for columns, _ in self.request.prompt.media[0] for column in columns}
        compact = self.visual is not None and not before._original()
        last = before.positions if compact else before.full_positions
        self.step = last[..., -1:] + 1
        deep = []
        for rows in before.reduced_deep or []:
            dense = torch.zeros_like(before.reduced[0])
            dense[before.flags[0]] = rows
            deep.append(dense)
        start = Present(
            before.reduced,
            before.positions,
            before.columns,
            [column in media for column in before.columns],
            before.reduced_types[0].tolist(),
            deep,
        )
        return self._choose(start)

    def _choose(self, start: Present) -> Present:
        for method in self.prompts:
            places = method.picks(len(start.columns))
            n = len(start.columns)
            start = start.take(places)
            if not self.host.mrope and (method.positions or method.own_positions) == "compact":
                start.positions = start.positions[..., :1] + torch.arange(len(places))
                self.step = self.step - (n - len(places))
        return start

    # -- masks, rotary tables ------------------------------------------------------------------------------------------

    def _sliding(self, layer: int) -> bool:
        return self.kinds[layer] == "sliding_attention" if self.kinds[layer] else self.window is not None

    def mask(self, layer: int, types: list[int]) -> Tensor:
        """Additive (1, 1, n, n) mask of a prompt."""
        n, name = len(types), self.host.name
        rows, columns = torch.arange(n)[:, None], torch.arange(n)[None]
        allowed = columns <= rows
        if name.startswith("paligemma"):
            allowed = torch.ones_like(allowed)
        if self.host.visual is not None and name.startswith("gemma3"):
            image, number = [], 0
            for place, kind in enumerate(types):
                number += int(kind == 1 and (place == 0 or types[place - 1] != 1))
                image.append(number if kind == 1 else 0)
            block = torch.tensor(image)
            allowed = allowed | ((block[:, None] == block[None]) & (block > 0)[None])
        if self._sliding(layer):
            allowed = allowed & (rows - columns < self.window)
        return additive(allowed)

    def rotary(self, layer: int, x: Tensor, positions: Tensor) -> Any:
        rotary = self.decoder.rotary_emb
        if "layer_type" in inspect.signature(type(rotary).forward).parameters:
            return rotary(x, positions, self.kinds[layer])
        return rotary(x, positions[-3:] if positions.dim() == 3 else positions)

    def run(self, layer: int, x: Tensor, mask: Tensor, positions: Tensor, store: Any) -> tuple[Tensor, Tensor]:
        """What a layer makes of x (1, n, D), and its attention weights (H, n, keys)."""
        weights: list[Tensor] = []
        handle = self.decoder.layers[layer].self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
        out = self.decoder.layers[layer](
            x,
            attention_mask=mask,
            position_embeddings=self.rotary(layer, x, positions),
            past_key_values=store,
            use_cache=True,
        )
        handle.remove()
        return out[0] if isinstance(out, tuple) else out, weights[0][0]

    # -- prefill -------------------------------------------------------------------------------------------------------

    def prefill(self, start: Present) -> Present:
        """Run the prompt; afterwards `store`, `entered` and `active` are what decoding goes by."""
        self.store, self.entered, self.active = Store(), [], {}
        self.kept, self.rows = {}, {}
        now, cuts = start, []
        weights = None
        for layer in range(self.depth + 1):
            for method in self.methods:
                if layer in method.layers(DecoderInfo(depth=self.depth, dim=1, width=1, layer_macs=1)):
                    after = self.drop(method, layer, now, weights)
                    if after.columns != now.columns:
                        self.kept[layer] = after.columns
                        if getattr(method, "cut", False):
                            cuts.append((layer, set(after.columns)))
                    now = after
            if layer == self.depth:
                break
            self.entered.append(now)
            fires: list[Tensor] = []
            down = self.down(layer).register_forward_pre_hook(lambda m, a: fires.append(a[0]))  # noqa: B023
            x, weights = self.run(layer, now.x, self.mask(layer, now.types), now.positions, self.store)
            down.remove()
            if layer < len(now.deep):
                x = x + now.deep[layer]
            now = Present(x, now.positions, now.columns, now.visual, now.types, now.deep, now.fires)
            for method in self.methods:
                if isinstance(method, Firing) and layer in method.at:
                    self.active[layer] = fires[0][0, -1] > 0
                    now.fires = (fires[0][0].sum(dim=-1) > 0).tolist()
        self._cut(cuts)
        return now

    def down(self, layer: int) -> nn.Module:
        mlp = self.decoder.layers[layer].mlp
        return mlp.down_proj if hasattr(mlp, "down_proj") else mlp.c_proj

    def drop(self, method: Probe, layer: int, now: Present, weights: Tensor | None) -> Present:
        """The tokens that go on, by the definition of each probe."""
        visual = [place for place, flag in enumerate(now.visual) if flag]
        if not visual:
            return now
        stay: Sequence[int] = visual
        if isinstance(method, Spaced):
            keep = method.keep[method.number(layer, self.depth)]
            stay = visual if keep is None else [visual[place] for place in evenly(len(visual), keep)]
        elif isinstance(method, Folded):
            stay = [visual[place] for place in evenly(len(visual), method.keep)]
        elif isinstance(method, Signed):
            stay = [place for place in visual if now.x[0, place, 0] > 0]
        elif isinstance(method, Firing):
            stay = [place for place in visual if now.fires[place]]
        elif isinstance(method, Attended):
            if method.own:
                weights = self.run(layer, now.x, self.mask(layer, now.types), now.positions, Store())[1]
            assert weights is not None
            self.rows[layer] = weights[:, -1]
            scores = weights[:, -1].mean(dim=0)
            stay = sorted(visual, key=lambda place: -float(scores[place]))[: method.keep]
        going = sorted(set(visual) - set(stay))
        order = [place for place in range(len(now.columns)) if place not in going]
        if isinstance(method, Folded):
            order.sort(key=lambda place: visual[0] + visual[-1] - place if place in visual else place)
            x = now.x.clone()
            if going:
                x[0, list(stay)] += now.x[0, going].mean(dim=0)
            now = Present(x, now.positions, now.columns, now.visual, now.types, now.deep, now.fires)
        after = now.take(order)
        compact = (method.positions or method.own_positions) == "compact"
        if compact and not self.host.mrope and after.columns != now.columns:
            after.positions = now.positions.amin() + torch.arange(len(order))[None]
        return after

    def _cut(self, cuts: list[tuple[int, set[int]]]) -> None:
        """What the cache holds of each layer, and what positions are less there."""
        trim = next((m for m in self.methods if isinstance(m, Trim)), None)
        by_length = any(m.decode_position == "cache_length" for m in self.methods)
        self.shifts = []
        for layer, now in enumerate(self.entered):
            stay = [p for p, c in enumerate(now.columns) if all(layer >= b or c in left for b, left in cuts)]
            visual = [place for place, flag in enumerate(now.visual) if flag]
            if trim is not None and layer in trim.keep_at:
                stay = [place for place in stay if place not in visual[1::2]]
            if trim is not None and layer in trim.zero_at:
                self.store.keys[layer][:, :, visual[::3]] = 0
                self.store.values[layer][:, :, visual[::3]] = 0
            cut = len(stay) < len(now.columns)
            if self._sliding(layer):  # a new token sees so many entries before it; what was cut counts no more
                stay = [place for place in stay if place > len(now.columns) - self.window]
            self.store.keys[layer] = self.store.keys[layer][:, :, stay]
            self.store.values[layer] = self.store.values[layer][:, :, stay]
            shift = 0
            if not self.host.mrope:
                following = int(now.positions.max()) + 1
                if by_length:
                    following = int(self.entered[0].positions.min()) + (len(stay) if cut else len(now.columns))
                shift = int(self.entered[0].positions.max()) + 1 - following
            self.shifts.append(shift)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def decode(self, x: Tensor, position: Tensor) -> Tensor:
        """One new token (1, 1, D) through all layers."""
        for layer in range(self.depth):
            keys = self.store.keys[layer].shape[2] + 1
            allowed = torch.ones(1, keys, dtype=torch.bool)
            if self._sliding(layer):
                allowed[:, : max(0, keys - self.window)] = False
            handle = None
            if layer in self.active:
                active = self.active[layer]
                handle = self.down(layer).register_forward_pre_hook(lambda m, a: (a[0] * active,))  # noqa: B023
            x = self.run(layer, x, additive(allowed), position - self.shifts[layer], self.store)[0]
            if handle is not None:
                handle.remove()
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V)."""
        logits = self.model.lm_head(self.decoder.norm(x))
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(self) -> tuple[Tensor, list[int]]:
        """Logits (n, V) of a prefill, and the columns of the prompt that they are of; gradients flow."""
        now = self.prefill(self.start)
        return self.head(now.x)[0], now.columns

    @torch.no_grad()
    def generate(self, steps: int, tokens: list[int] | None = None, cached: bool = True) -> tuple[list[int], Tensor]:
        """Greedy tokens, or those given, and (steps, V) logits; without `cached`, each pass reads all anew."""
        given, position = self.start, self.step
        x = self.prefill(given).x[:, -1:]
        chosen, logits = [], []
        for place in range(steps):
            scores = self.head(x)[0, -1]
            logits.append(scores)
            allowed = scores.clone()
            allowed[SUPPRESS] = float("-inf")
            chosen.append(int(allowed.argmax()) if tokens is None else tokens[place])
            x = self.model.get_input_embeddings()(torch.tensor([[chosen[-1]]]))
            if cached:
                x = self.decode(x, position)
            else:
                given = Present(
                    torch.cat([given.x, x], dim=1),
                    torch.cat([given.positions, position], dim=-1),
                    [*given.columns, max(given.columns) + 1],
                    [*given.visual, False],
                    [*given.types, 0],
                    [nn.functional.pad(rows, (0, 0, 0, 1)) for rows in given.deep],
                )
                x = self.prefill(given).x[:, -1:]
            position = position + 1
        return chosen, torch.stack(logits)
