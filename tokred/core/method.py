"""The base of every method: a frozen dataclass of hyper-parameters that round-trips through JSON, and its registry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokred import ops
from tokred.core.errors import InvalidParameterError, UnknownMethodError, UnknownParameterError, nearest
from tokred.core.sites import EncoderBlock, EncoderInfo, MediaLayout, Needs, Placement, TowerInfo, VisualFeatures
from tokred.core.tokens import Keep, Merge, Resample

__all__ = ["EncoderMethod", "Method", "VisualMethod", "from_dict", "keep_top", "registered", "resolve"]

_REGISTRY: dict[str, type[Method]] = {}


class Method:
    """A token reduction method. Subclasses are frozen dataclasses; their fields are the paper's hyper-parameters.

    Class attributes:
        name: registry key, snake case. title, paper: for tables.
        sites: the names of the sites where the method acts; of several, `acts_at` says which it takes of a host.
        any_site: whether one of its sites is enough.
        conflicts: other methods (by name) that cannot share a model with this one, with the reason.
        listed: False for a part of a method that has a site of its own, but no name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    sites: ClassVar[tuple[str, ...]] = ()
    any_site: ClassVar[bool] = False
    conflicts: ClassVar[Mapping[str, str]] = {}
    listed: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__ and cls.listed:
            _REGISTRY[cls.name] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        fields: set[str] = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        for key in kwargs:
            if key not in fields:
                hint = f"{nearest(key, fields)}; it has: {', '.join(sorted(fields))}"
                raise UnknownParameterError(f"{cls.__name__} has no parameter {key!r}{hint}")
        return super().__new__(cls)

    def acts_at(self, offered: Sequence[str]) -> tuple[str, ...]:
        """The sites that this instance needs, given what a host offers."""
        return self.sites

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"method": name, field: value, ...}`` of JSON types; `tokred.from_dict` reads it back."""
        assert dataclasses.is_dataclass(self)
        return {"method": self.name, **{f.name: _to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    def __repr__(self) -> str:
        """Show the fields that differ from their defaults."""
        assert dataclasses.is_dataclass(self)
        shown = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def spoken(self) -> str:
        """What messages call it."""
        return type(self).__name__ if self.listed else self.title

    def replace(self, **changes: Any) -> Any:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


class EncoderMethod(Method):
    """A method of the `EncoderBlock` site.

    `bind` turns hyper-parameters into one rule for each block where tokens are removed; a block without a rule is
    bypassed, so settings that keep everything leave the model bit-identical. `count` is the arithmetic of a rule:
    token counts depend on it alone, never on data, so shapes stay static.
    """

    sites: ClassVar[tuple[str, ...]] = ("EncoderBlock",)
    #: sizes of merged tokens act on attention (`+ log size` on keys) and on pooling
    proportional_attention: bool = False
    weighted_pool: bool = False
    #: whether masked (padded) inputs have a definition
    ragged: ClassVar[bool] = False

    @property
    def placement(self) -> Placement:
        """Where in the block the reduction happens."""
        return "block"

    @property
    def taps(self) -> frozenset[str]:
        """What the host must capture: any of "qk", "v", "input", "matrix" (the full matrix is needed anyway)."""
        return frozenset({"qk"})

    def bind(self, info: EncoderInfo) -> dict[int, Any]:
        """Return {block: rule} for the blocks of `info` where tokens are removed; refuse what does not fit."""
        raise TypeError(f"{type(self).__name__} does not define bind()")

    def count(self, tokens: int, rule: Any) -> int:
        """Prunable tokens that remain of `tokens` under `rule`."""
        raise TypeError(f"{type(self).__name__} does not define count()")

    def acts(self, tokens: int, rule: Any) -> bool:
        """Whether `rule` changes anything about `tokens` prunable tokens; if not, the block is bypassed."""
        return self.count(tokens, rule) < tokens

    def reduce(self, view: EncoderBlock, rule: Any) -> Keep | Merge | None:
        """Answer one view; None keeps everything."""
        raise TypeError(f"{type(self).__name__} does not define reduce()")

    def cost(self, info: EncoderInfo, tokens: int, rule: Any) -> int:
        """Multiply-adds that scoring `tokens` prunable tokens of one image adds to the block."""
        return 0

    def is_identity(self, info: EncoderInfo) -> bool:
        """Whether these settings keep every token of `info`: the host then changes nothing at all."""
        return not self.bind(info)

    def plan(self, info: EncoderInfo, tokens: int | None = None) -> list[int]:
        """Prunable tokens per image that leave each block, for an image of `tokens` (default: the model's own)."""
        rules, left, counts = self.bind(info), info.tokens if tokens is None else tokens, []
        for layer in range(info.depth):
            if layer in rules:
                left = self.count(left, rules[layer])
            counts.append(left)
        return counts


class VisualMethod(Method):
    """A method of the `VisualFeatures` site: it chooses among the visual tokens before the language model sees them.

    Attributes:
        positions: "compact" numbers the survivors 0, 1, ...; "original" leaves each its position; None is the
            method's own rule (`own_positions`), and "original" on hosts whose positions are places in space and time.
        keep_newline: whether the tokens that end rows (LLaVA-NeXT) stay, on top of the budget.
        joins_images: whether the images of a prompt are given to it as the frames of one video.
    """

    sites: ClassVar[tuple[str, ...]] = ("VisualFeatures",)
    own_positions: ClassVar[Literal["compact", "original"]] = "compact"
    positions: Literal["compact", "original"] | None = None
    keep_newline: bool = False
    joins_images: bool = False

    def needs(self, tower: TowerInfo) -> Needs:
        """What the host must capture of the vision tower; refuse a tower that cannot give it."""
        return Needs()

    def kept(self, layout: MediaLayout) -> int:
        """Tokens (newlines apart) that leave the site for one image or video of this layout, at most."""
        raise TypeError(f"{type(self).__name__} does not define kept()")

    def largest(self, layout: MediaLayout) -> int:
        """Tokens that one image or video may need, newlines of its own included: static caches reserve as many."""
        return self.kept(layout)

    def bypasses(self, layout: MediaLayout) -> bool:
        """Whether an image or video of this layout goes on untouched, newlines included."""
        return self.kept(layout) == len(layout.cells)

    def select(self, view: VisualFeatures) -> Keep | Sequence[Resample] | None:
        """Answer one view: `Keep` of (G, K) tokens, one `Resample` for each item, or None to keep everything."""
        raise TypeError(f"{type(self).__name__} does not define select()")

    def scoring_macs(self, tower: TowerInfo, layout: MediaLayout, width: int) -> int:
        """Multiply-adds that the selection adds for one image or video; `width` is D of the language model."""
        return 0


def keep_top(view: EncoderBlock, scores: Tensor, count: Callable[[int], int]) -> Keep:
    """Keep the best `count(n)` tokens of each image by `scores` (B, n), ascending; ties to the lower position.

    Padded images keep `count(their own n)`: what a batch keeps of an image is what the image alone would keep.
    NaN scores rank last.
    """
    n = view.count
    kept = count(n)
    if view.valid is None:
        return Keep(ops.top_indices(scores, kept))
    scores = scores.float().nan_to_num(nan=-math.inf).masked_fill(~view.valid, -math.inf)
    table = scores.new_tensor([count(i) if i else 0 for i in range(n + 1)]).long()
    allowed = table[view.valid.sum(dim=1)]  # (B,)
    positions, ranks = ops.rank(scores)[:, :kept].sort(dim=1)
    return Keep(positions, ranks < allowed[:, None])


def registered() -> dict[str, type[Method]]:
    """All methods by name: those of tokred, and subclasses that others defined."""
    from tokred import load_methods

    load_methods()
    return dict(_REGISTRY)


def resolve(method: object, parameters: Mapping[str, Any]) -> list[Method]:
    """Return the methods of a `patch` call, given an instance, a class, a name or a list of them."""
    if isinstance(method, Sequence) and not isinstance(method, (str, bytes)):
        if parameters:
            raise UnknownParameterError(f"parameters {sorted(parameters)} belong to no single method of a list")
        return [single for item in method for single in resolve(item, {})]
    if isinstance(method, Mapping):
        method = from_dict(method)
    if isinstance(method, str):
        known = registered()
        key = method.lower().replace("-", "_")
        by_class = {cls.__name__.lower(): name for name, cls in known.items()}
        key = by_class.get(key, key)
        if key not in known:
            hint = f"{nearest(method, known)}; known: {', '.join(sorted(known))}"
            raise UnknownMethodError(f"unknown method {method!r}{hint}")
        method = known[key]
    if isinstance(method, type) and issubclass(method, Method):
        return [method(**parameters)]
    if isinstance(method, Method):
        if parameters:
            name = type(method).__name__
            raise UnknownParameterError(
                f"{sorted(parameters)} are no options of patch; parameters of {name} go into {name}(...)"
            )
        return [method]
    raise InvalidParameterError(f"{method!r} is no method: give one such as tokred.ToMe(r=8), its name, or a list")


def from_dict(data: Mapping[str, Any]) -> Method:
    """Return the method that `Method.to_dict` described.

    Raises:
        UnknownMethodError, UnknownParameterError, InvalidParameterError: with the nearest known name.
    """
    if not isinstance(data, Mapping) or "method" not in data:
        raise InvalidParameterError(f"expected a dict with the key 'method', got {data!r}")
    name = data["method"]
    return resolve(name, {key: _from_json(value) for key, value in data.items() if key != "method"})[0]


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(item) for item in value]
    if isinstance(value, Method):
        return value.to_dict()
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {int(k) if isinstance(k, str) and k.isdigit() else k: _from_json(v) for k, v in value.items()}
    return value
