"""Small methods of the `VisualFeatures` site, each a way of answering, and the slow oracle of what a host must do.

The oracle takes the embeddings and positions that the unpatched library makes of one unpadded prompt, drops and adds
tokens by the definition, and decodes greedily without a cache, under masks written out here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tests.matrix.vlm_models import CLASS, END, IMAGE_ID, NEWLINE, SUPPRESS, Prompt, Tiny, language_of
from tokred.core.method import VisualMethod
from tokred.core.sites import MediaLayout, Needs, TowerInfo, VisualFeatures
from tokred.core.tokens import Keep, Resample

__all__ = ["Blend", "Evenly", "Reference", "Spy", "Uneven", "picks"]

Positions = Literal["compact", "original"] | None


def evenly(count: int, keep: int) -> list[int]:
    """`keep` of `count` positions, the first and the last among them."""
    return torch.linspace(0, count - 1, min(keep, count)).long().tolist()


@dataclass(frozen=True, repr=False)
class Evenly(VisualMethod):
    """Keeps evenly spaced tokens; `keep=None` keeps all, through the machinery unless `bypass`."""

    keep: int | None = 5
    positions: Positions = None
    keep_newline: bool = False
    bypass: bool = False

    name: ClassVar[str] = "probe_evenly"
    title: ClassVar[str] = "Evenly"
    paper: ClassVar[str] = "test"

    def kept(self, layout: MediaLayout) -> int:
        total = len(layout.cells)
        return total if self.keep is None else min(self.keep, total)

    def bypasses(self, layout: MediaLayout) -> bool:
        return self.bypass and super().bypasses(layout)

    def select(self, view: VisualFeatures) -> Keep:
        chosen = evenly(view.count, self.kept(view.layout))
        return Keep(torch.tensor(chosen).expand(view.items, -1))


@dataclass(frozen=True, repr=False)
class Uneven(VisualMethod):
    """Keeps more of an item the larger its first feature: another count for every image, by `Keep.valid`."""

    positions: Positions = None

    name: ClassVar[str] = "probe_uneven"
    title: ClassVar[str] = "Uneven"
    paper: ClassVar[str] = "test"

    def kept(self, layout: MediaLayout) -> int:
        return len(layout.cells) - 1

    def select(self, view: VisualFeatures) -> Keep:
        counts = [uneven_count(features) for features in view.features]
        width = max(counts)
        indices = torch.zeros(view.items, width, dtype=torch.long)
        valid = torch.zeros(view.items, width, dtype=torch.bool)
        for item, count in enumerate(counts):
            indices[item, :count], valid[item, :count] = torch.tensor(evenly(view.count, count)), True
        return Keep(indices, valid)


def uneven_count(features: Tensor) -> int:
    return 1 + int(features[0].abs().sum() * 1000) % (features.shape[0] - 1)


@dataclass(frozen=True, repr=False)
class Blend(VisualMethod):
    """New tokens, each the mean of neighbours; `rate` > 1 makes more tokens than there were."""

    rate: float = 0.5
    positions: Positions = None
    keep_end: bool = True

    name: ClassVar[str] = "probe_blend"
    title: ClassVar[str] = "Blend"
    paper: ClassVar[str] = "test"

    def kept(self, layout: MediaLayout) -> int:
        return len(blend_sources(len(layout.cells), self.rate))

    def bypasses(self, layout: MediaLayout) -> bool:
        return False

    def select(self, view: VisualFeatures) -> list[Resample]:
        sources = blend_sources(view.count, self.rate)
        return [
            Resample(torch.tensor(sources), blend(x, sources), lambda rows: blend(rows, sources), self.keep_end)
            for x in view.features
        ]


def blend_sources(count: int, rate: float) -> list[int]:
    made = max(1, round(count * rate))
    return [k * count // made for k in range(made)]


def blend(x: Tensor, sources: list[int]) -> Tensor:
    place = torch.tensor(sources)
    return 0.75 * x[place] + 0.25 * x[(place + 1) % x.shape[0]]


@dataclass(frozen=True, repr=False)
class Spy(VisualMethod):
    """Keeps 5 tokens and everything that it can ask of the view, at the layers given."""

    layers: tuple[int, ...] = (0, 2)
    kinds: tuple[str, ...] = ("mass", "keys")
    dense: bool = False
    asks: tuple[str, ...] = ()
    positions: Positions = None
    keep: int = 5
    record: bool = True
    seen: list = field(default_factory=list, compare=False)

    name: ClassVar[str] = "probe_spy"
    title: ClassVar[str] = "Spy"
    paper: ClassVar[str] = "test"

    def needs(self, tower: TowerInfo) -> Needs:
        kinds = {kind: frozenset(self.layers) for kind in self.kinds if kind != "probe"}
        return Needs(**kinds, probe="probe" in self.kinds, hidden=True, dense=self.dense, pixels="frames" in self.asks)

    def kept(self, layout: MediaLayout) -> int:
        return min(self.keep, len(layout.cells))

    def select(self, view: VisualFeatures) -> Keep:
        ask = {"rows": view.class_attention, "mass": view.attention_mass, "keys": view.keys}
        found: dict[str, Any] = {
            (kind, layer): ask[kind](layer) for kind in self.kinds if kind in ask for layer in self.layers
        }
        if "probe" in self.kinds:
            found["probe"] = view.probe_attention()
        for name in self.asks:
            value = getattr(view, name)
            if name in ("query", "frames", "frame_scores", "question_features"):
                value = [value(item) for item in range(view.items)]
            found[name] = value() if callable(value) else value
        if self.record:
            self.seen.append((view, found))
        return Keep(torch.tensor(evenly(view.count, self.kept(view.layout))).expand(view.items, -1))


def picks(method: VisualMethod, features: Tensor) -> tuple[list[int], Tensor | None]:
    """By definition: (sources, new features or None) for one item's prunable tokens (n, D)."""
    count = features.shape[0]
    if isinstance(method, Evenly):
        return evenly(count, count if method.keep is None else method.keep), None
    if isinstance(method, Spy):
        return evenly(count, method.keep), None
    if isinstance(method, Uneven):
        return evenly(count, uneven_count(features)), None
    assert isinstance(method, Blend)
    sources = blend_sources(count, method.rate)
    return sources, blend(features, sources)


