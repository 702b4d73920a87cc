"""Perplexity of a text without and with quantized weights.

    python -m benchmarks.perplexity --quantize int8

The text, after BOS, passes through the rolling cache 32 tokens at a time. Products of so few rows
use the int8 kernel of decode steps.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels import MistralForCausalLM
from mistral_kernels.checkpoint import resolve
from mistral_kernels.cli.command import DTYPES
from mistral_kernels.training.corpus import Corpus
from mistral_kernels.training.on_texts import HELD_OUT

TOKENS = 32  # per pass


@torch.inference_mode()
def losses(model: MistralForCausalLM, corpus: Corpus) -> Tensor:
    """Return the loss of each token of the corpus, in nats."""
    cache = model.new_cache(1, len(corpus.tokens))
    inputs = corpus.with_bos(corpus.tokens)
    found = []
    for ids, targets in zip(inputs.split(TOKENS), corpus.tokens.split(TOKENS), strict=True):
        hidden = model.model(ids, cache.packing([len(ids)]), cache)
        found.append(F.cross_entropy(model.lm_head(hidden).double(), targets, reduction="none"))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="folder or hub id; default: bundled")
    parser.add_argument(
        "--text", type=Path, help="default: a text that the bundled model was not trained on"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quantize", choices=["int8"], default="int8")
    args = parser.parse_args()
    path = resolve(args.model)
    text = (args.text or resolve("tiny") / HELD_OUT).read_text(encoding="utf-8")
    corpus = Corpus(text, path)
    found = []
    for quantize in (None, args.quantize):
        model = MistralForCausalLM.from_pretrained(
            path, dtype=DTYPES[args.dtype], quantize=quantize
        )
        found.append(losses(model, corpus))
        nats = found[-1].mean().item()
        bits = nats * len(corpus.tokens) / len(text.encode()) / math.log(2)
        print(
            f"{quantize or args.dtype:8} {model.nbytes / 1e6:,.1f} MB  {nats:.4f} nats per token  "
            f"{bits:.4f} bits per byte  perplexity {math.exp(nats):.3f}"
        )
    change = found[1] - found[0]
    error = change.std().item() / math.sqrt(len(change))
    print(f"change   {change.mean():+.5f} nats per token, standard error {error:.5f}")


if __name__ == "__main__":
    main()
