"""Sites inside a language model: what a host shows of a prompt on its way through the layers, and what methods answer.

`PrefillLayer` lies before a decoder layer, `FeedForward` at a layer's MLP, `CacheAfterPrefill` behind the prompt, and
`Prompt` in front of all layers. Columns count the tokens that enter the language model. A batch of prompts of unequal
length is padded on the left, and every tensor (B, T) here says of padding: neither visual nor text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tokred.core.method import EncoderMethod, Method, VisualMethod
from tokred.core.sites import DecoderInfo

__all__ = [
    "CacheAfterPrefill",
    "CacheCut",
    "DecoderMethod",
    "FeedForward",
    "LayerNeeds",
    "LayerSource",
    "Neurons",
    "PrefillLayer",
    "Probe",
    "Prompt",
    "PromptMethod",
    "Survivors",
]

Positions = Literal["compact", "original"]


@dataclass(frozen=True)
class LayerNeeds:
    """What a method wants captured for one `PrefillLayer` view at layer l; the host captures nothing else.

    Attributes:
        previous: queries, keys and values of layer l - 1, which has just run.
        own: queries, keys and values of layer l, projected from what enters it (one more projection).
        embeddings: what entered the language model at the columns that are still there.
    """

    previous: bool = False
    own: bool = False
    embeddings: bool = False


class LayerSource(Protocol):
    """What a host hands out for one `PrefillLayer` view."""

    def attention_rows(self, own: bool, rows: Tensor) -> Tensor: ...
    def queries(self, own: bool) -> Tensor: ...
    def keys(self, own: bool) -> Tensor: ...
    def values(self, own: bool) -> Tensor: ...
    def embeddings(self) -> Tensor: ...
    def final_norm(self, x: Tensor) -> Tensor: ...


@dataclass
class PrefillLayer:
    """The prompt as it enters decoder layer `layer`, once layer - 1 has run, in a prefill.

    Attributes:
        layer: 0-based. info: the language model in numbers.
        hidden: (B, T, D) residual stream.
        visual: (B, T) bool, tokens that may go. text: (B, T) bool, tokens that stay.
        columns: (B, T) int64, the column of the prompt that each is (padding: any).
        media: (B, T) int64, which image or video of its row each is a part of, -1 for none.
        initial: (B,) int64, visual tokens of each row that entered the language model.
        marks: named values, one a token (B, T, ...), as written at earlier sites.
    """

    layer: int
    info: DecoderInfo
    hidden: Tensor
    visual: Tensor
    text: Tensor
    columns: Tensor
    media: Tensor
    initial: Tensor
    marks: Mapping[str, Tensor]
    source: LayerSource

    @property
    def valid(self) -> Tensor:
        """(B, T) bool: real tokens."""
        return self.visual | self.text

    @property
    def last(self) -> Tensor:
        """(B, 1) int64: the place of the last real token of each row."""
        places = torch.arange(self.valid.shape[1], device=self.valid.device)
        return torch.where(self.valid, places, -1).amax(dim=1, keepdim=True)

    def attention_rows(self, rows: Tensor, own: bool = False) -> Tensor:
        """Exact softmax attention of some query rows.

        Args:
            rows: (B, R) int64, places of the queries in 0 ... T - 1.
            own: of layer `layer` (needs `LayerNeeds.own`) instead of the one before it (needs `LayerNeeds.previous`).

        Returns:
            (B, H, R, T) float32: over all keys that each query sees, padding 0.
        """
        return self.source.attention_rows(own, rows)

    def queries(self, own: bool = False) -> Tensor:
        """(B, H, T, d): queries, after norm and rotary embedding."""
        return self.source.queries(own)

    def keys(self, own: bool = False) -> Tensor:
        """(B, H_kv, T, d): keys, after norm and rotary embedding."""
        return self.source.keys(own)

    def values(self, own: bool = False) -> Tensor:
        """(B, H_kv, T, d): values."""
        return self.source.values(own)

    def embeddings(self) -> Tensor:
        """(B, T, D): what entered the language model at these columns (needs `LayerNeeds.embeddings`)."""
        return self.source.embeddings()

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm behind the last layer, applied to (..., D)."""
        return self.source.final_norm(x)


