"""PyTorch's flash backend on these kernels: values, gradients, layouts, restoration."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import assert_as_accurate, assert_matches_reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

torch_sdpa = pytest.importorskip(
    "mistral_kernels.integrations.torch_sdpa",
    reason="the flash backend of this torch cannot be replaced",
    exc_type=ImportError,
)

from torch.nn.attention import (  # noqa: E402
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
)

from mistral_kernels.ops import reference  # noqa: E402

flash = torch.ops.aten._scaled_dot_product_flash_attention
flash_forward = torch.ops.aten._flash_attention_forward
# These arguments were added after torch 2.10.
needs_block_table = pytest.mark.skipif(
    "block_table" not in str(flash_forward.default._schema), reason="this torch has no block_table"
)


@pytest.fixture
def replaced(device: torch.device) -> Iterator[torch.device]:
    """Replace the flash attention of the device; yield the device."""
    replacement = torch_sdpa.replace_flash_attention(device.type.upper())
    yield device
    replacement.remove()


def make_inputs(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    heads_first: bool = False,
) -> dict[str, Tensor]:
    """Return (batch, heads, seqlen, head_dim) tensors, in memory with heads or tokens first."""
    inputs = {}
    for name, length, h in zip(
        "qkv", (lengths[0], lengths[1], lengths[1]), (*heads, heads[1]), strict=True
    ):
        shape = (2, h, length, head_dim) if heads_first else (2, length, h, head_dim)
        x = torch.randn(shape, device=device).to(dtype)
        inputs[name] = (x if heads_first else x.transpose(1, 2)).requires_grad_()
    return inputs


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    return out.transpose(1, 2), lse.detach()


CASES = {
    "causal": ((70, 70), (4, 2), 16, {"is_causal": True}),
    "bottom-right": ((9, 75), (4, 1), 24, {"is_causal": True, "scale": 0.3}),
    "full": ((33, 70), (3, 3), 20, {}),
}


@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens first", "heads first"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(replaced: torch.device, case: str, heads_first: bool) -> None:
    lengths, heads, head_dim, options = CASES[case]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash(q, k, v, 0.0, **options)
        return out, lse.detach()

    def definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        causal, scale = options.get("is_causal", False), options.get("scale")
        return attention(q, k, v, causal=causal, softmax_scale=scale)

    inputs = make_inputs(lengths, heads, head_dim, replaced, heads_first=heads_first)
    assert_matches_reference(ours, definition, inputs)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 16), pytest.param(torch.bfloat16, 64, marks=pytest.mark.slow)],
    ids=str,
)
def test_kernels(
    triton_backend: None, replaced: torch.device, dtype: torch.dtype, head_dim: int
) -> None:
    inputs = make_inputs((40, 40), (4, 2), head_dim, replaced, dtype)
    assert_matches_reference(
        lambda q, k, v: flash(q, k, v, 0.0, True)[0],
        lambda q, k, v: attention(q, k, v, causal=True)[0],
        inputs,
    )


@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens first", "heads first"])
def test_outputs_match_the_traced_metadata(replaced: torch.device, heads_first: bool) -> None:
    """Compare shapes, strides and dtypes with those of PyTorch's fake tensors."""

    def run() -> list[Any]:
        inputs = make_inputs((5, 7), (4, 2), 16, replaced, heads_first=heads_first)
        outputs = list(flash(*inputs.values(), 0.0, True))
        dout = torch.empty_like(outputs[0]).fill_(1.0)
        return outputs + list(torch.autograd.grad(outputs[0], list(inputs.values()), dout))

    actual = run()
    with FakeTensorMode():
        traced = run()
    for a, t in zip(actual, traced, strict=True):
        if isinstance(a, Tensor):
            assert (a.shape, a.stride(), a.dtype) == (t.shape, t.stride(), t.dtype)
        else:
            assert a == t


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (6, 0), (3, 4)], ids=str)
def test_packed(replaced: torch.device, window: tuple[int, int]) -> None:
    """Test the operators that `varlen_attn` and nested tensors call, including the in-place one."""
    ends_q, ends_k = [0, 5, 5, 25, 36], [0, 9, 9, 29, 40]
    cu = [torch.tensor(ends, dtype=torch.int32, device=replaced) for ends in (ends_q, ends_k)]
    inputs = {
        name: torch.randn(n, heads, 16, device=replaced, requires_grad=True)
        for name, n, heads in (("q", 36, 4), ("k", 40, 2), ("v", 40, 2))
    }
    arguments = *cu, 20, 20, 0.0, False, False
    windows = {"window_size_left": window[0], "window_size_right": window[1]}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash_forward(q, k, v, *arguments, **windows)
        return out, lse.detach()

    def definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for i in range(4):
            rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
            sequence = q[None, rows], k[None, keys], v[None, keys]
            out, lse = reference.attention(*sequence, window_size=window)
            outs.append(out[0])
            lses.append(lse[0].detach())
        return torch.cat(outs), torch.cat(lses, 1)

    assert_matches_reference(ours, definition, inputs)
    into = getattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace", None)
    if into is not None:
        with torch.no_grad():
            q, k, v = inputs.values()
            out = torch.empty_like(q)
            lse = into(out, q, k, v, *arguments, **windows)
            torch.testing.assert_close((out, lse), ours(q, k, v))


@needs_block_table
def test_paged_attention(replaced: torch.device) -> None:
    check_pages(replaced)


@needs_block_table
@pytest.mark.kernels
def test_paged_attention_kernels(triton_backend: None, replaced: torch.device) -> None:
    check_pages(replaced)


