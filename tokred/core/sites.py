"""Sites: the contracts between methods and hosts.

A host builds the view of a site and carries out the answer; a method reads the view and answers. `EncoderBlock` is
the site inside a vision encoder. Views are made for one call and hold tensors of that call only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokred import ops
from tokred.core.errors import NoClassTokenError
from tokred.core.tokens import TokenTable

__all__ = ["SITES", "AttentionTap", "EncoderBlock", "EncoderInfo", "Placement"]

Placement = Literal["attn", "block"]

SITES: dict[str, str] = {
    "EncoderBlock": "after the attention residual, or after the whole block, of a vision encoder layer",
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
    _tapped: AttentionTap | None = field(default=None, init=False, repr=False)

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