@dataclass(frozen=True, eq=False)
class Survivors:
    """What stays of the tokens that enter a layer.

    Attributes:
        keep: (B, T) bool; only `visual` tokens can go, whatever it says of others.
        order: (B, T) number, by which the survivors are sorted (stable); None keeps their order.
        hidden: (B, T, D), what the tokens are from here on, where a method merges some into others; None as they are.
        cut_earlier_cache: whether the keys and values of dropped tokens leave the layers before this one too.
        marks: values to write, one a token (B, T, ...) of those before the reduction, for views of later layers.
    """

    keep: Tensor
    order: Tensor | None = None
    hidden: Tensor | None = None
    cut_earlier_cache: bool = False
    marks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class FeedForward:
    """The MLP of decoder layer `layer` in a prefill.

    Attributes:
        activations: (B, T, I), what enters the down projection: ``act(gate x) * up x``, or ``act(W x)`` where there is
            no gate. visual, text: (B, T) bool, as in `PrefillLayer`. info: the language model in numbers.
    """

    layer: int
    info: DecoderInfo
    activations: Tensor
    visual: Tensor
    text: Tensor

    @property
    def valid(self) -> Tensor:
        """(B, T) bool: real tokens."""
        return self.visual | self.text


@dataclass(frozen=True, eq=False)
class Neurons:
    """The part of an MLP that decoding uses.

    Attributes:
        active: (B, I) bool, the neurons of each request; None leaves the MLP whole.
        marks: values to write, one a token (B, T, ...), for `PrefillLayer` views of later layers.
    """

    active: Tensor | None
    marks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class CacheAfterPrefill:
    """The KV cache when a prompt has gone through all layers.

    Attributes:
        columns: for each layer (B, T_l) int64, the column of the prompt that each entry is of.
        valid: for each layer (B, T_l) bool. visual: for each layer (B, T_l) bool.
        marks: {layer: named values, one an entry}, as they were when the layer ran.
    """

    info: DecoderInfo
    columns: Sequence[Tensor]
    valid: Sequence[Tensor]
    visual: Sequence[Tensor]
    marks: Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class CacheCut:
    """What stays in the cache.

    Attributes:
        keep: {layer: (B, T_l) bool}; layers not named stay whole.
        zero: {layer: (B, T_l) bool}, entries whose key and value become zero, though they stay.
    """

    keep: Mapping[int, Tensor] = field(default_factory=dict)
    zero: Mapping[int, Tensor] = field(default_factory=dict)


