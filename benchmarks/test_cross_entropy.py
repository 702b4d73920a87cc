"""linear_cross_entropy, loss and both gradients, beside the logits and cross entropy of PyTorch.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_cross_entropy.py

On a GPU with the hidden size of Mistral-7B, elsewhere with a small one. Nothing is timed before
both sides agree. Ours is to take no more than a ninth longer: what it is for is memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.cross_entropy import linear_cross_entropy

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Pair  # noqa: E402  # beside this file, which is no package

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOKENS, HIDDEN, VOCAB, ROUNDS = (8192, 4096, 32000, 20) if ON_GPU else (1024, 1024, 32000, 5)
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_speed(dtype: torch.dtype, against: Pair, benchmark) -> None:
    hidden = torch.randn(TOKENS, HIDDEN, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, device=DEVICE) / HIDDEN**0.5).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), device=DEVICE)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss, (hidden, weight))
        if ON_GPU:
            torch.cuda.synchronize()
        return loss.detach().float(), *grads

    def ours() -> tuple[Tensor, ...]:
        return gradients(linear_cross_entropy(hidden, weight, targets))

    def eager() -> tuple[Tensor, ...]:
        return gradients(F.cross_entropy(hidden @ weight.mT, targets))

    for a, b in zip(ours(), eager()):
        scale = b.abs().max().item()
        error = 4 * torch.finfo(dtype).eps + 1e-5
        torch.testing.assert_close(a, b, rtol=0, atol=error * scale)
    against("eager", ours, eager, ROUNDS)
    assert benchmark.extra_info["peer_over_ours"] >= 0.9