@torch.no_grad()
def check_pages(device: torch.device) -> None:
    page, used, new = 16, [37, 5, 64], [3, 1, 7]
    pools = torch.randn(2, 12, page, 2, 16, device=device)
    table = torch.randperm(12)[:12].reshape(3, 4).to(device, torch.int32)
    ends = [0, *torch.tensor(new).cumsum(0).tolist()]
    cu = torch.tensor(ends, dtype=torch.int32, device=device)
    q = torch.randn(ends[-1], 4, 16, device=device)
    out, lse, *_ = flash_forward(
        *(q, *pools, cu, None, 7, 64, 0.0, False, False),
        window_size_left=20,
        window_size_right=0,
        seqused_k=torch.tensor(used, dtype=torch.int32, device=device),
        block_table=table,
    )
    for i, length in enumerate(used):
        rows = slice(*ends[i : i + 2])
        k, v = (x[table[i].long()].flatten(0, 1)[None, :length] for x in pools)
        plain, exact = (
            reference.attention(*(x.to(dtype) for x in (q[None, rows], k, v)), window_size=(20, 0))
            for dtype in (torch.float32, torch.float64)
        )
        for actual, p, e in zip((out[rows], lse[:, rows]), plain, exact, strict=True):
            assert_as_accurate(actual, p[0], e[0], f"sequence {i}")


def test_scaled_dot_product_attention() -> None:
    """Call `scaled_dot_product_attention`, so that PyTorch selects the backend."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch selects flash attention on GPUs only")
    torch_sdpa.register()
    activate_flash_attention_impl("mistral_kernels")
    try:
        inputs = make_inputs((130, 130), (4, 4), 64, torch.device("cuda"), torch.bfloat16)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            assert_matches_reference(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                lambda q, k, v: attention(q, k, v, causal=True)[0],
                inputs,
            )
    finally:
        torch_sdpa.restore()


def registrations() -> list[str]:
    names = [name for name in torch_sdpa._OPERATORS if hasattr(torch.ops.aten, name)]
    return [torch._C._dispatch_dump(f"aten::{name}") for name in names]


def test_operators_are_replaced_only_while_activated() -> None:
    """Check that registering changes no operator and that `restore` undoes an activation."""
    before = registrations()
    torch_sdpa.register()
    torch_sdpa.register()
    assert "mistral_kernels" in list_flash_attention_impls()
    assert current_flash_attention_impl() is None
    assert registrations() == before
    for _ in range(2):
        activate_flash_attention_impl("mistral_kernels")
        assert current_flash_attention_impl() == "mistral_kernels"
        assert all(a != b for a, b in zip(registrations(), before, strict=True))
        torch_sdpa.restore()
        torch_sdpa.restore()
        assert current_flash_attention_impl() is None
        assert registrations() == before


def test_the_torch_backend_raises_instead_of_calling_itself(torch_backend: None) -> None:
    """The torch backend calls PyTorch's attention, which is replaced on a GPU."""
    with FakeTensorMode():
        q = torch.empty(1, 2, 3, 16, device="cuda", dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"^MISTRAL_KERNELS_BACKEND must not be torch while"):
        torch_sdpa._sdpa_forward(q, q, q)


Q = torch.zeros(1, 4, 6, 16)
PACKED = torch.zeros(6, 4, 16)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flash(Q, Q, Q, 0.1), NotImplementedError, "^dropout_p must be 0, got 0.1"),
        (lambda: flash(Q, Q, Q, 0.0, True, True), NotImplementedError, "^return_debug_mask is"),
        (
            lambda: flash_forward(
                *(PACKED, PACKED, PACKED, CU, CU, 4, 4, 0.0, True, False), seqused_k=CU[1:]
            ),
            NotImplementedError,
            "^seqused_k is not supported by mistral_kernels; omit it",
        ),
        (
            lambda: flash_forward(
                *(PACKED, PACKED, PACKED, CU, CU, 4, 4, 0.0, True, False),
                alibi_slopes=torch.ones(4),
            ),
            NotImplementedError,
            "^alibi_slopes is not supported by mistral_kernels",
        ),
        (lambda: flash(Q, Q[:, :3], Q[:, :3]), ValueError, "multiple of key's, got 4 and 3"),
        (
            lambda: flash(*[torch.zeros(1, 1, 2, 264)] * 3),
            ValueError,
            "query's head_dim must be in .1, 256., got 264",
        ),
    ],
)
def test_invalid_arguments(call: Any, error: type[Exception], message: str) -> None:
    replacement = torch_sdpa.replace_flash_attention("CPU")
    try:
        with pytest.raises(error, match=message):
            call()
    finally:
        replacement.remove()


def test_invalid_paged_arguments() -> None:
    query, used = PACKED.clone().requires_grad_(), torch.tensor([2, 4], dtype=torch.int32)
    call = query, PACKED[None], PACKED[None], CU, None, 4, 6, 0.0, True, False
    table = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="cum_seq_q and seqused_k are required when block_"):
        torch_sdpa._forward(*call, block_table=table)
    with pytest.raises(NotImplementedError, match="block_table is not supported with gradients"):
        torch_sdpa._forward(*call, block_table=table, seqused_k=used)


def test_import_with_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(torch.nn.attention, "register_flash_attention_impl")
        with pytest.raises(ImportError, match=r"found .*; run pip install -U torch$"):
            importlib.reload(torch_sdpa)
    importlib.reload(torch_sdpa)
