"""The Triton kernels in Triton's interpreter, on the CPU. Run by ``test_kernels.py`` in a process of its own:

TRITON_INTERPRET=1 python -m pytest tests/ops/interpreter_suite.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.cases import each_check, registered
from tokred import ops
from tokred.ops import _common, gather, matching, merge, pagerank, scores

pytestmark = pytest.mark.skipif(not _common.interpreting(), reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def _kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch must not answer in the kernels' place."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the plain path was taken")

    for module, name in (
        (gather, "gather_or_zero"),
        (merge, "_merge"),
        (scores, "_rows"),
        (scores, "_mass"),
        (matching, "_match"),
        (pagerank, "_page_rank"),
    ):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.usefixtures("_kernels_only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each_check
def test_kernel_equals_its_definition(check: Any, dtype: torch.dtype) -> None:
    check(registered, "cpu", dtype)


def test_kernels_agree_with_plain_torch_at_the_size_of_a_small_vit() -> None:
    q, k = torch.randn(2, 1, 2, 197, 64).unbind()
    start = torch.rand(1, 197)
    torch.testing.assert_close(registered.attention_mass(q, k, 0.125), ops.attention_mass(q, k, 0.125))
    attention = ops.attention_rows(q, k, 0.125)
    torch.testing.assert_close(registered.attention_rows(q, k, 0.125), attention)
    torch.testing.assert_close(
        registered.page_rank(attention, start, 3), ops.page_rank(attention, start, 3), rtol=1e-5, atol=1e-7
    )
    value, index = registered.bipartite_match(q[0], k[0])
    want = ops.bipartite_match(q[0], k[0])
    torch.testing.assert_close(value, want[0])
    assert torch.equal(index, want[1])


def test_opcheck_with_kernels() -> None:
    x, where = torch.randn(2, 9, 5, requires_grad=True), torch.randint(-1, 4, (2, 9))
    torch.library.opcheck(torch.ops.tokred.gather_rows.default, (x, where))
    torch.library.opcheck(
        torch.ops.tokred.merge_rows.default, (x, where, 4, torch.rand(2, 9, requires_grad=True), True)
    )
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 6, 8)
    torch.library.opcheck(torch.ops.tokred.attention_mass.default, (q, k, 0.3, None, torch.rand(1, 6), None))
    torch.library.opcheck(torch.ops.tokred.bipartite_match.default, (q[:, 0], k[:, 0], "cosine", None, None))
