"""Sites: the contracts between methods and hosts.

A host builds the view of a site and carries out the answer; a method reads the view and answers. `EncoderBlock` is
the site inside a vision encoder, `VisualFeatures` the one between a vision encoder and a language model. Views are
made for one call and hold tensors of that call only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokred import ops
from tokred.core.errors import NoClassTokenError
from tokred.core.scoring import FrameScorer
from tokred.core.tokens import TokenTable

__all__ = [
    "SITES",
    "AttentionTap",
    "DecoderInfo",
    "EncoderBlock",
    "EncoderInfo",
    "MediaLayout",
    "Needs",
    "Placement",
    "PromptInfo",
    "TowerInfo",
    "VisualFeatures",
    "VisualSource",
]

Placement = Literal["attn", "block"]

SITES: dict[str, str] = {
    "EncoderBlock": "after the attention residual, or after the whole block, of a vision encoder layer",
    "VisualFeatures": "between vision encoder and language model: the visual tokens of one image or video",
    "Prompt": "around generate: the first layers of the language model read the prompt, and a part of it goes on",
    "PrefillLayer": "before a layer of the language model, while it reads the prompt",
    "FeedForward": "the MLP of a layer of the language model: watched in the prefill, made smaller in decoding",
    "CacheAfterPrefill": "the KV cache, once the prompt has gone through all layers",
    "DiffusionBlock": "around self-attention (also cross-attention and MLP) of a block of a denoiser",
}


@dataclass(frozen=True)
class EncoderInfo:
    """A vision encoder in numbers, as a host reads it off a model or a config.

    Attributes:
        depth, dim, heads, kv_heads, head_dim: of the blocks.
        prefix: tokens before the patch tokens (class, distillation, registers).
        class_tokens: how many of them, from position 0 on, are read out by a head (0, 1, or 2 when distilled).
        tokens: patch tokens of one image at the model's own size.
        grid: their (rows, columns), None where the input decides.
        attention_macs: multiply-adds per token of a block's projections, without the two N x N products.
        mlp_macs: multiply-adds per token of a block's MLP.
        embed_macs: multiply-adds per patch token of the patch embedding.
        head_macs: multiply-adds per image of what follows the blocks, whatever the number of tokens.
        pool_macs: multiply-adds per patch token that reaches an attention pool or a head that reads every token.
    """

    depth: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    prefix: int
    class_tokens: int
    tokens: int
    grid: tuple[int, int] | None
    attention_macs: int
    mlp_macs: int
    embed_macs: int = 0
    head_macs: int = 0
    pool_macs: int = 0

    def block_macs(self, attention_tokens: int, mlp_tokens: int) -> int:
        """Multiply-adds of one block: `attention_tokens` in attention, `mlp_tokens` in the MLP, prefix included.

        Per block ``4 N D^2 + 2 N^2 D`` and ``8 N D^2`` for a plain block of MLP ratio 4; norms and softmax not counted.
        """
        products = 2 * attention_tokens**2 * self.heads * self.head_dim
        return attention_tokens * self.attention_macs + products + mlp_tokens * self.mlp_macs


@dataclass
class AttentionTap:
    """What one layer's own attention worked on: q, k (after q/k norm and rotary embedding), scale and mask.

    Attributes:
        q: (B, H, N, d). k: (B, H_kv, N, d).
        scale: of the logits.
        mask: None, bool or additive, broadcastable to (B, H, N, N); the size bias of merged tokens is in it.
        v: (B, H_kv, N, d) where the method asked for it.
        probabilities: (B, H, N, N), where the host's attention formed the matrix itself.
        block_input: (B, N, C), where the method asked for it.
    """

    q: Tensor
    k: Tensor
    scale: float
    mask: Tensor | None = None
    v: Tensor | None = None
    probabilities: Tensor | None = None
    block_input: Tensor | None = None


@dataclass
class EncoderBlock:
    """View of one block of a vision encoder in one forward pass.

    Attributes:
        layer: 0-based index of the block.
        info: the encoder in numbers.
        tokens: (B, N, C) residual stream, prefix first.
        table: the token table before this reduction.
        tap: returns the captured attention inputs of this layer (an error names what the host did not deliver).
    """

    layer: int
    info: EncoderInfo
    tokens: Tensor
    table: TokenTable
    tap: Callable[[], AttentionTap]
    written: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _tapped: AttentionTap | None = field(default=None, init=False, repr=False)

    def mark(self, name: str, values: Tensor) -> None:
        """Write a mark, (B, n, ...) one entry for each token as it is before this reduction; later sites read it."""
        self.written[name] = values

    @property
    def prefix(self) -> int:
        return self.info.prefix

    @property
    def count(self) -> int:
        """Prunable tokens n = N - prefix."""
        return self.tokens.shape[1] - self.info.prefix

    @property
    def valid(self) -> Tensor | None:
        """(B, n) bool, False for padding; None where every token is real."""
        return self.table.valid

    @property
    def attention(self) -> AttentionTap:
        """What this layer's attention worked on, asked of the host once."""
        if self._tapped is None:
            self._tapped = self.tap()
        return self._tapped

    def keys(self) -> Tensor:
        """(B, H_kv, N, d): the keys that enter q k^T (after k-norm and rotary embedding)."""
        return self.attention.k

    def queries(self) -> Tensor:
        """(B, H, N, d): the queries that enter q k^T."""
        return self.attention.q

    def values(self) -> Tensor:
        """(B, H_kv, N, d): the values; the method must list "v" among its taps."""
        v = self.attention.v
        assert v is not None
        return v

    def block_input(self) -> Tensor:
        """(B, N, C): the residual stream as it entered the block; the method must list "input" among its taps."""
        x = self.attention.block_input
        assert x is not None
        return x

    def attention_rows(self, rows: slice) -> Tensor:
        """(B, H, R, N) float32: exact softmax attention of the chosen query rows (prefix included in the positions)."""
        tap = self.attention
        if tap.probabilities is not None:
            return tap.probabilities[:, :, rows].float()
        mask = tap.mask
        if mask is not None and mask.dim() == 4 and mask.shape[2] > 1:
            mask = mask[:, :, rows]
        return ops.attention_rows(tap.q[:, :, rows], tap.k, tap.scale, mask=mask)

    def class_attention(self) -> Tensor:
        """(B, H, n) float32: attention of the class token to each prunable token (softmax over all tokens).

        Raises:
            NoClassTokenError: the encoder has no class token.
        """
        if self.info.class_tokens == 0:
            raise NoClassTokenError(
                "class-token scores were asked of a vision encoder without a class token; "
                "use a score that needs none (for TopK: score='mass')"
            )
        return self.attention_rows(slice(0, 1))[:, :, 0, self.prefix :]

    def attention_mass(self) -> Tensor:
        """(B, H, n) float32: attention that each prunable token receives, summed over all real queries."""
        tap = self.attention
        weights = None
        if self.valid is not None:  # padding asks for nothing
            weights = torch.cat([self.valid.new_ones(self.valid.shape[0], self.prefix), self.valid], dim=1).float()
        if tap.probabilities is None:
            mass = ops.attention_mass(tap.q, tap.k, tap.scale, mask=tap.mask, query_weights=weights)
        elif weights is None:
            mass = tap.probabilities.float().sum(dim=2)
        else:
            mass = torch.einsum("bhqk,bq->bhk", tap.probabilities.float(), weights)
        return mass[:, :, self.prefix :]

    def attention_matrix(self, temperature: float = 1.0) -> Tensor:
        """(B, H, N, N) float32: the whole attention matrix of this layer; logits are divided by `temperature`."""
        tap = self.attention
        if temperature == 1.0 and tap.probabilities is not None:
            return tap.probabilities.float()
        mask = tap.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask / temperature
        return ops.attention_rows(tap.q, tap.k, tap.scale / temperature, mask=mask)


