"""Attention mask of a forward pass: a few numbers per sequence, created once for all layers."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import BlockMask

from mistral_kernels.ops.attention.checks import make_cu_seqlens

_READ_BY_ANOTHER = (
    "attention_mask must be used with attn_implementation='mistral_kernels', which created it: set "
    "the same attn_implementation for the model and for layers with a config of their own, or use "
    "'sdpa'"
)
_PACKED_OVER_A_CACHE = (
    "position_ids of a packed batch are not supported under torch.compile with a cache: pass "
    "use_cache=False"
)


class MaskError(AttributeError, ValueError):
    """Error raised when a `Mask` is read as a tensor."""


class Mask(BlockMask):
    """Causal attention mask that only `transformers_attention.attend` can read.

    The class derives from `BlockMask` because transformers passes a `BlockMask` from the model to
    its layers without reading it. Any other read raises `MaskError`: a read by another attention
    implementation, or by a model that modifies its mask. A causal mask without padding is also a
    `Mask`, not None as for sdpa: with None, eager attention would let queries see later keys.

    Query i has position q_offset + i, and key j has position kv_offset + j. By position, a query
    sees a key if first valid key <= key <= query and key > query - window.

    Attributes:
        shape: (batch, 1, seqlen_q, seqlen_k), the shape of the full mask.
        full: bool mask of this shape, for masks that hide a key between two valid keys, and for
            padding that cannot be read from the device. None: the other attributes define the mask.
        descriptor: (batch, 3) int32, [first valid key, q_offset, kv_offset] of each row. None if no
            row is padded on the left and the last query has the position of the last key.
        cu_seqlens: (sequences + 1,) int32 offsets of a packed batch. None if each row is one
            sequence.
        last: (batch, 1, 1, seqlen_k) bool, the keys that the last query of each row sees. None if
            no row is padded on the right. It exists because `generate` reads the logits of the last
            query even if this query is padding. Other padding on the right attends like tokens.
        starts, q_offset, kv_offset: the descriptor on the host. starts is None if only the device
            has the descriptor.
        is_plain: True if the mask is causal without padding, offsets or packing.
    """

    shape: tuple[int, ...] = ()  # overrides BlockMask's property
    ndim = 4  # models recognize a mask created by `generate` by its 4 dimensions

    def __init__(
        self,
        shape: tuple[int, ...],
        full: Tensor | None = None,
        descriptor: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        last: Tensor | None = None,
        starts: list[int] | None = None,
        q_offset: int = 0,
        kv_offset: int = 0,
    ) -> None:
        self.shape, self.full, self.descriptor = shape, full, descriptor
        self.cu_seqlens, self.last = cu_seqlens, last
        self.starts, self.q_offset, self.kv_offset = starts, q_offset, kv_offset
        self.is_plain = full is None and descriptor is None and cu_seqlens is None and last is None
        # Caches of the methods below: computed once for all layers.
        self._held: tuple[Tensor, Tensor | None] | None = None
        self._packing: tuple[Tensor, Tensor] | None = None
        self._packed_cu_seqlens: tuple[Tensor, Tensor | None] | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Mask:
        """Return the mask on another device; accelerate moves the inputs of a layer this way."""
        if not isinstance(device, (torch.device, str, int)):
            raise MaskError(_READ_BY_ANOTHER)
        names = ("full", "descriptor", "cu_seqlens", "last")
        before = [getattr(self, name) for name in names]
        after = [None if x is None else x.to(device, non_blocking=non_blocking) for x in before]
        if all(x is y for x, y in zip(before, after, strict=True)):
            return self
        moved = copy.copy(self)
        vars(moved).update(
            zip(names, after, strict=True), _held=None, _packing=None, _packed_cu_seqlens=None
        )
        return moved

    def dim(self) -> int:
        """Return the number of dimensions, 4."""
        return self.ndim

    def __repr__(self) -> str:
        return f"Mask(shape={self.shape}, starts={self.starts}, cu_seqlens={self.cu_seqlens})"

    __str__ = __repr__

    def __getattr__(self, name: str) -> NoReturn:
        raise MaskError(_READ_BY_ANOTHER)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        # Not a TypeError: PyTorch's binary operators would replace it by their own.
        raise MaskError(_READ_BY_ANOTHER)

    @property
    def first_keys(self) -> list[int]:
        """First valid key of each row. Reads the device if the host does not have the values."""
        if self.starts is None:
            if self.descriptor is None:
                self.starts = [0] * self.shape[0]
            else:
                rows = self.descriptor.tolist()
                self.starts = [row[0] for row in rows]
                _, self.q_offset, self.kv_offset = rows[0]
        return self.starts

    @property
    def is_padded(self) -> bool:
        """True if any row is padded on the left."""
        return max(self.first_keys) > self.kv_offset

    @property
    def num_keys(self) -> int:
        """Number of keys up to the last query. A static cache has more keys, not yet written."""
        return self.q_offset + self.shape[2] - self.kv_offset

    def held_keys(self) -> tuple[Tensor, Tensor | None]:
        """Return the number of keys up to the last query, and the number of padded keys in them.

        Both are (batch,) int32 and are computed on the device, without a synchronization. The
        second is None if the host has the padding and no row is padded.
        """
        assert self.descriptor is not None
        tracing = is_tracing(self.descriptor)
        if self._held is not None and not tracing:
            return self._held
        starts, q_offset, kv_offset = self.descriptor.unbind(-1)
        held, leftpad = q_offset + self.shape[2] - kv_offset, None
        if tracing or self.starts is None or self.is_padded:
            leftpad = torch.minimum((starts - kv_offset).clamp(min=0), held)
        if not tracing:
            self._held = held, leftpad
        return held, leftpad

    def packing(self) -> tuple[Tensor, Tensor]:
        """Return cu_seqlens of the queries of all rows, and of the first `num_keys` keys per row.

        Each row becomes three sequences: its padded queries, which see no key; its padded keys,
        which no query sees; and its tokens.
        """
        if self._packing is None:
            assert self.descriptor is not None
            lengths_q: list[int] = []
            lengths_k: list[int] = []
            for start in self.first_keys:
                seqlen_q, seqlen_k = self.shape[2], self.num_keys
                pad_q = min(max(start - self.q_offset, 0), seqlen_q)
                pad_k = min(max(start - self.kv_offset, 0), seqlen_k)
                lengths_q += (pad_q, 0, seqlen_q - pad_q)
                lengths_k += (0, pad_k, seqlen_k - pad_k)
            device = self.descriptor.device
            self._packing = make_cu_seqlens(lengths_q, device), make_cu_seqlens(lengths_k, device)
        return self._packing

    def packed_cu_seqlens(self, position_ids: Any) -> Tensor | None:
        """Return cu_seqlens of the sequences that `position_ids` pack; None: one sequence per row.

        The rule is that of transformers' flash attention: if there is neither padding nor an
        earlier token, a sequence begins wherever the position is the smallest of the row. The
        positions are read from the device once per mask, for prompts and in training.
        """
        batch, _, seqlen_q, seqlen_k = self.shape
        if seqlen_q == 1 or not isinstance(position_ids, Tensor):
            return None
        if not self.is_plain and (self.descriptor is None or self.last is not None):
            return None
        tracing = is_tracing(position_ids)
        if self.descriptor is not None:
            if tracing or self.is_padded:
                return None
            seqlen_k = self.num_keys
        if seqlen_q != seqlen_k or position_ids.shape[1:] != (seqlen_q,):
            return None
        if tracing:
            restarts = position_ids[:, 1:] == position_ids.amin(1, keepdim=True)
            torch._assert_async(~restarts.any(), _PACKED_OVER_A_CACHE)
            return None
        if self._packed_cu_seqlens is None or self._packed_cu_seqlens[0] is not position_ids:
            begins = position_ids == position_ids.amin(1, keepdim=True)
            self._packed_cu_seqlens = position_ids, cu_seqlens_of(begins.expand(batch, -1))
        return self._packed_cu_seqlens[1]


def cu_seqlens_of(begins: Tensor) -> Tensor | None:
    """Return cu_seqlens from (batch, seqlen) flags; None: one sequence per row.

    A flag is True where a sequence begins. The first token of a row always begins a sequence.
    """
    if not begins[:, 1:].any():
        return None
    begins = begins.clone()
    begins[:, 0] = True
    offsets = begins.flatten().nonzero().flatten().tolist()
    ends = [*offsets[1:], begins.numel()]
    return make_cu_seqlens(
        [end - begin for begin, end in zip(offsets, ends, strict=True)], begins.device
    )


def is_tracing(x: Tensor) -> bool:
    """Return whether the values of tensors like `x` cannot be read.

    This is the case under torch.compile, in a trace, during the capture of a CUDA graph, and for
    fake and meta tensors, which have no values.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if x.is_meta or isinstance(x, FakeTensor):
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
