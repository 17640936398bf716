"""How a vision encoder carries out reductions: what the hosts of all model libraries share.

A `Session` joins methods to one encoder. It hooks the blocks (to slice what travels beside the tokens, and to reduce
after a block), swaps the class of blocks that reduce between attention and MLP, and swaps the class of the encoder so
that each of its entry points opens a scope. Only the subclasses of `EncoderHost` know a model library.

Token tables are kept by layer and never overwritten, so a recomputation sees what the first run saw and makes the same
choice.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred import ops
from tokred.adapters.hooks import Hook
from tokred.adapters.passes import Call, PassSession
from tokred.core.budget import check_choice
from tokred.core.errors import ConflictError, InvalidParameterError, RaggedInputError
from tokred.core.host import Host
from tokred.core.method import EncoderMethod, Method
from tokred.core.sites import AttentionTap, EncoderBlock, EncoderInfo
from tokred.core.tokens import Keep, Merge, TokenTable
from tokred.core.trace import Trace

__all__ = ["EncoderHost", "ForwardState", "Session"]


class ForwardState:
    """What one forward pass knows: the table as it entered and left each block, and as it is now."""

    def __init__(self, table: TokenTable) -> None:
        self.table = table
        self.entry: dict[int, TokenTable] = {}
        self.exit: dict[int, TokenTable] = {}

    def enter(self, layer: int) -> TokenTable:
        if layer not in self.entry:
            self.entry[layer] = self.table
        return self.entry[layer]

    def leave(self, layer: int, table: TokenTable) -> None:
        if layer not in self.exit:
            self.exit[layer] = table
            self.table = table

    def after(self, layer: int) -> TokenTable:
        """The table of the tokens that left `layer`, whether or not that block was hooked."""
        past = [index for index in self.exit if index <= layer]
        if past:
            return self.exit[max(past)]
        return self.entry[min(self.entry)] if self.entry else self.table


class Scope:
    """One call of an entry point: facts about its input, and the state once a block has begun it."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self.state: ForwardState | None = None


class EncoderCall(Call[ForwardState]):
    """What a running call keeps at hand: its scope, and what the layer that runs now has captured."""

    def __init__(self) -> None:
        super().__init__()
        self.scope: Scope | None = None
        self.running: dict[int, ForwardState] = {}
        self.taps: dict[int, dict[str, Any]] = {}


