"""Methods at work inside one language model of transformers.

Before a layer of a prefill where a method drops tokens, hidden states, mask and rotary tables are made anew for that
layer and all later ones; afterwards the cache carries what each layer holds, and steps on it get a mask and positions
for each layer. A method of the `Prompt` site acts first: the model's own first layers read the prompt without a cache,
up to the queries and keys of one layer, and a part of the prompt goes on.

State belongs to one pass and one thread; what outlives the pass travels on the KV cache.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokred import ops
from tokred.adapters.cache_cuts import UNCUTTABLE, cut_layer, held_entries, zero_entries
from tokred.adapters.decoder_parts import Decoder, Ear, Tapped, tap_layer, untap_layer
from tokred.adapters.decoder_tokens import (
    Present,
    following_position,
    gather_rows,
    layer_step,
    pack,
    places_of,
    positions_of,
    renumbered,
)
from tokred.adapters.hooks import Hook
from tokred.adapters.logical_cache import Layered, Reduced, layer_states, set_layers
from tokred.adapters.prompt_filter import PromptFilter, entering
from tokred.adapters.prompt_session import Columns, Frame, PromptSession
from tokred.adapters.swap import swap_class, unswap_class
from tokred.core.decoder import (
    CacheAfterPrefill,
    CacheCut,
    DecoderMethod,
    FeedForward,
    LayerNeeds,
    PrefillLayer,
    PromptMethod,
    Survivors,
)
from tokred.core.errors import (
    ConflictError,
    LayerError,
    RequestError,
    UnsupportedGenerationError,
)
from tokred.core.method import Method
from tokred.core.trace import PromptStep, Trace

__all__ = ["DecoderSession"]


class Pass:
    """One pass of the language model.

    Attributes:
        start: the tokens that entered. now: those at the layer that runs. at: {layer: those that entered it}.
        prefill: whether it reads a prompt. layered: what the cache's layers hold, in later passes.
        full: columns of the language model, those of the cache included. valid: (B, full) in a later one, None for all.
        taps: what layers that a method asks about worked on. masks, rotary: made once for layers that are alike.
        active: neurons of MLPs. embeds: what entered. deepstack: features that are added behind the first layers.
        cuts: (layer, tokens): in layers before it only these stay in the cache. steps: for the trace.
        first: in a later pass, the first layer that does not hold the whole prompt.
    """

    def __init__(self, start: Present | None, prefill: bool, layered: Layered | None = None) -> None:
        self.start, self.now, self.prefill, self.layered = start, start, prefill, layered
        self.at: dict[int, Present] = {}
        self.taps: dict[int, Tapped] = {}
        self.masks: dict[Any, Any] = {}
        self.rotary: dict[Any, Any] = {}
        self.active: dict[int, Tensor] = {}
        self.steps: list[tuple[int, str, Present, Present]] = []
        self.embeds: Tensor | None = None
        self.deepstack: tuple[Tensor, list[Tensor]] | None = None
        self.valid: Tensor | None = None
        self.cuts: list[tuple[int, Present]] = []
        self.full = 0
        self.first = 0

    @property
    def whole(self) -> bool:
        """Whether all tokens that entered are still there (marks may have been written)."""
        return self.now is None or self.start is None or self.now.columns is self.start.columns


class _Thread(threading.local):
    def __init__(self) -> None:
        self.passes: list[Pass | None] = []
        self.trace: tuple[Any, ...] = ()


class DecoderSession:
    """Methods inside one language model.

    Attributes:
        front: keeps the books of the prompt around it. decoder: the language model. filter: carries out the method of
            the `Prompt` site, or None. methods: the others. rules: {layer: (method, needs)}.
    """

    def __init__(self, front: PromptSession, decoder: Decoder, methods: Sequence[Method]) -> None:
        self.front, self.decoder = front, decoder
        self.info = decoder.info
        prompts = [m for m in methods if isinstance(m, PromptMethod)]
        if len(prompts) > 1:
            raise ConflictError("two methods choose what part of the prompt the language model reads; give one of them")
        self.methods = [m for m in methods if isinstance(m, DecoderMethod)]
        self.all_methods = list(methods)
        self.rules = self._bind()
        self.sparse = self._bind_sparse()
        self._one(
            "rewrite the KV cache", [m for m in self.methods if m.cuts_cache(self.info) or m.cuts_early(self.info)]
        )
        self.cutter = next((m for m in self.methods if m.cuts_cache(self.info)), None)
        self.by_length = any((m.decode_position or m.own_decode_position) == "cache_length" for m in self.methods)
        for method in self.methods:
            positions_of(method, decoder)
            front.refuses.update(method.refuses)
        front.checks_always = True
        if self.cutter is not None or self.rules:
            front.refuses.update(UNCUTTABLE)
        self.filter = PromptFilter(front, decoder, prompts[0]) if prompts else None
        self.handles: list[Any] = []
        self.tapped: list[Any] = []
        self.swapped: list[nn.Module] = []
        self._reset()

    def _reset(self) -> None:
        self.thread, self.ear = _Thread(), Ear()
        self._newest: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("thread", "ear", "_newest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # -- what the methods want -----------------------------------------------------------------------------------------

    def _bind(self) -> dict[int, tuple[DecoderMethod, LayerNeeds]]:
        rules: dict[int, tuple[DecoderMethod, LayerNeeds]] = {}
        for method in self.methods:
            for layer, needs in method.layers(self.info).items():
                if layer in rules:
                    raise ConflictError(
                        f"{type(rules[layer][0]).__name__} and {type(method).__name__} both drop tokens before layer "
                        f"{layer}; give them different layers"
                    )
                if not 1 <= layer <= self.info.depth:
                    raise LayerError(
                        f"{type(method).__name__} drops tokens before layer {layer}; this model has "
                        f"{self.info.depth} layers, so 1 to {self.info.depth} can be meant"
                    )
                if needs.own and layer == self.info.depth:
                    raise LayerError(f"{type(method).__name__}: there is no layer {layer} whose queries could be asked")
                rules[layer] = (method, needs)
        return dict(sorted(rules.items()))

    def _bind_sparse(self) -> dict[int, DecoderMethod]:
        wanting = [m for m in self.methods if m.sparse_layers(self.info)]
        method = self._one("choose the neurons of MLPs", wanting)
        if method is None:
            return {}
        layers = sorted(method.sparse_layers(self.info))
        if layers[-1] >= self.info.depth:
            raise LayerError(f"{type(method).__name__}: layer {layers[-1]} of a model with {self.info.depth} layers")
        return dict.fromkeys(layers, method)

    def _one(self, what: str, methods: Sequence[DecoderMethod]) -> DecoderMethod | None:
        if len(methods) > 1:
            names = " and ".join(type(m).__name__ for m in methods)
            raise ConflictError(f"{names} both {what}; give one of them")
        return methods[0] if methods else None

    # -- installation --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        self.front.notes_columns = True
        module, layers = self.decoder.module, self.decoder.layers
        if self.filter is not None:
            every = range(len(layers))
            for index in every:
                self._tap(index)
            self.filter.choose_layer(self.ear)
            for index in every:
                if index != self.filter.layer:
                    self._untap(index)
        for layer, (_, needs) in self.rules.items():
            for index in [layer - 1] * needs.previous + [layer] * needs.own:
                self._tap(index)
        self.handles.append(module.register_forward_pre_hook(Hook(self, "before"), with_kwargs=True))
        self.handles.append(module.register_forward_hook(Hook(self, "after"), always_call=True, prepend=True))
        if not (self.rules or self.sparse or self.cutter):
            return
        for index, layer in enumerate(layers):
            self.handles.append(layer.register_forward_pre_hook(Hook(self, "before_layer", index), with_kwargs=True))
            if self.rules and (index < self.decoder.deepstack or index == max(self.rules) - 1 == self.info.depth - 1):
                self.handles.append(layer.register_forward_hook(Hook(self, "after_layer", index), prepend=True))
        for index in self.sparse:
            mlp = layers[index].mlp
            down = getattr(mlp, self.decoder.mlp(index).down)
            self.handles.append(down.register_forward_pre_hook(Hook(self, "before_down", index)))
            swap_class(mlp, _mlp_class)
            mlp._tokred_mlp = (self, index)
            self.swapped.append(mlp)

    def _tap(self, index: int) -> None:
        attention = self.decoder.layers[index].self_attn
        if attention not in self.tapped:
            tap_layer(attention, Listener(self), index)
            self.tapped.append(attention)

    def _untap(self, index: int) -> None:
        attention = self.decoder.layers[index].self_attn
        untap_layer(attention)
        self.tapped.remove(attention)

    def remove(self) -> None:
        """Take everything away again; safe to call twice."""
        for handle in reversed(self.handles):
            handle.remove()
        for attention in self.tapped:
            untap_layer(attention)
        for module in self.swapped:
            unswap_class(module)
            module.__dict__.pop("_tokred_mlp", None)
        self.handles, self.tapped, self.swapped = [], [], []

    @property
    def trace(self) -> Trace:
        """What the last prefill of this thread (else of any thread) kept."""
        return Trace(None, language=self.thread.trace or self._newest)

    @property
    def running(self) -> Pass | None:
        return self.thread.passes[-1] if self.thread.passes else None

    # -- the language model --------------------------------------------------------------------------------------------

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin a pass."""
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        self.thread.passes.append(None)
        frame = self.front.frame
        if frame is None:  # the language model alone, not through the model that was patched
            return None
        if self.front.inner.training and "training" in self.front.refuses:
            raise UnsupportedGenerationError(f"a pass in training mode is refused: {self.front.refuses['training']}")
        cache = kwargs.get("past_key_values")
        if frame.past > 0:
            layered = layer_states(cache)
            if layered is not None:
                self.thread.passes[-1] = self._later(frame, kwargs, layered)
            return (), kwargs
        new = self._columns(frame, kwargs)
        request = self.front.thread.request
        told = request is not None and request.prunable is not None
        if self.rules and not self.sparse and self.front.asks_prunable and not told:
            name = type(next(iter(self.rules.values()))[0]).__name__
            raise RequestError(
                f"{name} drops tokens that are marked as prunable, and a text model marks none by itself; use "
                "with patch.request(prunable=mask): ..., a bool mask of the shape of input_ids"
            )
        self.thread.trace = ()
        if self.filter is not None and self.front.thread.generation is not None:
            kwargs, new = self.filter.apply(frame, kwargs, new, self.ear)
            self.thread.trace = self._newest = self.filter.steps
        if self.rules or self.sparse or self.cutter:
            self.thread.passes[-1] = self._begin(frame, kwargs, new)
        return (), kwargs

    def _columns(self, frame: Frame, kwargs: Mapping[str, Any]) -> Columns:
        """What is known of the columns that enter the language model."""
        new = frame.new
        if new is None:
            new = Columns.plain(frame.real(entering(kwargs)))
        request = self.front.thread.request
        if request is not None and request.prunable is not None:
            new = self._mark_prunable(request.prunable, frame, new)
        return new

    def _mark_prunable(self, prunable: Tensor, frame: Frame, new: Columns) -> Columns:
        rows = new.visual.shape[0]
        given = torch.as_tensor(prunable)
        fits = given.dim() == 2 and given.dtype == torch.bool and rows % max(given.shape[0], 1) == 0
        prompt = self.front.thread.prompt  # of `generate`, which without a cache comes back with new tokens behind it
        length = frame.length if prompt is None else prompt.shape[1]
        if not fits or given.shape[1] != length:
            raise RequestError(
                f"request(prunable=...) has shape {tuple(given.shape)} and dtype {given.dtype}; expected a bool mask "
                f"(samples, {length}), True for the tokens of each prompt that may be dropped"
            )
        given = torch.nn.functional.pad(given, (0, frame.length - length))
        given = given.to(new.visual.device).repeat_interleave(rows // given.shape[0], dim=0)
        return replace(new, visual=given.gather(1, new.origin) & new.valid)

    def _begin(self, frame: Frame, kwargs: dict[str, Any], new: Columns) -> Pass:
        """A prefill: note the tokens that enter."""
        x = entering(kwargs)
        batch, length = x.shape[:2]
        positions = None
        if not self.decoder.mrope:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(length, device=x.device)[None]
            positions = positions.expand(batch, -1)
        columns = torch.arange(length, device=x.device).expand(batch, -1)
        start = Present(columns, new.valid, new.visual, new.media, positions, new.marks, frame.types_now)
        running = Pass(start, prefill=True)
        running.full = length
        if any(needs.embeddings for _, needs in self.rules.values()):
            ids = kwargs.get("input_ids")
            running.embeds = kwargs["inputs_embeds"] if ids is None else self.decoder.module.embed_tokens(ids)
        deep = kwargs.get("deepstack_visual_embeds")
        if deep is not None and self.rules and min(self.rules) < len(deep):
            # the library adds these behind its first layers, at columns that may be gone by then
            running.deepstack = (kwargs["visual_pos_masks"], list(deep))
            kwargs["visual_pos_masks"] = kwargs["deepstack_visual_embeds"] = None
        return running

    def _later(self, frame: Frame, kwargs: dict[str, Any], layered: Layered) -> Pass:
        """A pass on a cache whose layers hold parts of the prompt."""
        running = Pass(None, prefill=False, layered=layered)
        x = entering(kwargs)
        total = frame.past + x.shape[1]
        running.full = total
        running.first = next((i for i, state in enumerate(layered.states) if state is not None), len(layered.states))
        mask = frame.mask
        if mask is None and any(s is not None and not s.whole for s in layered.states):
            mask = torch.ones(x.shape[0], total, dtype=torch.long, device=x.device)
        running.valid = mask
        return running

    def after(self, args: tuple[Any, ...], output: Any) -> Any:
        """End a pass: the cache carries what its layers hold, and hidden states go back to the length that entered."""
        if not self.thread.passes:  # the pass raised before it began
            return None
        running = self.thread.passes.pop()
        if output is None or running is None or not running.prefill:
            return None
        assert running.start is not None
        assert running.now is not None
        cache = output.past_key_values if hasattr(output, "past_key_values") else None
        if cache is not None:
            self._carry(running, cache)
        self._record(running)
        if running.whole or not self.front.restore_length:
            return None
        hidden = output[0]
        place = places_of(running.now.columns, running.now.valid, running.full)
        restored = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))
        if isinstance(output, tuple):
            return (restored, *output[1:])
        output.last_hidden_state = restored
        return None

    # -- layers --------------------------------------------------------------------------------------------------------

    def before_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running = self.running
        if running is None:
            return None
        if running.prefill:
            return self._prefill_layer(running, index, args, kwargs)
        assert running.layered is not None
        state = running.layered.states[index]
        if state is None and index < running.first:
            return None  # as the library made it: masks have the size of the first layer of each kind
        hidden, cache = args[0], kwargs.get("past_key_values")
        key = (id(state), self.decoder.kinds[index])
        if key not in running.masks:
            valid = running.valid
            if valid is not None and state is not None:
                valid = state.translate(valid, running.full)
            if valid is not None and bool(valid.all()):
                valid = None
            running.masks[key] = self.decoder.mask(index, valid, hidden, cache, None, False)
        kwargs = {**kwargs, "attention_mask": running.masks[key]}
        if state is not None and state.shift is not None:
            if key not in running.rotary:
                positions = kwargs["position_ids"] - state.shift.to(hidden.device)
                running.rotary[key] = self.decoder.rotary(index, hidden, positions)
            kwargs["position_embeddings"] = running.rotary[key]
        return args, kwargs

    def _prefill_layer(self, running: Pass, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        if index in self.rules:
            hidden = self._prune(running, index, hidden, kwargs)
        now = running.now
        assert now is not None
        running.at[index] = now
        if running.whole:
            return None
        return (hidden, *args[1:]), self._fit(running, index, hidden, kwargs)

    def _fit(self, running: Pass, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What travels beside the tokens, for those that are present."""
        now = running.now
        assert now is not None
        key = (id(now.columns), self.decoder.kinds[index])
        if key not in running.masks:
            valid = None if bool(now.valid.all()) else now.valid
            cache = kwargs.get("past_key_values")
            running.masks[key] = self.decoder.mask(index, valid, hidden, cache, now.types, True)
            if now.positions is not None:
                running.rotary[key] = self.decoder.rotary(index, hidden, now.positions)
            else:
                cos, sin = kwargs["position_embeddings"]
                running.rotary[key] = (gather_rows(cos, now.columns), gather_rows(sin, now.columns))
        return {
            **kwargs,
            "attention_mask": running.masks[key],
            "position_embeddings": running.rotary[key],
            "position_ids": None,
        }

    def after_layer(self, index: int, args: tuple[Any, ...], output: Any) -> Any:
        running = self.running
        if running is None or not running.prefill:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden
        if running.deepstack is not None and index < len(running.deepstack[1]):
            changed = self._add_deepstack(running, index, changed)
        last = index == self.info.depth - 1
        if last and index + 1 in self.rules:
            changed = self._prune(running, index + 1, changed, {})
        if changed is hidden:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _add_deepstack(self, running: Pass, index: int, hidden: Tensor) -> Tensor:
        assert running.deepstack is not None
        assert running.now is not None
        masks, rows = running.deepstack
        masks = masks.to(hidden.device)
        numbers = (masks.flatten().long().cumsum(0) - 1).reshape(masks.shape).gather(1, running.now.columns)
        there = masks.gather(1, running.now.columns) & running.now.valid
        hidden = hidden.clone()
        hidden[there] = hidden[there] + rows[index].to(hidden.device, hidden.dtype)[numbers[there]]
        return hidden

    def _prune(self, running: Pass, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Ask the method that acts before `layer`; returns what goes on, (B, K, D)."""
        now, start = running.now, running.start
        assert now is not None
        assert start is not None
        if not bool(now.visual.any()):
            running.taps.pop(layer - 1, None)
            return hidden
        method, needs = self.rules[layer]
        if needs.own:
            running.taps[layer] = self._ask_layer(running, layer, hidden, kwargs)
        view = PrefillLayer(
            layer=layer,
            info=self.info,
            hidden=hidden,
            visual=now.visual,
            text=now.valid & ~now.visual,
            columns=now.columns,
            media=now.media,
            initial=start.visual.sum(dim=1),
            marks=now.marks,
            source=RunningLayer(self, running, layer),
        )
        answer = method.prune(view)  # with gradients: what it merges into `hidden` goes on
        running.taps.clear()
        if answer is None:
            return hidden
        return self._carry_out(running, layer, method, hidden, answer)

    def _carry_out(self, running: Pass, layer: int, method: DecoderMethod, hidden: Tensor, answer: Survivors) -> Tensor:
        now = running.now
        assert now is not None
        if answer.marks:
            now = replace(now, marks={**now.marks, **answer.marks})
        stay = now.valid & (answer.keep | ~now.visual)
        merged = hidden if answer.hidden is None else answer.hidden.to(hidden)
        if bool((stay == now.valid).all()) and answer.order is None:
            running.now = now
            return merged
        index, real = pack(stay, answer.order)
        after = now.take(index, real)
        if positions_of(method, self.decoder) == "compact" and after.positions is not None:
            after = replace(after, positions=renumbered(now, real))
        running.now = after
        if answer.cut_earlier_cache:
            running.cuts.append((layer, after))
        running.steps.append((layer, method.name, now, after))
        return ops.gather_tokens(merged, index)

    def _ask_layer(self, running: Pass, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tapped:
        """Queries and keys of a layer that has not run yet, made by its own modules."""
        if not running.whole:
            kwargs = self._fit(running, layer, hidden, kwargs)
        block = self.decoder.layers[layer]
        given = {**kwargs, "past_key_values": None, "use_cache": False}
        return self.ear.hear([layer], lambda: type(block).forward(block, hidden, **given))[layer]

    def listen(self, index: int) -> Callable[[Tapped], None] | None:
        """Who wants the queries and keys of layer `index` now."""
        if self.ear.listener is not None:
            return self.ear.listener(index)
        running = self.running
        if running is None or not running.prefill:
            return None
        rule = self.rules.get(index + 1)
        if rule is None or not rule[1].previous:
            return None
        taps = running.taps

        def hear(tapped: Tapped) -> None:
            taps[index] = tapped

        return hear

    # -- MLPs ----------------------------------------------------------------------------------------------------------

    def before_down(self, index: int, args: tuple[Tensor, ...]) -> None:
        """Show the method the activations of a prefill."""
        running = self.running
        if running is None or not running.prefill:
            return
        now = running.now
        assert now is not None
        view = FeedForward(index, self.info, args[0].detach(), now.visual, now.valid & ~now.visual)
        with torch.no_grad():
            answer = self.sparse[index].neurons(view)
        if answer is None:
            return
        if answer.marks:
            running.now = running.at[index] = replace(now, marks={**now.marks, **answer.marks})
        if answer.active is not None:
            running.active[index] = answer.active

    def mlp(self, index: int, whole: Callable[..., Any], x: Tensor) -> Tensor:
        """Run an MLP, or the part of it that the request's cache names."""
        running = self.running
        if running is None or running.prefill or running.layered is None:
            return whole(x)
        part = running.layered.sparse.get(index)
        return whole(x) if part is None else part(x)

    # -- behind the prompt ---------------------------------------------------------------------------------------------

    def _carry(self, running: Pass, cache: Any) -> None:
        """Cut the cache, and let it carry what its layers hold."""
        depth, start = self.info.depth, running.start
        assert start is not None
        entered = [running.at[index] for index in range(depth)]
        cut = self._cuts(running, entered)
        states: list[Reduced | None] = []
        made: dict[Any, tuple[Reduced | None, Tensor | None]] = {}
        for index, now in enumerate(entered):
            stay = None if cut is None else cut.keep.get(index)
            if cut is not None and index in cut.zero:
                zero_entries(cache.layers[index], cut.zero[index] & now.valid, index)
            if stay is not None:
                stay = now.valid & stay
                stay = None if bool((stay == now.valid).all()) else stay
                held = held_entries(cache.layers[index], index)
                stay = None if stay is None else stay[:, stay.shape[1] - held :]
            key = (id(now.columns), None if stay is None else (stay.shape[1], bytes(stay.cpu().flatten().tolist())))
            if key not in made:
                made[key] = self._state(running, now, stay)
            state, taken = made[key]
            if taken is not None:
                cut_layer(cache.layers[index], taken, index)
            states.append(state)
        sparse = {
            index: self.decoder.mlp(index).slice(self.decoder.layers[index].mlp, active)
            for index, active in running.active.items()
        }
        if any(state is not None for state in states) or sparse:
            set_layers(cache, Layered(running.full, start.valid.shape[0], tuple(states), sparse))

    def _cuts(self, running: Pass, entered: Sequence[Present]) -> CacheCut | None:
        """What a method wants of the cache, and what leaves it with the tokens that were dropped."""
        keep: dict[int, Tensor] = {}
        zero: Mapping[int, Tensor] = {}
        for before, survivors in running.cuts:
            alive = survivors.present(running.full)
            for index in range(before):
                stay = alive.gather(1, entered[index].columns)
                keep[index] = stay & keep[index] if index in keep else stay
        if self.cutter is not None:
            view = CacheAfterPrefill(
                info=self.info,
                columns=[now.columns for now in entered],
                valid=[now.valid for now in entered],
                visual=[now.visual for now in entered],
                marks={index: now.marks for index, now in enumerate(entered)},
            )
            answer = self.cutter.cut_cache(view)
            if answer is not None:
                zero = answer.zero
                for index, chosen in answer.keep.items():
                    keep[index] = chosen & keep[index] if index in keep else chosen
        return CacheCut(keep, zero) if keep or zero else None

    def _state(self, running: Pass, now: Present, stay: Tensor | None) -> tuple[Reduced | None, Tensor | None]:
        """What a layer holds whose entries are `now`, of which only `stay` stay; and which to take, if it is cut.

        Where the layer attends in a window that has dropped entries itself, `stay` (B, held) is of those that it holds.
        """
        start = running.start
        assert start is not None
        if stay is None:
            valid, index = now.valid, None
        else:
            index, valid = pack(stay, None)
        shift = None
        if now.positions is not None:
            assert start.positions is not None
            following = following_position(start.positions, start.valid)
            here = following_position(now.positions, now.valid)
            if self.by_length:
                first = start.positions.masked_fill(~start.valid, torch.iinfo(torch.long).max).amin(1, keepdim=True)
                here = first + valid.sum(dim=1, keepdim=True)
            shift = following - here
            shift = shift if bool(shift.any()) else None
        whole = bool(valid.all())
        if index is None and shift is None and now.columns is start.columns:
            return None, None
        return Reduced(mask=valid, full=running.full, shift=shift, whole=whole), index

    # -- trace ---------------------------------------------------------------------------------------------------------

    def _record(self, running: Pass) -> None:
        new = self.front.frame.new if self.front.frame is not None else None
        prompt = tuple(step for step in self.thread.trace if isinstance(step, PromptStep))
        steps = tuple(layer_step(layer, name, now, after, new) for layer, name, now, after in running.steps)
        self.thread.trace = self._newest = (*prompt, *steps)


class RunningLayer:
    """The `LayerSource` of one layer in a prefill."""

    def __init__(self, session: DecoderSession, running: Pass, layer: int) -> None:
        self.session, self.running, self.layer = session, running, layer

    def _tapped(self, own: bool) -> Tapped:
        return self.running.taps[self.layer if own else self.layer - 1]

    @property
    def _now(self) -> Present:
        assert self.running.now is not None
        return self.running.now

    def attention_rows(self, own: bool, rows: Tensor) -> Tensor:
        return self._tapped(own).rows(rows, self._now.valid)

    def queries(self, own: bool) -> Tensor:
        return self._tapped(own).q

    def keys(self, own: bool) -> Tensor:
        return self._tapped(own).k

    def values(self, own: bool) -> Tensor:
        return self._tapped(own).v

    def embeddings(self) -> Tensor:
        assert self.running.embeds is not None
        return ops.gather_tokens(self.running.embeds, self._now.columns)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.session.decoder.module.norm(x)


class Listener:
    """Tells a tapped layer who listens."""

    def __init__(self, session: DecoderSession) -> None:
        self.session = session

    def __call__(self, index: int) -> Callable[[Tapped], None] | None:
        return self.session.listen(index)


def _mlp_class(base: type) -> dict[str, Any]:
    """An MLP that may run a part of itself."""
    inherited = base.forward  # type: ignore[attr-defined]

    @functools.wraps(inherited)
    def forward(self: Any, x: Tensor) -> Tensor:
        session, index = self._tokred_mlp
        return session.mlp(index, functools.partial(inherited, self), x)

    return {"forward": forward}