@dataclass(frozen=True)
class MediaLayout:
    """How the visual tokens of one image or video lie in the prompt.

    A *partition* is a tile of an image or a frame of a video; each has the same grid of *cells*, numbered
    ``partition * rows * columns + row * columns + column``. A cell may be missing from the prompt (unpadding).

    Attributes:
        kind: "image" or "video".
        partitions: tiles (P) or frames (T; for Qwen, temporal patches).
        grid: (rows, columns) of one partition.
        slots: for each placeholder of the prompt its cell, or `NEWLINE` (end of a row), `END` (end of the media) or
            `CLASS` (a class token that is fed to the language model).
        mosaic: (R, C), how partitions other than the overview tile the image, in raster order; None for no mosaic.
        overview: the partition that shows the whole image, where there is a mosaic.
        size: (height, width) of the original image, where the host knows it.
        merge: cells of the vision tower along each side of one cell here (pixel shuffle, pooling, Qwen's merger).
        uniform: False where tokens were resampled over the mosaic, so that tower cells and tokens do not correspond.
    """

    NEWLINE = -1
    END = -2
    CLASS = -3

    kind: Literal["image", "video"]
    partitions: int
    grid: tuple[int, int]
    slots: tuple[int, ...] = field(repr=False)
    mosaic: tuple[int, int] | None = None
    overview: int | None = None
    size: tuple[int, int] | None = None
    merge: int = 1
    uniform: bool = True

    @classmethod
    def as_video(cls, images: Sequence[MediaLayout]) -> MediaLayout | None:
        """The layout of several images read as the frames of one video; None if they are not of one plain grid."""
        first = images[0]
        alike = all(image == first and image.partitions == 1 and min(image.slots) >= 0 for image in images)
        if len(images) < 2 or not alike:
            return None
        n = first.cells_per_partition
        slots = tuple(frame * n + slot for frame in range(len(images)) for slot in first.slots)
        return cls(kind="video", partitions=len(images), grid=first.grid, slots=slots, merge=first.merge)

    @property
    def cells_per_partition(self) -> int:
        """N, cells of one partition."""
        return self.grid[0] * self.grid[1]

    @property
    def total_cells(self) -> int:
        """P N, cells of all partitions, those that unpadding cut off included."""
        return self.partitions * self.cells_per_partition

    @property
    def cells(self) -> tuple[int, ...]:
        """The cell of each prunable token (slots without newlines and class tokens)."""
        return tuple(slot for slot in self.slots if slot >= 0)


