"""Loss of a checkpoint on a text of any length, in bounded memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops.cross_entropy import linear_cross_entropy
from mistral_kernels.training.corpus import Corpus

_TOKENS = 2048  # maximum number per forward pass


@torch.inference_mode()
def text_loss(model: MistralForCausalLM, corpus: Corpus, seqlen: int) -> float:
    """Return the mean loss of a text, in nats per token.

    The text is cut into sequences of `seqlen` tokens, each after BOS. A token sees the tokens
    before it in its sequence, as far as the sliding window of each layer reaches. The rolling cache
    holds the keys and values, so that a forward pass has at most 2048 tokens. A terminal shows a
    progress bar after two seconds.

    Args:
        model: the model.
        corpus: the text.
        seqlen: largest number of tokens per sequence.
    """
    sequences = corpus.tokens.split(seqlen)
    rows = max(1, _TOKENS // seqlen)  # sequences per forward pass
    total = 0.0
    with tqdm(
        total=len(corpus.tokens), unit="token", unit_scale=True, delay=2, disable=None
    ) as progress:
        for first in range(0, len(sequences), rows):
            batch = sequences[first : first + rows]
            cache = model.new_cache(len(batch), len(batch[0]))
            # Either one sequence in pieces, or several sequences of one piece each.
            pieces = zip(*(targets.split(_TOKENS) for targets in batch), strict=True)
            inputs = zip(
                *(corpus.with_bos(targets).split(_TOKENS) for targets in batch), strict=True
            )
            for ids, targets in zip(inputs, pieces, strict=True):
                packing = cache.packing([len(piece) for piece in ids])
                hidden = model.model(torch.cat(ids).to(model.device), packing, cache)
                flat = torch.cat(targets).to(model.device)
                loss = linear_cross_entropy(hidden, model.lm_head.weight, flat, reduction="sum")
                total += loss.item()
                progress.update(len(flat))
    return total / len(corpus.tokens)


def bits_per_byte(loss: float, tokens: Tensor, text: str) -> float:
    """Convert the mean loss per token of a text, in nats, to bits per byte of its UTF-8 form."""
    return loss * len(tokens) / len(text.encode()) / math.log(2)


def perplexity(loss: float) -> float:
    """Return e^loss; infinity if it is too large for a float."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()
