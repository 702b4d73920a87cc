"""Operators: differentiable functions for models, and the `torch.ops` operators that they call.

A model calls the functions (`rms_norm`, `apply_rotary`, `attention`, ...). They are differentiable
and work under `torch.compile`. Each function calls operators with a schema,
`torch.ops.mistral_kernels.*`. Call the operators directly where an operator must be named: in an
exported graph, a compiler pass or a function that is compiled ahead of time.

The operators check their arguments. They have fakes with the real strides and a rule for
`torch.func.vmap`. Their arguments have no defaults. They are not differentiable: each backward pass
is an operator of its own. A result that was not requested is an empty tensor.

    >>> import torch
    >>> import mistral_kernels
    >>> ops = torch.ops.mistral_kernels
    >>> batch, seqlen, hidden, heads, kv_heads, head_dim = 2, 50, 64, 4, 2, 16

RMSNorm over the last dimension of x, or of x + residual if a residual is given. The results are the
normalized tensor, x + residual, and 1 / RMS of every row. The last one is for the backward pass and
is computed if `save_rstd` is True.

    >>> x, weight = torch.randn(batch, seqlen, hidden), torch.ones(hidden)
    >>> y, _, _ = ops.rms_norm_forward(x, weight, residual=None, eps=1e-5, save_rstd=False)
    >>> y.shape
    torch.Size([2, 50, 64])

Rotary embedding of q and k in one launch. The tables are (num_positions, head_dim / 2) float32.
`interleaved` is True for the channel pairs of raw Mistral checkpoints, and False for the pairs of
Hugging Face checkpoints. `inverse` selects the inverse rotation.

    >>> q = torch.randn(batch, seqlen, heads, head_dim)
    >>> k, v = torch.randn(2, batch, seqlen, kv_heads, head_dim)
    >>> cos, sin = mistral_kernels.rotary_tables(seqlen, head_dim, theta=1e4)
    >>> positions = torch.arange(seqlen).expand(batch, seqlen)
    >>> q, k = ops.rotary(q, k, cos, sin, positions, interleaved=False, inverse=False)
    >>> q.shape, k.shape
    (torch.Size([2, 50, 4, 16]), torch.Size([2, 50, 2, 16]))

Attention. The window is a pair of inclusive distances to the left and to the right of a query; -1
means no bound. A causal window of W keys, including the query's own key, has `window_left` W - 1
and `window_right` 0. `softmax_scale` is head_dim^-0.5 if None. A softcap of 0.0 means no softcap. A
packed batch is (tokens, heads, head_dim) with `cu_seqlens`, as in flash-attn.

    >>> def attend(q, k, v, window):
    ...     out, _ = ops.attention_forward(
    ...         *(q, k, v),
    ...         cu_seqlens_q=None,
    ...         cu_seqlens_k=None,
    ...         max_seqlen_q=q.shape[1],
    ...         max_seqlen_k=k.shape[1],
    ...         softmax_scale=None,
    ...         window_left=window - 1,
    ...         window_right=0,
    ...         softcap=0.0,
    ...         alibi_slopes=None,
    ...         return_lse=False,
    ...     )
    ...     return out
    >>> attend(q, k, v, window=20).shape
    torch.Size([2, 50, 4, 16])

The three operators compose to the attention half of a decoder layer:

    >>> def attention_block(x, norm_weight, qkv_weight, o_weight, cos, sin, positions):
    ...     y, _, _ = ops.rms_norm_forward(x, norm_weight, None, 1e-5, False)
    ...     qkv = torch.nn.functional.linear(y, qkv_weight).unflatten(-1, (-1, head_dim))
    ...     q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=-2)  # views, not copies
    ...     q, k = ops.rotary(q, k, cos, sin, positions, False, False)
    ...     out = attend(q, k, v, window=20)
    ...     return x + torch.nn.functional.linear(out.flatten(-2), o_weight)
    >>> qkv_weight = torch.randn((heads + 2 * kv_heads) * head_dim, hidden) / 8
    >>> o_weight = torch.randn(hidden, heads * head_dim) / 8
    >>> inputs = x, weight, qkv_weight, o_weight, cos, sin, positions
    >>> attention_block(*inputs).shape
    torch.Size([2, 50, 64])
    >>> compiled = torch.compile(attention_block, fullgraph=True)
"""