class DecoderMethod(Method):
    """A method inside the language model: of `PrefillLayer`, `FeedForward`, `CacheAfterPrefill`, or several of them.

    Attributes:
        positions: "compact" renumbers what follows a reduction 0, 1, ...; "original" leaves each token its position;
            None is the method's own rule (`own_positions`), and "original" where they are places in space and time.
        decode_position: "logical" goes on counting, layer by layer, from the largest position there; "cache_length"
            takes the number of entries in each layer's cache for the position of a new token; None is the method's own
            rule (`own_decode_position`).
        refuses: ways of calling the model that cannot work under it, and why: an option of `generate`, or an option
            with its value ("use_cache=False"), "labels", "training".
        without_encoder: the setting under which a method that acts in the vision encoder too does not.
    """

    sites: ClassVar[tuple[str, ...]] = ("PrefillLayer",)
    refuses: ClassVar[Mapping[str, str]] = {}
    without_encoder: ClassVar[str] = ""
    own_positions: ClassVar[Positions] = "original"
    positions: Positions | None = None
    decode_position: Literal["logical", "cache_length"] | None = None

    @property
    def own_decode_position(self) -> Literal["logical", "cache_length"]:
        """What a `decode_position` of None stands for."""
        return "logical"

    def encoder_part(self) -> EncoderMethod | None:
        """What the method does inside a vision encoder; the marks that it writes there travel on."""
        return None

    def visual_part(self) -> VisualMethod | None:
        """What it does between vision encoder and language model."""
        return None

    def layers(self, info: DecoderInfo) -> Mapping[int, LayerNeeds]:
        """{layer: what is needed}: before which layers (1 ... depth) tokens are dropped; `depth` is behind the last.

        Raises:
            LayerError: the model has no such layer.
        """
        return {}

    def prune(self, view: PrefillLayer) -> Survivors | None:
        """Answer one view; None keeps everything."""
        return None

    def sparse_layers(self, info: DecoderInfo) -> frozenset[int]:
        """Layers whose MLP the method wants to see."""
        return frozenset()

    def neurons(self, view: FeedForward) -> Neurons | None:
        """Answer one view; None leaves the MLP whole."""
        return None

    def cuts_cache(self, info: DecoderInfo) -> bool:
        """Whether `cut_cache` wants to be asked."""
        return False

    def cuts_early(self, info: DecoderInfo) -> bool:
        """Whether `prune` may take dropped tokens out of the cache of earlier layers too."""
        return False

    def cut_cache(self, view: CacheAfterPrefill) -> CacheCut | None:
        """Answer one view; None leaves the cache as it is."""
        return None

    def entering(self, info: DecoderInfo, visual: int, kept: int | None = None) -> tuple[int, ...]:
        """Visual tokens that enter each layer (depth of them), of `visual`; for `tokred.flops`.

        Args:
            kept: how many are left at the end, for methods whose counts depend on the input.
        """
        return (visual,) * info.depth

    def scoring_macs(self, info: DecoderInfo, entering: Sequence[int], text: int) -> int:
        """Multiply-adds that choosing adds to a prefill, given the visual tokens that enter each layer."""
        return 0

    def cached(self, info: DecoderInfo, entering: Sequence[int]) -> tuple[int, ...]:
        """Visual tokens that each layer's cache holds when decoding begins, of those that entered the layers."""
        return tuple(entering)

    def decode_macs(self, info: DecoderInfo) -> int:
        """Multiply-adds of the weights of all layers for one new token."""
        return info.depth * info.layer_macs


@dataclass
class Prompt:
    """A prompt before it enters the language model, as one of its first layers sees it.

    Attributes:
        layer: the layer r that was asked. info: the language model in numbers.
        query: (B, H, d), of the last position at layer r, after norm and rotary embedding.
        keys: (B, H_kv, n, d), of all positions there. values are not formed, nor is anything behind q and k of r.
        visual, text: (B, n) bool. columns: (B, n) int64, the column of the caller's prompt that each is.
        media: (B, n) int64, which image or video of its row, -1 for none.
    """

    layer: int
    info: DecoderInfo
    query: Tensor
    keys: Tensor
    visual: Tensor
    text: Tensor
    columns: Tensor
    media: Tensor

    @property
    def valid(self) -> Tensor:
        """(B, n) bool: real tokens."""
        return self.visual | self.text


#: runs token ids (B, n) through a model's first layers, and gives {r: what layer r sees of them}
Probe = Callable[[Tensor, Sequence[int]], Mapping[int, Prompt]]


class PromptMethod(Method):
    """A method of the `Prompt` site: the first layers choose the part of the prompt that all layers read.

    Attributes:
        positions: as of `DecoderMethod`.
    """

    sites: ClassVar[tuple[str, ...]] = ("Prompt",)
    own_positions: ClassVar[Positions] = "compact"
    positions: Positions | None = None

    def filter_layer(self, info: DecoderInfo, probe: Probe) -> int:
        """The layer r to ask; `probe` tries prompts on the model itself."""
        raise TypeError(f"{type(self).__name__} does not define filter_layer()")

    def bypasses(self, visual: int, text: int) -> bool:
        """Whether a prompt with so many visual and text tokens goes on untouched, unasked."""
        return False

    def choose(self, view: Prompt) -> Tensor:
        """(B, n) bool: what goes on; padding is left out whatever it says."""
        raise TypeError(f"{type(self).__name__} does not define choose()")

    def kept(self, visual: int, text: int, images: Sequence[int] = ()) -> int:
        """Tokens that go on, for `tokred.flops`; `images`: the visual ones of each image or video (none: of one)."""
        raise TypeError(f"{type(self).__name__} does not define kept()")

    def scoring_macs(self, info: DecoderInfo, tokens: int) -> int:
        """Multiply-adds of the choice among so many tokens, without the pass of the first layers over them."""
        return 0