class Reference:
    """One unpadded prompt, reduced and decoded by hand."""

    def __init__(self, model: nn.Module, tiny: Tiny, prompt: Prompt, method: VisualMethod) -> None:
        assert len(prompt.rows) == 1
        self.model, self.tiny, self.method = model, tiny, method
        self.language = language_of(model)
        given = self._captured(prompt)
        self.embeds: Tensor = given["inputs_embeds"]
        self.length = self.embeds.shape[1]
        base = 1 if tiny.name.startswith("paligemma") else 0
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(self.length)[None] + base
        self.full_positions: Tensor = positions
        self.types = prompt.inputs.get("token_type_ids", torch.zeros(1, self.length, dtype=torch.long))
        self.deepstack = given.get("deepstack_visual_embeds")
        self.visual = (prompt.inputs["input_ids"] == IMAGE_ID)[0]
        if given.get("visual_pos_masks") is not None:
            self.visual = given["visual_pos_masks"][0]
        self._reduce(prompt, base)

    def _captured(self, prompt: Prompt) -> dict[str, Any]:
        box: dict[str, Any] = {}
        handle = self.language.register_forward_pre_hook(lambda m, a, k: box.update(k), with_kwargs=True)
        with torch.no_grad():
            self.model(**prompt.inputs, use_cache=False)
        handle.remove()
        return box

    def _reduce(self, prompt: Prompt, base: int) -> None:
        """Walk the columns: text stays, every item is replaced at the place of its runs."""
        embeds, rows = self.embeds[0], {int(c): n for n, c in enumerate(self.visual.nonzero()[:, 0])}
        new_embeds: dict[int, list[tuple[int, Tensor, list[Tensor]]]] = {}
        dropped: set[int] = set()
        for columns, slots in prompt.media[0]:
            prunable = [c for c, slot in zip(columns, slots, strict=True) if slot >= 0]
            sources, made = picks(self.method, embeds[prunable])
            deep = [d[[rows[c] for c in prunable]] for d in self.deepstack or []]
            if made is None:
                kept = {prunable[source] for source in sources}
                dropped |= set(prunable) - kept
            else:
                dropped |= set(prunable)
                shifted = [blend(d, sources) for d in deep]
                for place, source in enumerate(sources):
                    entry = (prunable[source], made[place], [d[place] for d in shifted])
                    new_embeds.setdefault(prunable[source], []).append(entry)
            for column, slot in zip(columns, slots, strict=True):
                end = slot == END and getattr(self.method, "keep_end", True)
                line = slot == NEWLINE and self.method.keep_newline
                if slot < 0 and not (slot == CLASS or end or line):
                    dropped.add(column)
        order: list[tuple[int, Tensor, list[Tensor]]] = []
        flags: list[bool] = []
        for column in range(self.length):
            for entry in new_embeds.get(column, []):
                order.append(entry)
                flags.append(True)
            if column not in dropped:
                deep = [d[rows[column]] for d in self.deepstack] if self.deepstack and column in rows else []
                order.append((column, embeds[column], deep))
                flags.append(column in rows)
        self.columns = [column for column, _, _ in order]
        self.reduced = torch.stack([value for _, value, _ in order])[None]
        self.flags = torch.tensor(flags)[None]
        own = self.method.positions or ("original" if self.tiny.mrope else self.method.own_positions)
        index = torch.tensor(self.columns)
        self.positions = self.full_positions[..., index]
        if own == "compact":
            self.positions = torch.arange(len(order))[None] + base
        self.reduced_types = self.types[:, index]
        self.reduced_deep = None
        if self.deepstack:
            self.reduced_deep = [torch.stack([d[k] for _, _, d in order if d]) for k in range(len(self.deepstack))]

    # -- masks ---------------------------------------------------------------------------------------------------------

    def masks(self, total: int) -> Any:
        """Additive masks (1, 1, total, total), as the family defines them for a prompt and what was generated."""
        prompt = self.reduced.shape[1]
        rows, columns = torch.arange(total)[:, None], torch.arange(total)[None]
        causal = columns <= rows
        if self.tiny.name.startswith("paligemma"):  # every prompt token sees the whole prompt
            both = (rows < prompt) & (columns < prompt)
            full = additive(causal | both)
            if "2" not in self.tiny.name:
                return full
            return {"full_attention": full, "sliding_attention": full}
        if self.tiny.name.startswith("gemma3"):
            image = torch.zeros(total, dtype=torch.long)
            number, before = 0, False
            for place, kind in enumerate(self.reduced_types[0].tolist()):
                number += int(kind == 1 and not before)
                before = kind == 1
                image[place] = number if kind == 1 else 0
            same = (image[:, None] == image[None]) & (image > 0)[None]
            window = rows - columns < self.tiny.window  # type: ignore[attr-defined]
            return {"full_attention": additive(causal | same), "sliding_attention": additive((causal | same) & window)}
        return additive(causal)

    # -- decoding ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def hidden(self, embeds: Tensor, positions: Tensor) -> Tensor:
        extra = {}
        if self.reduced_deep is not None:
            flags = torch.zeros(embeds.shape[:2], dtype=torch.bool)
            flags[:, : self.flags.shape[1]] = self.flags
            extra = {"visual_pos_masks": flags, "deepstack_visual_embeds": self.reduced_deep}
        output = self.language(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=self.masks(embeds.shape[1]),
            use_cache=False,
            **extra,
        )
        return output.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V)."""
        logits = self.model.lm_head(hidden)  # type: ignore[operator]
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def generate(self, steps: int, tokens: list[int] | None = None) -> tuple[list[int], Tensor]:
        """Greedy tokens, or those given, and (steps, V) logits."""
        embeds, positions = self.reduced, self.positions
        step = self.full_positions[..., -1:] if self._original() else positions[..., -1:]
        chosen, logits = [], []
        for place in range(steps):
            scores = self.head(self.hidden(embeds, positions)[0, -1])
            logits.append(scores)
            allowed = scores.clone()
            allowed[SUPPRESS] = float("-inf")
            token = int(allowed.argmax()) if tokens is None else tokens[place]
            chosen.append(token)
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
            step = step + 1
            positions = torch.cat([positions, step], dim=-1)
        return chosen, torch.stack(logits)

    def _original(self) -> bool:
        own = self.method.positions or ("original" if self.tiny.mrope else self.method.own_positions)
        return own == "original"


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