class EncoderHost(Host):
    """A family of vision encoders. Subclasses fill in what differs between model libraries.

    Attributes:
        encoder: the module whose entry points open a scope. info: its dimensions.
    """

    sites: ClassVar[tuple[str, ...]] = ("EncoderBlock",)
    #: whether a layer can be made to form its attention matrix itself (then it serves output and score)
    forms_matrix: ClassVar[bool] = False

    encoder: nn.Module
    info: EncoderInfo
    patch_size: tuple[int, int]

    @staticmethod
    @abstractmethod
    def extend_encoder(base: type) -> dict[str, Any]:
        """Attributes of the encoder's subclass, from `scoped_entries`; a top-level function, so that it pickles."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order; block `l` of a method is `blocks[l]`."""

    def prepare(self, session: Session) -> None:
        """Put in place what belongs to no scored layer (say, hooks of a pool); register it with the session."""

    @abstractmethod
    def add_taps(self, session: Session, layer: int, wants: frozenset[str]) -> None:
        """Hook one layer's attention so that `session.call.taps[layer]` fills up; register handles with the session.

        The session itself puts the block's input there, as "input".
        """

    @abstractmethod
    def read_tap(self, session: Session, layer: int, captured: dict[str, Any]) -> AttentionTap:
        """Make the tap from what the hooks captured."""

    @abstractmethod
    def attention_half(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """First residual half of a block: (B, N, C) -> (B, N, C), by the block's own modules."""

    @abstractmethod
    def mlp_half(self, block: nn.Module, x: Tensor) -> Tensor:
        """Second residual half of a block."""

    @abstractmethod
    def slice_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Callable[[], Tensor], bias: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fit what travels beside the tokens to a reduced sequence.

        Args:
            positions: gives (B, N') int64, the original position (prefix included) of each present token.
            bias: (B, N') float32 to add to the attention logits of each key (log size, -inf for padding), or None.
        """

    def tokens_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The (B, N, C) input of a block."""
        return args[0] if args else kwargs["hidden_states"]

    def tokens_out(self, output: Any) -> Tensor:
        """The (B, N, C) output of a block."""
        return output[0] if isinstance(output, tuple) else output

    def with_tokens(self, output: Any, x: Tensor) -> Any:
        """`output` of a block with its tokens replaced."""
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def observe(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Facts about the input of entry point `name`: "grid" (rows, columns), "valid" (B, n) bool."""
        return {}

    def run_entry(
        self, session: Session, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run entry point `name` inside a scope; the place to restore grids and to pool by size."""
        return call(*args, **kwargs)

    def restore(self, session: Session, x: Tensor, table: TokenTable) -> Tensor:
        """Scatter reduced tokens (B, prefix + n, C) to every position, as the session fills them."""
        prefix = self.info.prefix
        return torch.cat([x[:, :prefix], table.restore(x[:, prefix:], session.fill)], dim=1)

    def form_matrix(self, layer: int, on: bool) -> None:
        """Make the attention of a layer form its matrix (only where `forms_matrix`)."""

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patch tokens for an image of (height, width)."""
        height, width = self.patch_size
        if size[0] % height or size[1] % width:
            raise InvalidParameterError(f"image size {size} is no multiple of the patch size {self.patch_size}")
        return size[0] // height, size[1] // width

    def info_for(self, size: tuple[int, int] | None) -> EncoderInfo:
        """`info` for images of another size."""
        if size is None:
            if self.info.tokens == 0:
                raise InvalidParameterError("this encoder has no image size of its own; give the size of the input")
            return self.info
        grid = self.grid_for(size)
        tokens = grid[0] * grid[1]
        return replace(self.info, tokens=tokens, grid=grid)

    def default_exit(self) -> str:
        return "reduced"

    def attach(self, methods: Sequence[Method], options: Mapping[str, Any]) -> Session:
        encoder_methods = [m for m in methods if isinstance(m, EncoderMethod)]
        session = Session(self, encoder_methods, options)
        try:
            session.install()
        except BaseException:
            session.remove()
            raise
        return session


class Session(PassSession[EncoderCall, ForwardState]):
    """Methods at work on one encoder.

    Attributes:
        rules: {layer: (method, rule)} for the layers where tokens are removed.
        exit: "reduced" hands the reduced tokens on, "restore" scatters them back to every position first.
        fill: what "restore" writes where a token was dropped, "nearest" or "zeros".
    """

    def __init__(self, host: EncoderHost, methods: Sequence[EncoderMethod], options: Mapping[str, Any]) -> None:
        self.host = host
        self.exit = options.get("exit") or host.default_exit()
        self.fill = options.get("fill", "nearest")
        self.score_backend = options.get("score_backend", "auto")
        check_choice("exit", self.exit, ("reduced", "restore"))
        check_choice("fill", self.fill, ("nearest", "zeros"))
        check_choice("score_backend", self.score_backend, ("auto", "recompute", "matrix"))
        if self.score_backend == "matrix" and not host.forms_matrix:
            raise InvalidParameterError(
                f"score_backend='matrix': attention of {host.family} models cannot hand out its matrix; "
                "use 'auto' or 'recompute'"
            )
        self.rules = _bind_all(methods, host.info)
        active = [method for method, _ in self.rules.values()]
        self.size_bias = any(method.proportional_attention for method in active)
        self.pool_by_size = any(method.weighted_pool for method in active)
        self.formed: list[int] = []
        self.passes_kept = 4 * host.info.depth
        super().__init__(EncoderCall)

    # -- installation ------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put hooks and classes in place. Without a rule nothing is touched: the model stays bit-identical."""
        if not self.rules:
            return
        blocks = self.host.blocks
        self.host.prepare(self)
        for layer, (method, _) in sorted(self.rules.items()):
            if self._forms_matrix(layer, method):
                self.formed.append(layer)
                self.host.form_matrix(layer, True)
            self.host.add_taps(self, layer, method.taps)
        for layer in range(min(self.rules), self.host.info.depth):
            block = blocks[layer]
            self.handles.append(block.register_forward_pre_hook(Hook(self, "before", layer), with_kwargs=True))
            after = Hook(self, "after", layer)
            self.handles.append(block.register_forward_hook(after, prepend=True, with_kwargs=True))
            if layer in self.rules and self.rules[layer][0].placement == "attn":
                self.seat(block, layer, _block_class)
        self.seat(self.host.encoder, -1, type(self.host).extend_encoder)

    def seat(self, module: nn.Module, layer: int, extend: Callable[[type], dict[str, Any]]) -> None:
        """Swap the class of `module` and tell it where its session is; `remove` undoes it."""
        self.swap(module, extend, Seat(self, layer))

    def _forms_matrix(self, layer: int, method: EncoderMethod) -> bool:
        if self.score_backend != "auto":
            return self.score_backend == "matrix"
        parameter = next(self.host.blocks[layer].parameters())
        if not self.host.forms_matrix or parameter.dtype not in (torch.float32, torch.float64):
            return False  # in half precision the model's matrix is too coarse to rank by
        # On the CPU one pass that forms the matrix beats fused attention plus a second pass (findings 11); where a
        # method reads the whole matrix, forming it once is the least work anywhere.
        return "matrix" in method.taps or ("mass" in method.taps and parameter.device.type == "cpu")

    def remove(self) -> None:
        super().remove()
        for layer in self.formed:
            self.host.form_matrix(layer, False)
        self.formed = []

    # -- state of a call ---------------------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        """What the last forward pass of this thread (else of any thread) kept."""
        state = self.shown
        return Trace(state.table if state is not None else None, self.host.info.prefix)

    @property
    def last_table(self) -> TokenTable | None:
        """The table that the last forward pass of this thread left."""
        state = self.call.last
        return state.table if state is not None else None

    def run_entry(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an entry point of the encoder; the outermost one opens the scope."""
        call = self.call
        if call.scope is not None:
            return self.host.run_entry(self, name, function, args, kwargs)
        call.scope = Scope(self.host.observe(name, args, kwargs))
        try:
            call.scope.state = self.state_of(args)
            output = self.host.run_entry(self, name, function, args, kwargs)
            self.tag(output, call.scope.state)
        finally:
            call.scope = None
            call.running.clear()  # of a block that raised
            call.taps.clear()
        return output

    def state_of(self, args: tuple[Any, ...]) -> ForwardState | None:
        """The state of the pass that made the first argument: `forward_head(forward_features(x))` stays one pass."""
        if torch.compiler.is_compiling() or not args:
            return None
        return self.tagged(args[0])

    def _begin(self, x: Tensor) -> ForwardState:
        call = self.call
        facts = call.scope.facts if call.scope is not None else {}
        total = x.shape[1] - self.host.info.prefix
        grid = facts.get("grid") or self.host.info.grid
        if grid is not None and grid[0] * grid[1] != total:
            grid = None
        valid = facts.get("valid")
        if valid is not None:
            ragged = [type(m).__name__ for m, _ in self.rules.values() if not m.ragged]
            if ragged:
                raise RaggedInputError(
                    f"{ragged[0]} is not defined for images of different sizes padded into one batch; "
                    "run one size at a time, or use a method that ranks tokens by a score of their own (TopK)"
                )
        state = ForwardState(TokenTable(x.shape[0], total, grid=grid, valid=valid))
        self.ended(state)
        if call.scope is not None:
            call.scope.state = state
        return state

    def state_for(self, layer: int, x: Tensor) -> ForwardState:
        """The state that block `layer` belongs to, given its input."""
        scope = self.call.scope
        if scope is not None:
            return scope.state if scope.state is not None else self._begin(x)
        if torch.compiler.is_compiling():
            return self._begin(x)
        state = self.tagged(x)
        if torch._C._current_graph_task_id() != -1:  # backward: a checkpoint runs this block again
            if state is None:
                state = self.recall(layer, x)
            again = state is not None and layer in state.entry
            if state is not None and again and state.entry[layer].count + self.host.info.prefix == x.shape[1]:
                return state
        elif state is not None and layer not in state.entry:  # a loop over blocks by hand goes on
            return state
        return self._begin(x)

    # -- the work ----------------------------------------------------------------------------------------------------

    def before(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = self.host.tokens_in(args, kwargs)
        state = self.state_for(layer, x)
        table = state.enter(layer)
        call = self.call
        call.running[layer] = state
        call.taps[layer] = {"input": x}
        self.remember(layer, x, state)
        if not table.steps:
            return args, kwargs
        return self.host.slice_inputs(args, kwargs, functools.partial(self._positions, table), self._key_bias(table))

    def _positions(self, table: TokenTable) -> Tensor:
        """(B, prefix + n) int64: the original position of each present token."""
        prefix, origins = self.host.info.prefix, table.origins
        assert origins is not None
        return torch.cat([_iota(prefix, origins), origins + prefix], dim=1) if prefix else origins

    def _key_bias(self, table: TokenTable) -> Tensor | None:
        """(B, prefix + n) float32 added to attention logits by key: log size (ToMe section 2), -inf for padding."""
        bias = table.sizes.log() if self.size_bias and table.sizes is not None else None
        if table.valid is not None:
            bias = table.valid.new_zeros(table.valid.shape, dtype=torch.float32) if bias is None else bias
            bias = bias.masked_fill(~table.valid, float("-inf"))
        if bias is None:
            return None
        return torch.cat([bias.new_zeros(bias.shape[0], self.host.info.prefix), bias], dim=1)

    def after(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self.call
        state = call.running.pop(layer)
        method, _ = self.rules.get(layer, (None, None))
        if method is not None and method.placement == "block":
            x, table = self.reduce(layer, self.host.tokens_out(output), state.entry[layer])
            state.leave(layer, table)
            output = self.host.with_tokens(output, x)
        elif method is None:
            state.leave(layer, state.entry[layer])
        call.taps.pop(layer, None)
        if call.scope is None:
            self.tag(self.host.tokens_out(output), state)
        return output

    def inside(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The forward of a block that reduces between its two halves."""
        call = self.call
        state = call.running.get(layer)
        recomputed = state is None  # transformers checkpoints `forward` alone: its recomputation runs no hooks
        if state is None:
            x = self.host.tokens_in(args, kwargs)
            state = self.state_for(layer, x)
            call.taps[layer] = {"input": x}
        x = self.host.attention_half(block, args, kwargs)
        x, table = self.reduce(layer, x, state.enter(layer))
        state.leave(layer, table)
        if recomputed:
            call.taps.pop(layer, None)
        return self.host.mlp_half(block, x)

    def reduce(self, layer: int, x: Tensor, table: TokenTable) -> tuple[Tensor, TokenTable]:
        """Ask the method of `layer` and carry out its answer on x (B, N, C)."""
        method, rule = self.rules[layer]
        if not method.acts(table.count, rule):
            return x, table
        view = EncoderBlock(layer, self.host.info, x, table, functools.partial(self._tap, layer))
        with torch.no_grad():
            change = method.reduce(view, rule)
        for name, values in view.written.items():
            table = table.mark(name, values)
        if change is None:
            return x, table
        prefix = self.host.info.prefix
        if isinstance(change, Keep):
            indices = change.indices
            if prefix:
                indices = torch.cat([_iota(prefix, indices), indices + prefix], dim=1)
            return ops.gather_tokens(x, indices), table.apply(layer, method.name, change)
        x, totals = self._merge(x, change, table)
        # Merged by size, the totals are the new sizes: counts without a gradient (a mask that wants one would cost the
        # next block its fused attention).
        sizes = totals[:, prefix:].detach() if change.weights is None else None
        return x, table.apply(layer, method.name, change, sizes)

    def _merge(self, x: Tensor, change: Merge, table: TokenTable) -> tuple[Tensor, Tensor]:
        """Merged tokens (B, prefix + K, C) and the summed weight of each."""
        prefix = self.host.info.prefix
        weights = table.sizes if change.weights is None else change.weights
        assignment = change.assignment
        if prefix:  # prefix tokens keep their own slots in front
            moved = torch.where(assignment >= 0, assignment + prefix, assignment)
            assignment = torch.cat([_iota(prefix, assignment), moved], dim=1)
            if weights is not None:
                weights = torch.cat([weights.new_ones(weights.shape[0], prefix), weights], dim=1)
        return ops.merge_tokens(x, assignment, prefix + change.slots, weights, change.reduce)

    def _tap(self, layer: int) -> AttentionTap:
        captured = self.call.taps.get(layer, {})
        return self.host.read_tap(self, layer, captured)


class Seat:
    """Where a swapped module finds its session."""

    def __init__(self, session: Session, layer: int) -> None:
        self.session = session
        self.layer = layer


def _block_class(base: type) -> dict[str, Any]:
    """A block whose forward reduces between its halves."""

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat = self._tokred_seat
        return seat.session.inside(seat.layer, self, args, kwargs)

    return {"forward": forward}


def scoped_entries(base: type, names: Sequence[str]) -> dict[str, Any]:
    """Attributes of a subclass of `base` whose entry points `names` run inside a scope.

    Entry points are the methods that a user may call and that run blocks or pool their output.
    """

    def entry(name: str) -> Callable[..., Any]:
        inherited = getattr(base, name)

        @functools.wraps(inherited)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._tokred_seat.session.run_entry(name, functools.partial(inherited, self), args, kwargs)

        return method

    return {name: entry(name) for name in names if hasattr(base, name)}


def _bind_all(methods: Sequence[EncoderMethod], info: EncoderInfo) -> dict[int, tuple[EncoderMethod, Any]]:
    rules: dict[int, tuple[EncoderMethod, Any]] = {}
    for method in methods:
        for layer, rule in method.bind(info).items():
            if layer in rules:
                raise ConflictError(
                    f"{rules[layer][0].spoken} and {method.spoken} both act in block {layer}; "
                    "give them different blocks"
                )
            rules[layer] = (method, rule)
    return rules


def _iota(count: int, like: Tensor) -> Tensor:
    """(B, count) positions 0, 1, ... beside `like` (B, n)."""
    return torch.arange(count, device=like.device).expand(like.shape[0], -1)


def gather_positions(value: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Gather `value` along `dim` (negative) by positions (B, K); a leading axis of 1 is the batch."""
    value = value.expand(positions.shape[0], *value.shape[1:])
    shape = [positions.shape[0]] + [1] * (value.dim() - 1)
    shape[dim] = positions.shape[1]
    index = positions.reshape(shape).expand(
        *[positions.shape[1] if axis == value.dim() + dim else size for axis, size in enumerate(value.shape)]
    )
    return value.gather(dim, index)


def slice_mask(
    mask: Tensor | None, positions: Callable[[], Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Fit an attention mask to the present tokens and add a bias by key.

    Args:
        mask: None, bool (True attends) or additive, broadcastable to (B, H, N, N).
        positions: gives (B, K) original positions of the present tokens.
        bias: (B, K) float32 added to the logits of each key, or None.
    """
    if mask is not None:
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        mask = gather_positions(mask, positions(), -1)
        if mask.shape[-2] > 1:
            mask = gather_positions(mask, positions(), -2)
    if bias is None:
        return mask
    bias = bias[:, None, None, :].to(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return mask.to(dtype) + bias
