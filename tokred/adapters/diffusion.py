"""Denoisers of diffusers: U-Nets, DiT, PixArt, Stable Diffusion 3 and Flux.

Everything is done by hooks around modules of a block; no attention is copied, so whichever kernel the model uses stays
in use. `Merge`: tokens merge in front of a module, its output goes back to all places. `Keep`: the inputs of `to_k` and
`to_v` alone are gathered. Blocks of joint attention (SD3, Flux) keep all their text tokens.

Flux rotates queries and keys by one table for all samples. Merged tokens turn by the angle of the token that they stand
for, which differs from sample to sample. So in a hooked attention the table is taken away from the processor, and
queries and keys are rotated behind their norms (the modules `norm_q`, `norm_k` and, for text, `norm_added_q`,
`norm_added_k`), by diffusers' own function: the same numbers, with rows for each sample.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred import ops
from tokred.adapters.hooks import Hook
from tokred.adapters.passes import Call, PassSession
from tokred.core.diffusion import BlockInfo, DenoiserInfo, DiffusionBlock, DiffusionMethod, Part
from tokred.core.errors import ConflictError, LayoutError, RaggedInputError, UnsupportedModelError
from tokred.core.host import Host
from tokred.core.method import Method
from tokred.core.tokens import Keep, Merge
from tokred.core.trace import DiffusionStep, Trace

if importlib.util.find_spec("diffusers") is None:  # importing it takes seconds, and the models are known by name
    raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

__all__ = ["DiffusersHost"]

_SERIAL = itertools.count()


@dataclass
class Place:
    """A block with self-attention over image tokens.

    Attributes:
        info: in numbers. block: the module. modules: those that can run on reduced tokens, by part.
        joined: whether its attention gets text and image in one sequence, text in front.
        mask: position of the argument that masks image tokens, None where there is none.
    """

    info: BlockInfo
    block: nn.Module
    modules: dict[Part, tuple[nn.Module, ...]]
    joined: bool = False
    mask: int | None = None


class DiffusersHost(Host):
    """The denoisers of diffusers."""

    family = "diffusers"
    classes = (
        "UNet2DConditionModel",
        "DiTTransformer2DModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
    )
    sites = ("DiffusionBlock",)
    refusals: ClassVar[dict[str, str]] = {
        "UNet2DModel": "its attention has convolutions for neighbours, and no block whose tokens could be compared",
        "UNet3DConditionModel": "its attention runs over frames, too",
        "UNetMotionModel": "its attention runs over frames, too",
        "UNetSpatioTemporalConditionModel": "its attention runs over frames, too",
        "ControlNet": "a part of it mirrors a U-Net, whose tokens it would no longer match; patch the denoiser",
        "SanaTransformer2DModel": "linear attention costs as much as its MLP: merging would not pay",
        "attention_mask": "masks over image tokens have no meaning for merged ones",
        "fuse_qkv_projections": "for methods that shrink keys alone: fused projections make keys of all tokens",
        "FluxIPAdapterAttnProcessor": "it compares image prompts with queries before they are rotated",
        "img_ids of several images": "the tokens of Flux Kontext and the like form no grid",
        "enable_forward_chunking": "for methods that merge in front of the MLP: it would get chunks of the tokens",
    }

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kind = _kind(model)
        self.places = tuple(_places(self.kind, model))
        self.info = DenoiserInfo(tuple(place.info for place in self.places))

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return _kind(model) in cls.classes

    def attach(self, methods: Sequence[Method], options: Mapping[str, Any]) -> Session:
        if not self.places:
            raise UnsupportedModelError(f"this {self.kind} has no block with self-attention over its image tokens")
        session = Session(self, [method for method in methods if isinstance(method, DiffusionMethod)])
        try:
            session.install()
        except BaseException:
            session.remove()
            raise
        return session

    def grid(self, given: Mapping[str, Any]) -> tuple[int, int] | None:
        """(rows, columns) of the image tokens of a call, None where each level has its own (U-Nets)."""
        if self.kind == "UNet2DConditionModel":
            return None
        if self.kind == "FluxTransformer2DModel":
            ids = given["img_ids"]
            return _square_of_ids(ids) if torch.compiler.is_compiling() else _grid_of_ids(ids)
        side: Any = self.model.config.patch_size  # type: ignore[union-attr]
        rows, columns = given["hidden_states"].shape[-2:]
        return rows // side, columns // side


@dataclass
class Choice:
    """What a method answered for one block, or None where it had nothing to do."""

    change: Merge | Keep | None
    grid: tuple[int, int]


@dataclass
class Pass:
    """One forward pass: its noise levels, its grid (of the U-Net's present level), and the choices of its blocks."""

    timestep: Tensor | None
    grid: tuple[int, int] | None
    choices: dict[int, Choice] = field(default_factory=dict)


@dataclass
class Running:
    """A block while it runs.

    Attributes:
        change: the answer for it. text: tokens in front of the image tokens in its attention.
        tables: rotary rows (cos, sin) of the attention that runs, by the module behind which they rotate: (S, d) for
            all samples, or (B, S, d).
        done: the modules of the attention that runs whose hooks have acted.
    """

    change: Merge | Keep
    text: int
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)