@dataclass(frozen=True)
class TowerInfo:
    """The vision tower of a multimodal model, as far as the `VisualFeatures` site tells of it.

    Attributes:
        depth, heads, dim: of its layers.
        has_class: whether it has a class token.
        feature_layer: 0-based, the last layer that contributes to the features the language model reads.
        has_probe: whether it ends in an attention pool whose probe can be asked (SigLIP's head).
        projects: whether the projector acts on each token by itself, so that merged tower tokens can be projected.
    """

    depth: int
    heads: int
    has_class: bool
    feature_layer: int
    has_probe: bool = False
    projects: bool = False
    dim: int = 0


@dataclass(frozen=True)
class Needs:
    """What a method wants of the vision tower; the host captures nothing else.

    Attributes:
        rows: layers whose class-token attention it reads. mass: layers whose received attention it reads.
        keys: layers whose keys it reads. probe: the attention of the pooling head's probe.
        hidden: tower tokens before the projector. dense: frame features before the host pools them.
        pixels: the frames as pictures.
    """

    rows: frozenset[int] = frozenset()
    mass: frozenset[int] = frozenset()
    keys: frozenset[int] = frozenset()
    probe: bool = False
    hidden: bool = False
    dense: bool = False
    pixels: bool = False


@dataclass(frozen=True)
class DecoderInfo:
    """A language model in numbers.

    Attributes:
        depth, dim: of its layers. width: of all query heads. layer_macs: multiply-adds of a layer's weights a token.
        heads, kv_heads, head_dim: of its attention. neurons: I, inner width of an MLP; mlp_macs: multiply-adds of an
            MLP a token. vocabulary: number of token ids.
        name: of the checkpoint, as far as the config tells. family: the config's model type.
    """

    depth: int
    dim: int
    width: int
    layer_macs: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    neurons: int = 0
    mlp_macs: int = 0
    vocabulary: int = 0
    name: str = ""
    family: str = ""

    def macs(self, tokens: int) -> int:
        """Multiply-adds of a prefill of `tokens`: ``L [T (4 d^2 + 3 d m) + 2 T^2 d]`` for a Llama; the head is
        not counted."""
        return self.depth * (tokens * self.layer_macs + 2 * tokens * tokens * self.width)


@dataclass(frozen=True)
class PromptInfo:
    """A call of a multimodal model in numbers, for `tokred.flops`.

    Attributes:
        layouts: of each image and video. text: tokens of the prompt that are not visual.
        tower: in numbers. vision_macs: multiply-adds of tower and projector for all of them, without methods inside.
        encoder: the tower as an `EncoderInfo`, where methods can act inside it. decoder: the language model.
    """

    layouts: tuple[MediaLayout, ...]
    text: int
    tower: TowerInfo
    vision_macs: int
    decoder: DecoderInfo
    encoder: EncoderInfo | None = None


