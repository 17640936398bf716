"""A method of the `Prompt` site at work: the model's first layers read the prompt, and a part of it goes on.

The first pass runs the model's own layers without a cache, and ends inside the layer that is asked, once it has its
queries and keys. What goes on is gathered from what entered the language model, so the ordinary prefill reads it as if
it were the prompt; the cache keeps the length of the caller's own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokred import ops
from tokred.adapters.decoder_parts import Decoder, Ear, Tapped
from tokred.adapters.decoder_tokens import media_steps, pack, places_of, positions_of
from tokred.adapters.logical_cache import Reduced
from tokred.adapters.prompt_session import Columns, Frame, PromptSession
from tokred.core.decoder import Prompt, PromptMethod
from tokred.core.trace import PromptStep

__all__ = ["PromptFilter", "entering"]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.chosen: tuple[object, Tensor, int] | None = None  # (generate, what went on, columns then)
        self.steps: tuple[PromptStep, ...] = ()


class PromptFilter:
    """One method of the `Prompt` site on one language model.

    Attributes:
        layer: the layer that is asked.
    """

    def __init__(self, front: PromptSession, decoder: Decoder, method: PromptMethod) -> None:
        self.front, self.decoder, self.method = front, decoder, method
        self.info, self.layer = decoder.info, -1
        self.compact = positions_of(method, decoder) == "compact"
        self.thread = _Thread()
        front.refuses["past_key_values=whole"] = (
            "the cache holds a prompt that was not filtered, and what follows cannot be chosen together with it"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.thread = _Thread()

    @property
    def steps(self) -> tuple[PromptStep, ...]:
        """What the last prompt of this thread lost."""
        return self.thread.steps

    def choose_layer(self, ear: Ear) -> None:
        """Ask the method for its layer; all layers are tapped meanwhile, for it may want to try the model."""

        def probe(ids: Tensor, layers: Sequence[int]) -> dict[int, Prompt]:
            module = self.decoder.module
            ids = ids.to(module.embed_tokens.weight.device)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            heard = ear.hear(layers, lambda: module.forward(**given), last_query=True)
            new = Columns.plain(torch.ones_like(ids, dtype=torch.bool))
            return {layer: self._view(tapped, new, layer) for layer, tapped in heard.items()}

        self.layer = self.method.filter_layer(self.info, probe)

    def apply(self, frame: Frame, kwargs: dict[str, Any], new: Columns, ear: Ear) -> tuple[dict[str, Any], Columns]:
        """Let the method choose what goes on, and gather it."""
        keep = self._chosen(frame, kwargs, new, ear)
        if keep is None:
            return kwargs, new
        index, real = pack(keep, None)
        gathered = self._gather(frame, kwargs, new.valid, index, real)
        frame.new = after = new.take(index, real)
        back = places_of(index, real, new.valid.shape[1])
        frame.back = back if frame.back is None else back.gather(1, frame.back)
        return gathered, after

    def _chosen(self, frame: Frame, kwargs: dict[str, Any], new: Columns, ear: Ear) -> Tensor | None:
        """(B, T) bool: what goes on; None for all. Without a cache, each pass of a `generate` repeats its choice."""
        run, known = self.front.thread.generation, self.thread.chosen
        length = new.valid.shape[1]
        if known is not None and known[0] is run and known[2] < length:
            keep = torch.cat([known[1], new.valid[:, known[2] :]], dim=1)
        else:
            keep = self._ask(frame, kwargs, new, ear)
            self.thread.chosen, self.thread.steps = (run, keep, length), ()
            if not torch.equal(keep, new.valid):
                self._note(frame, new, keep)
        return None if torch.equal(keep, new.valid) else keep

    def _ask(self, frame: Frame, kwargs: dict[str, Any], new: Columns, ear: Ear) -> Tensor:
        visual, text = new.visual.sum(1).tolist(), (new.valid & ~new.visual).sum(1).tolist()
        if all(self.method.bypasses(v, t) for v, t in zip(visual, text, strict=True)):
            return new.valid
        mask = self._mask(frame, kwargs, frame.types_now, new.valid, None)
        given = {**kwargs, "attention_mask": mask, "past_key_values": None, "use_cache": False}
        tapped = ear.hear([self.layer], lambda: self.decoder.module.forward(**given), last_query=True)[self.layer]
        with torch.no_grad():
            return self.method.choose(self._view(tapped, new, self.layer)) & new.valid

    def _view(self, tapped: Tapped, new: Columns, layer: int) -> Prompt:
        return Prompt(
            layer=layer,
            info=self.info,
            query=tapped.q[:, :, -1],
            keys=tapped.k,
            visual=new.visual,
            text=new.valid & ~new.visual,
            columns=new.origin,
            media=new.media,
        )

    def _note(self, frame: Frame, new: Columns, keep: Tensor) -> None:
        kept = tuple(tuple(new.origin[row][keep[row]].tolist()) for row in range(keep.shape[0]))
        ids = None if frame.ids is None else frame.ids.detach()
        total = tuple(int(n) for n in new.valid.sum(1))
        every = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        there = [every.masked_fill(~chosen, -1) for chosen in (new.valid, keep)]
        media = media_steps(self.layer, self.method.name, there[0], there[1], new)
        self.thread.steps = (PromptStep(self.method.name, self.layer, total, kept, ids, frame.length, media),)

    # -- what goes on --------------------------------------------------------------------------------------------------

    def _mask(self, frame: Frame, kwargs: Mapping[str, Any], types: Tensor | None, real: Tensor, cache: Any) -> Any:
        x = entering(kwargs)
        return self.front.parts.rebuild_mask(types, real.long(), x if x.dim() == 3 else None, cache)

    def _gather(
        self, frame: Frame, kwargs: dict[str, Any], before: Tensor, index: Tensor, real: Tensor
    ) -> dict[str, Any]:
        """Everything that enters the language model, for the columns `index` (B, K) alone."""
        out = dict(kwargs)
        length = before.shape[1]
        for name in ("input_ids", "inputs_embeds"):
            value = kwargs.get(name)
            if value is not None:
                out[name] = ops.gather_tokens(value, index) if value.dim() == 3 else value.gather(1, index)
        out["position_ids"], shift = self._positions(kwargs.get("position_ids"), before, index, real)
        types = frame.types_now
        if types is not None:
            frame.types_out = types = types[:, -length:].gather(1, index)
            if out.get("token_type_ids") is not None:
                out["token_type_ids"] = types
        out["attention_mask"] = self._mask(frame, out, types, real, kwargs.get("past_key_values"))
        if kwargs.get("deepstack_visual_embeds") is not None:
            masks = kwargs["visual_pos_masks"]
            numbers = (masks.flatten().long().cumsum(0) - 1).reshape(masks.shape).gather(1, index)
            out["visual_pos_masks"] = there = masks.gather(1, index) & real
            further = kwargs["deepstack_visual_embeds"]
            out["deepstack_visual_embeds"] = [rows[numbers[there].to(rows.device)] for rows in further]
        held = frame.state
        if held is not None and held.shift is not None:
            shift = held.shift if shift is None else shift + held.shift
        full = length if held is None else held.full
        frame.state = Reduced(mask=real, full=full, shift=shift, whole=bool(real.all()), types=types)
        return out

    def _positions(
        self, positions: Tensor | None, before: Tensor, index: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Positions of what goes on, and (B, 1) what they lie below the old ones from then on."""
        batch, length = before.shape
        if positions is None:
            positions = torch.arange(length, device=index.device)[None]
        if positions.dim() == 3:  # places in time and space
            axes = index[None].expand(positions.shape[0], -1, -1)
            return positions.expand(-1, batch, -1).gather(2, axes), None
        positions = positions.expand(batch, -1)
        taken, shift = positions.gather(1, index), None
        if self.compact:
            first = positions.gather(1, before.long().argmax(dim=1, keepdim=True))
            taken = first + real.long().cumsum(dim=1) - 1
            shift = before.sum(1, keepdim=True) - real.sum(1, keepdim=True)
        return torch.where(real, taken, positions.amin()), shift


def entering(kwargs: Mapping[str, Any]) -> Tensor:
    """(B, T) ids or (B, T, D) embeddings that enter the language model."""
    ids = kwargs.get("input_ids")
    return ids if ids is not None else kwargs["inputs_embeds"]