class DenoiserCall(Call[Pass]):
    """What a running call keeps at hand: its pass, and the blocks that run."""

    def __init__(self) -> None:
        super().__init__()
        self.scope: Pass | None = None
        self.running: dict[int, Running] = {}


class Session(PassSession[DenoiserCall, Pass]):
    """Methods at work on one denoiser.

    Attributes:
        rules: {layer: (method, rule)} for the blocks where tokens are reduced.
    """

    def __init__(self, host: DiffusersHost, methods: Sequence[DiffusionMethod]) -> None:
        self.host = host
        self.rules: dict[int, tuple[DiffusionMethod, Any]] = {}
        for method in methods:
            for layer, rule in method.bind(host.info).items():
                if layer in self.rules:
                    raise ConflictError(
                        f"{self.rules[layer][0].spoken} and {method.spoken} both act in block {layer} "
                        f"({host.places[layer].info.path}); give them different blocks"
                    )
                self.rules[layer] = (method, rule)
        self.names = [name for name in inspect.signature(type(host.model).forward).parameters if name != "self"]
        self.serial = f"session {next(_SERIAL)}"  # a string: compiled code is for this session and no other
        self.passes_kept = 4 * len(host.places)
        super().__init__(DenoiserCall)

    # -- installation ------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put hooks and the class in place. Without a rule nothing is touched: the model stays bit-identical."""
        if not self.rules:
            return
        for layer, (method, _) in sorted(self.rules.items()):
            place = self.host.places[layer]
            self._pre(place.block, "before", layer)
            self._post(place.block, "after", layer)
            for part in method.parts:
                for index, module in enumerate(place.modules.get(part, ())):
                    self._pre(module, "enter", layer, part, index)
                    self._post(module, "leave", layer, part, index)
                    if part == "attention":
                        self._tap_attention(module, layer, method.target == "keys")
        for module in self.host.model.modules():
            if self.host.kind == "UNet2DConditionModel" and _is(module, "Transformer2DModel"):
                self._pre(module, "level")
        self.swap(self.host.model, extend_denoiser, Seat(self))

    def _tap_attention(self, module: Any, layer: int, keys: bool) -> None:
        if keys:
            for name in ("to_k", "to_v"):
                self._pre(getattr(module, name), "gather_keys", layer, name)
        if self.host.kind == "FluxTransformer2DModel":
            for name in _rotated(module):
                self._post(getattr(module, name), "rotate", layer, name)

    def _pre(self, module: nn.Module, *hook: Any) -> None:
        self.handles.append(module.register_forward_pre_hook(Hook(self, *hook), with_kwargs=True))

    def _post(self, module: nn.Module, *hook: Any) -> None:
        self.handles.append(module.register_forward_hook(Hook(self, *hook), with_kwargs=True, prepend=True))

    # -- state of a call ---------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.serial = f"session {next(_SERIAL)}"

    @property
    def trace(self) -> Trace:
        """What the last forward pass of this thread (else of any thread) merged, block by block."""
        state = self.shown
        steps = [] if state is None else [self._step(layer, c) for layer, c in sorted(state.choices.items())]
        return Trace(None, denoiser=[step for step in steps if step is not None])

    def _step(self, layer: int, choice: Choice) -> DiffusionStep | None:
        if choice.change is None:
            return None
        path = self.host.places[layer].info.path
        return DiffusionStep.of(layer, path, self.rules[layer][0].name, choice.grid, choice.change)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the denoiser's forward inside a scope."""
        call = self.call
        if call.scope is not None or not self.serial:
            return function(*args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        batch = given[self.names[0]]
        state = Pass(_per_sample(given.get("timestep"), batch), self.host.grid(given))
        call.scope = state
        try:
            output = function(*args, **kwargs)
        finally:
            call.scope = None
            call.running.clear()  # of a block that raised
        self.ended(state)
        return output

    def _state_for(self, layer: int, x: Tensor) -> Pass:
        """The pass that a block belongs to, given its input: a checkpoint runs it again when the pass is over."""
        scope = self.call.scope
        if scope is not None:
            self.remember(layer, x, scope)
            return scope
        state = self.tagged(x) or self.recall(layer, x)
        if state is None or layer not in state.choices:
            raise UnsupportedModelError(
                f"block {layer} ({self.host.places[layer].info.path}) of a patched {self.host.kind} ran outside of the "
                "model's forward, so its timestep and grid are unknown; run the whole model, or unpatch it"
            )
        return state

    # -- the work ----------------------------------------------------------------------------------------------------

    def level(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A U-Net enters the transformer of one level: its input is the grid."""
        scope = self.call.scope
        if scope is not None:
            rows, columns = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
            scope.grid = (rows, columns)

    def before(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block begins: choose for it."""
        place = self.host.places[layer]
        x = args[0] if args else kwargs["hidden_states"]
        if place.mask is not None:
            mask = args[place.mask] if len(args) > place.mask else kwargs.get("attention_mask")
            if mask is not None:
                raise RaggedInputError(
                    f"attention_mask over the image tokens of block {layer} ({place.info.path}): it has no meaning for "
                    "merged tokens; leave it out, or unpatch the model"
                )
        state = self._state_for(layer, x)
        if layer not in state.choices:
            state.choices[layer] = self._choose(layer, x, state)
        change = state.choices[layer].change
        text = (args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]).shape[1] if place.joined else 0
        running = self.call.running
        running.pop(layer, None)
        if change is not None:
            running[layer] = Running(change, text)

    def _choose(self, layer: int, x: Tensor, state: Pass) -> Choice:
        grid = state.grid
        method, rule = self.rules[layer]
        if grid is None or grid[0] * grid[1] != x.shape[1]:
            shape = "no grid that is known" if grid is None else f"no grid of {grid[0]} x {grid[1]}"
            raise LayoutError(
                f"block {layer} ({self.host.places[layer].info.path}) got {x.shape[1]} image tokens, which form "
                f"{shape}; {method.spoken} has no definition for them"
            )
        if method.count(grid, rule) >= x.shape[1]:
            return Choice(None, grid)
        with torch.no_grad():
            view = DiffusionBlock(self.host.places[layer].info, grid, x.detach(), state.timestep)
            return Choice(method.reduce(view, rule), grid)

    def after(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.call.running.pop(layer, None)

    def enter(
        self, layer: int, part: Part, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A module begins: give it merged tokens; prepare what its keys and its rotation will need."""
        running = self.call.running.get(layer)
        if running is None:
            return None
        place = self.host.places[layer]
        module: Any = place.modules[part][index]
        x = args[0] if args else kwargs["hidden_states"]
        running.done.clear()
        running.tables.clear()
        if part == "mlp" and getattr(place.block, "_chunk_size", None) is not None:
            raise UnsupportedModelError(
                "enable_forward_chunking gives the MLP chunks of the tokens, which cannot be merged; turn it off with "
                "disable_forward_chunking(), or merge around attention alone"
            )
        if isinstance(running.change, Keep) and getattr(module, "fused_projections", False):
            raise UnsupportedModelError(
                "fused projections make keys of all tokens, and this method makes them of some; "
                "call unfuse_qkv_projections() first"
            )
        if kwargs.get("image_rotary_emb") is not None:
            running.tables = _tables(running, module, kwargs["image_rotary_emb"], x.shape[1] - running.text)
            kwargs = {**kwargs, "image_rotary_emb": None}
        if isinstance(running.change, Keep):
            return args, kwargs
        x = _beside_text(x, running.text, lambda image: _merge(image, running.change))
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def leave(
        self, layer: int, part: Part, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """A module ends: what it made of merged tokens goes back to all places."""
        running = self.call.running.get(layer)
        if running is None:
            return None
        change, missing = running.change, set(running.tables) - running.done
        if isinstance(change, Keep):
            missing |= {"to_k", "to_v"} - running.done
        if missing:
            place = self.host.places[layer]
            raise UnsupportedModelError(
                f"the attention processor {type(place.modules[part][index].processor).__name__} of block {layer} "
                f"({place.info.path}) did not call {', '.join(sorted(missing))} as they were when the model was "
                "patched; patch after processors and adapters have been set"
            )
        running.tables.clear()
        if isinstance(change, Keep):
            return None
        first = output[0] if isinstance(output, tuple) else output
        first = _beside_text(first, running.text, lambda image: ops.unmerge_tokens(image, change.assignment))
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def gather_keys(self, layer: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`to_k` or `to_v` begins: only kept tokens become keys and values."""
        running = self.call.running.get(layer)
        if running is None or not isinstance(running.change, Keep):
            return None
        running.done.add(name)
        kept = running.change.indices
        x = _beside_text(args[0], running.text, lambda image: ops.gather_tokens(image, kept))
        return (x, *args[1:]), kwargs

    def rotate(self, layer: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """A norm of queries or keys (B, S, H, d) ends: rotate them, each sample by rows of its own."""
        from diffusers.models.embeddings import apply_rotary_emb

        running = self.call.running.get(layer)
        if running is None or name not in running.tables:
            return None
        running.done.add(name)
        cos, sin = running.tables[name]
        if cos.dim() == 2:
            return apply_rotary_emb(output, (cos, sin), sequence_dim=1)
        rows = (cos.flatten(0, 1), sin.flatten(0, 1))  # the batch as one long sequence: one row for each of its tokens
        return apply_rotary_emb(output.flatten(0, 1)[None], rows, sequence_dim=1).view_as(output)


class Seat:
    """Where the swapped denoiser finds its session."""

    def __init__(self, session: Session) -> None:
        self.session = session


def extend_denoiser(base: type) -> dict[str, Any]:
    """A denoiser whose forward opens a scope. (Offloading hooks keep a bound forward beyond the end of a patch.)"""
    inherited: Any = base.forward  # type: ignore[attr-defined]

    @functools.wraps(inherited)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat = self.__dict__.get("_tokred_seat")
        if seat is None:
            return inherited(self, *args, **kwargs)
        return seat.session.run(functools.partial(inherited, self), args, kwargs)

    return {"forward": forward}


# -- tensors -----------------------------------------------------------------------------------------------------------


def _merge(x: Tensor, change: Any) -> Tensor:
    return ops.merge_tokens(x, change.assignment, change.slots, change.weights, change.reduce)[0]


def _beside_text(x: Tensor, text: int, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the image tokens of (B, text + n, C); the text tokens in front stay."""
    return torch.cat([x[:, :text], act(x[:, text:])], dim=1) if text else act(x)


def _tables(running: Running, module: Any, table: tuple[Tensor, Tensor], image: int) -> dict[str, Any]:
    """Rotary rows for each of the modules behind which queries and keys of one attention are rotated.

    Args:
        table: cos and sin, (text + image, d). image: image tokens before any were merged.
    """
    if not any(cls.__name__ == "FluxAttnProcessor" for cls in type(module.processor).__mro__):
        raise UnsupportedModelError(
            f"the attention processor {type(module.processor).__name__} may use queries before they are rotated "
            "(image prompts do); served is FluxAttnProcessor"
        )
    text = table[0].shape[0] - image
    shared = tuple(rows[:text] for rows in table)
    change = running.change
    taken = change.indices if isinstance(change, Keep) else change.representative
    front = torch.arange(text if running.text else 0, device=taken.device).expand(taken.shape[0], -1)
    index = torch.cat([front, taken + text], dim=1)
    keys = tuple(rows[index.to(rows.device)] for rows in table)  # (B, S, d)
    queries = keys
    if isinstance(change, Keep):
        queries = table if running.text else tuple(rows[text:] for rows in table)
    made = {"norm_q": queries, "norm_k": keys, "norm_added_q": shared, "norm_added_k": shared}
    return {name: made[name] for name in _rotated(module)}


def _rotated(module: Any) -> list[str]:
    """The norms of queries and keys that a Flux attention has, those of text apart where it projects text apart."""
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return [name for name in names if getattr(module, name, None) is not None]


def _per_sample(timestep: Any, batch: Tensor) -> Tensor | None:
    """(B,) float32 of what a denoiser takes as timestep: a number, or a tensor of one or of B."""
    if timestep is None:
        return None
    if not isinstance(timestep, Tensor):
        return torch.full((batch.shape[0],), float(timestep), device=batch.device)
    return timestep.to(batch.device, torch.float32).reshape(-1).expand(batch.shape[0])


def _grid_of_ids(ids: Tensor) -> tuple[int, int]:
    """(rows, columns) of Flux's image tokens by their positions (n, 3) = (0, row, column)."""
    ids = ids[0] if ids.dim() == 3 else ids
    rows, columns = (int(side) + 1 for side in ids[:, 1:].amax(dim=0).tolist())
    if rows * columns != len(ids) or not bool((ids[:, 1:] == _positions(rows, columns, ids)).all()):
        raise LayoutError(
            f"img_ids place {len(ids)} image tokens on a grid of {rows} x {columns}: not one image, row by row "
            "(several images in one sequence, as Flux Kontext has, are not served); unpatch the model for such calls"
        )
    return rows, columns


def _square_of_ids(ids: Tensor) -> tuple[int, int]:
    """The same while Flux is compiled, when positions cannot be read: a square, which running code checks."""
    ids = ids[0] if ids.dim() == 3 else ids
    side = math.isqrt(ids.shape[0])
    message = (
        f"{ids.shape[0]} image tokens are not one square image, and while a patched Flux is compiled the positions of "
        "other grids cannot be read; run it without torch.compile"
    )
    if side * side != ids.shape[0]:
        raise LayoutError(message)
    torch._assert_async((ids[:, 1:] == _positions(side, side, ids)).all(), message)
    return side, side


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows * columns, 2): row and column of each cell."""
    cells = torch.arange(rows * columns, device=like.device)
    return torch.stack([cells // columns, cells % columns], dim=1).to(like.dtype)


# -- models ------------------------------------------------------------------------------------------------------------


def _is(module: nn.Module, name: str) -> bool:
    """Whether a module is of diffusers' class `name`, or of a subclass."""
    return any(cls.__name__ == name and cls.__module__.startswith("diffusers.") for cls in type(module).__mro__)


def _kind(model: nn.Module) -> str:
    return next((name for name in DiffusersHost.classes if _is(model, name)), "")


def _stages(kind: str, model: Any) -> Iterator[tuple[str, nn.Module, int]]:
    """(path, part of the model, how much coarser than the finest its grid is), in the order in which they run."""
    if kind != "UNet2DConditionModel":
        for name in ("transformer_blocks", "single_transformer_blocks"):
            if hasattr(model, name):
                yield name, getattr(model, name), 1
        return
    depth = len(model.down_blocks)
    for i, stage in enumerate(model.down_blocks):
        yield f"down_blocks.{i}", stage, 2**i
    if model.mid_block is not None:
        yield "mid_block", model.mid_block, 2 ** (depth - 1)
    for i, stage in enumerate(model.up_blocks):
        yield f"up_blocks.{i}", stage, 2 ** (depth - 1 - i)


def _places(kind: str, model: nn.Module) -> Iterator[Place]:
    layer = 0
    for path, stage, level in _stages(kind, model):
        for name, block in stage.named_modules():
            found = _parts(block)
            if found is None:
                continue
            modules, joined, mask = found
            grid = _own_grid(kind, model, level)
            dim = modules["attention"][0].query_dim
            info = BlockInfo(layer, f"{path}.{name}", level, dim, tuple(modules), grid)  # type: ignore[arg-type]
            yield Place(info, block, modules, joined, mask)
            layer += 1


def _parts(block: Any) -> tuple[dict[Part, tuple[Any, ...]], bool, int | None] | None:
    """What a block can run on reduced tokens, whether text comes in its sequence, and where it takes a mask."""
    if _is(block, "BasicTransformerBlock"):
        if block.only_cross_attention:
            return None
        modules: dict[Part, tuple[Any, ...]] = {"attention": (block.attn1,)}
        if block.attn2 is not None:
            modules["cross_attention"] = (block.attn2,)
        return {**modules, "mlp": (block.ff,)}, False, 1
    if _is(block, "JointTransformerBlock"):
        dual = (block.attn2,) if block.use_dual_attention else ()
        return {"attention": (block.attn, *dual), "mlp": (block.ff,)}, False, None
    if _is(block, "FluxTransformerBlock"):
        return {"attention": (block.attn,), "mlp": (block.ff,)}, False, None
    if _is(block, "FluxSingleTransformerBlock"):
        return {"attention": (block.attn,)}, True, None
    return None


def _own_grid(kind: str, model: Any, level: int) -> tuple[int, int] | None:
    """The grid of a block for the latents that the config names."""
    size = getattr(model.config, "sample_size", None)
    if kind == "FluxTransformer2DModel" or size is None:
        return None
    rows, columns = (size, size) if isinstance(size, int) else size
    patch = 1 if kind == "UNet2DConditionModel" else model.config.patch_size
    return -(-(rows // patch) // level), -(-(columns // patch) // level)
