"""Pure tensor operations of token reduction: no model, no method, only tensors.

Each op has three forms with one result:

* a slow definition of a few obvious lines in :mod:`tokred.ops.reference`;
* a fast plain-torch path, which runs on the CPU (and on any device without Triton);
* a Triton kernel behind a ``torch.library`` custom op ``torch.ops.tokred.<name>``, which CUDA tensors take.

Scores are float32 (float64 for float64 inputs) whatever the input dtype and autocast say, carry no gradient, and every
selection is a stable sort: ties go to the lower index, NaN comes last. ``gather_tokens``, ``merge_tokens`` and
``unmerge_tokens`` are differentiable. Arguments are checked by shape and dtype only; index *values* are not read,
because that would wait for the device.
"""

from tokred.ops.gather import gather_tokens, unmerge_tokens
from tokred.ops.matching import bipartite_match
from tokred.ops.merge import merge_tokens
from tokred.ops.pagerank import page_rank
from tokred.ops.scores import attention_mass, attention_rows
from tokred.ops.select import rank, top_indices

__all__ = [
    "attention_mass",
    "attention_rows",
    "bipartite_match",
    "gather_tokens",
    "merge_tokens",
    "page_rank",
    "rank",
    "top_indices",
    "unmerge_tokens",
]
