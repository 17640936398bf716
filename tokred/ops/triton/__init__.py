"""Triton kernels behind ``torch.ops.tokred.*``. Import this package only through ``tokred.ops._common.kernels``.

Every function takes checked arguments of one dtype (float16, bfloat16 or float32) with any strides, and allocates its
result. ``TRITON_INTERPRET`` is read when the kernels are defined, that is, at this import.
"""

from tokred.ops.triton.attention import attention_mass, attention_rows
from tokred.ops.triton.matching import bipartite_match
from tokred.ops.triton.pagerank import PAGE_RANK_MAX_TOKENS, page_rank
from tokred.ops.triton.rows import gather_rows, merge_rows

__all__ = [
    "PAGE_RANK_MAX_TOKENS",
    "attention_mass",
    "attention_rows",
    "bipartite_match",
    "gather_rows",
    "merge_rows",
    "page_rank",
]