class VisualSource(Protocol):
    """What a host hands out for one group of images or videos of equal layout (G of them)."""

    def class_attention(self, layer: int) -> Tensor: ...
    def attention_mass(self, layer: int) -> Tensor: ...
    def probe_attention(self) -> Tensor: ...
    def keys(self, layer: int) -> Tensor: ...
    def hidden(self) -> Tensor: ...
    def class_hidden(self) -> Tensor: ...
    def project(self, x: Tensor) -> Tensor: ...
    def dense(self) -> tuple[Tensor, tuple[int, int], Callable[[Tensor], Tensor]]: ...
    def query(self, item: int) -> str: ...
    def question_features(self, item: int) -> Tensor: ...
    def frames(self, item: int) -> Tensor: ...
    def frame_scores(self, item: int) -> Tensor | None: ...
    def newline(self) -> Tensor | None: ...
    def default_scorer(self) -> FrameScorer: ...
    def carried(self, item: int) -> Tensor: ...


@dataclass
class VisualFeatures:
    """View of G images (or videos) of one layout, on their way from the vision encoder into the language model.

    Attributes:
        layout: how their tokens lie. tower: the encoder in numbers.
        features: (G, n, D), what the language model would read: the prunable tokens, in the order of the prompt.
        cells: (n,) int64, the cell of each token (`MediaLayout.cells`).
        source: asks the host for scores and more; the method must have declared them in `needs`.
        mrope: whether positions are those of cells in space and time (Qwen), not of tokens in a line.
        separated: whether text stands between the partitions (Qwen3-VL's timestamps).
    """

    layout: MediaLayout
    tower: TowerInfo
    features: Tensor
    cells: Tensor
    source: VisualSource
    mrope: bool = False
    separated: bool = False

    @property
    def count(self) -> int:
        """n, prunable tokens of one image or video."""
        return self.features.shape[1]

    @property
    def items(self) -> int:
        """G, images or videos in this view."""
        return self.features.shape[0]

    @property
    def partition(self) -> Tensor:
        """(n,) int64: the tile or frame of each token."""
        return self.cells // self.layout.cells_per_partition

    def at_tokens(self, values: Tensor) -> Tensor:
        """Values of cells (G, P, N, ...) -> values of the tokens (G, n, ...)."""
        return values.flatten(1, 2)[:, self.cells]

    def class_attention(self, layer: int) -> Tensor:
        """(G, P, H, N) float32: attention of the class token to each cell at a tower layer, softmax over all tokens."""
        return self.source.class_attention(layer)

    def attention_mass(self, layer: int) -> Tensor:
        """(G, P, H, N) float32: attention that each cell receives at a tower layer, summed over all queries."""
        return self.source.attention_mass(layer)

    def probe_attention(self) -> Tensor:
        """(G, P, H, N) float32: attention of the pooling head's probe to each cell."""
        return self.source.probe_attention()

    def keys(self, layer: int) -> Tensor:
        """(G, P, H, N, d): keys of the cells at a tower layer."""
        return self.source.keys(layer)

    def hidden(self) -> Tensor:
        """(G, P, N, C): tower tokens at the layer that the projector reads."""
        return self.source.hidden()

    def class_hidden(self) -> Tensor:
        """(G, P, C): the class token at that layer."""
        return self.source.class_hidden()

    def project(self, x: Tensor) -> Tensor:
        """Project tower tokens (..., C) to what the language model reads (..., D)."""
        return self.source.project(x)

    def dense(self) -> tuple[Tensor, tuple[int, int], Callable[[Tensor], Tensor]]:
        """Frame features before the host pools them: (G, T, rows * columns, C), (rows, columns), and what makes
        language model features of resampled ones."""
        return self.source.dense()

    def query(self, item: int) -> str:
        """The question that goes with an item: as given by `Patch.request`, else the text of its prompt."""
        return self.source.query(item)

    def question_features(self, item: int) -> Tensor:
        """(L, D): what the language model reads for the text tokens of the item's prompt."""
        return self.source.question_features(item)

    def frames(self, item: int) -> Tensor:
        """(T, height, width, 3) uint8: the frames of an item as pictures."""
        return self.source.frames(item)

    def frame_scores(self, item: int) -> Tensor | None:
        """(T,) scores that the caller gave by `Patch.request`, or None."""
        return self.source.frame_scores(item)

    def default_scorer(self) -> FrameScorer:
        """The frame scorer that is used where none was given; the error of one out of reach names ``scorer=``."""
        return self.source.default_scorer()

    def carried(self, item: int) -> Tensor:
        """(m,) int64: cells that stand for the tokens as methods inside the vision tower left them, in that order."""
        return self.source.carried(item)

    @property
    def newline(self) -> Tensor | None:
        """(D,) the embedding that ends a row of tokens, where the host has one."""
        return self.source.newline()

    def texts(self) -> Sequence[str]:
        """The question of each item."""
        return [self.query(item) for item in range(self.items)]
