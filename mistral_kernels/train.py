"""`python -m mistral_kernels.train`: pretrain a small Mistral on plain text.

The defaults are the recipe of the bundled model: a 2.75 M-parameter decoder with grouped-query
attention and a sliding window of 128 tokens, and a byte-fallback BPE vocabulary of 2048 pieces
trained on the same text.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from mistral_kernels.checkpoint.writing import check_target
from mistral_kernels.command import Parser, run
from mistral_kernels.model.cache import Packing
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops.cross_entropy import linear_cross_entropy

TINY = MistralConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=128,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
HELD_OUT = "held_out.txt"


@dataclass(frozen=True)
class Recipe:
    """Everything about the optimisation: AdamW, linear warm-up, cosine decay to a tenth."""

    steps: int = 1400
    batch_size: int = 16
    seqlen: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.5
    max_grad_norm: float = 1.0
    eval_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seqlen", "eval_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def read_text(paths: Sequence[Path]) -> str:
    """The files' text, hard-wrapped lines joined: a blank line ends a paragraph, one line each."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
    text = "\n\n".join(texts)
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def split_held_out(text: str, size: int) -> tuple[str, str]:
    """(training, held out): whole paragraphs of about `size` characters from the end."""
    if size <= 0 or size >= len(text) // 2:
        raise ValueError(f"held-out size must be in (0, {len(text) // 2}), got {size}")
    cut = text.index("\n", len(text) - size) + 1
    if cut == len(text):
        raise ValueError(
            f"the last {size} characters of the text lie in one paragraph; hold out more of it, "
            "or separate its paragraphs by blank lines"
        )
    return text[:cut], text[cut:]


def train_tokenizer(text: str, vocab_size: int, path: Path) -> None:
    """Train a byte-fallback BPE model with Mistral's special tokens and write it to `path`."""
    import sentencepiece

    model = io.BytesIO()  # a path would be recorded in it
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"the text is too short to train a vocabulary of {vocab_size} on: {error}"
        ) from None
    path.write_bytes(model.getvalue())


class Corpus:
    """Token windows that begin, behind BOS, where a paragraph begins, as prompts do."""

    def __init__(self, text: str, tokenizer_path: Path) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
        self.tokens, self.starts = self._encode(text)

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        """The text's tokens, and where its paragraphs begin."""
        newline = self.processor.piece_to_id("<0x0A>")
        paragraphs = [[*line, newline] for line in self.processor.encode(text.splitlines())]
        lengths = torch.tensor([len(paragraph) for paragraph in paragraphs])
        tokens = torch.tensor([token for paragraph in paragraphs for token in paragraph])
        return tokens, lengths.cumsum(0) - lengths

    def encode(self, text: str) -> Tensor:
        """Tokens of another text, without BOS."""
        return self._encode(text)[0]

    def with_bos(self, targets: Tensor) -> Tensor:
        """Inputs for `targets` (..., seqlen): BOS, then all but the last."""
        bos = targets.new_full((*targets.shape[:-1], 1), self.processor.bos_id())
        return torch.cat((bos, targets[..., :-1]), dim=-1)

    def sample(self, batch_size: int, seqlen: int, generator: torch.Generator) -> Tensor:
        """Targets (batch_size, seqlen)."""
        starts = self.starts[self.starts <= len(self.tokens) - seqlen]
        if not len(starts):
            raise ValueError(f"the text has {len(self.tokens)} tokens, too few for seqlen {seqlen}")
        chosen = starts[torch.randint(len(starts), (batch_size,), generator=generator)]
        return self.tokens[chosen[:, None] + torch.arange(seqlen)]


def packed_loss(model: MistralForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss, in nats a token, of inputs and targets (batch, seqlen)."""
    batch, seqlen = inputs.shape
    packing = Packing.of([seqlen] * batch, [0] * batch, model.device)
    hidden = model.model(inputs.flatten().to(model.device), packing)
    return linear_cross_entropy(hidden, model.lm_head.weight, targets.flatten().to(model.device))


@torch.inference_mode()
def held_out_loss(model: MistralForCausalLM, corpus: Corpus, tokens: Tensor) -> float:
    """Mean loss, in nats a token, of `tokens` read as one sequence behind BOS."""
    return packed_loss(model, corpus.with_bos(tokens)[None], tokens[None]).item()


def train(
    model: MistralForCausalLM,
    corpus: Corpus,
    held_out: Tensor,
    recipe: Recipe,
    log: TextIO | None = None,
) -> list[tuple[int, float, float]]:
    """Optimise `model` in place; leaves it with the weights of the lowest held-out loss.

    The model computes in its own dtype; AdamW works on float32 masters of its weights.
    Returns (step, training loss, held-out loss) at every evaluation.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    weights: list[Tensor] = list(model.parameters())
    masters = [weight.detach().float().clone() for weight in weights]
    groups = [
        {"params": [m for m in masters if m.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [m for m in masters if m.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    curve: list[tuple[int, float, float]] = []
    best: dict[str, Tensor] = {}
    started, running = time.perf_counter(), 0.0
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        targets = corpus.sample(recipe.batch_size, recipe.seqlen, generator)
        loss = packed_loss(model, corpus.with_bos(targets), targets)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {step}: lower --learning-rate")
        loss.backward()
        for master, weight in zip(masters, weights):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, recipe.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        running += loss.item()
        if (step + 1) % recipe.eval_every and step + 1 != recipe.steps:
            continue
        since = step + 1 - (curve[-1][0] if curve else 0)
        curve.append((step + 1, running / since, held_out_loss(model, corpus, held_out)))
        running = 0.0
        if curve[-1][2] == min(point[2] for point in curve):
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rate = (step + 1) * recipe.batch_size * recipe.seqlen / (time.perf_counter() - started)
        print(
            f"step {step + 1:5d}  loss {curve[-1][1]:.4f}  held-out {curve[-1][2]:.4f}  "
            f"{rate:,.0f} tokens/s",
            file=log or sys.stderr,
            flush=True,
        )
    model.load_state_dict(best)
    return curve


def train_on_texts(
    texts: Sequence[Path], output: Path, held_out_chars: int, recipe: Recipe
) -> None:
    """Train a tokenizer and a model on `texts`; `output` appears when all of it is there.

    Beside the checkpoint, in Hugging Face's format, stand the held-out text and `training.json`:
    the recipe, the loss curve and the final held-out loss.
    """
    check_target(output)
    training, held_out = split_held_out(read_text(texts), held_out_chars)
    torch.manual_seed(recipe.seed)
    model = MistralForCausalLM(TINY).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in ("tokenizer.model", HELD_OUT, "training.json")]
        train_tokenizer(training, TINY.vocab_size, files[0])
        files[1].write_text(held_out, encoding="utf-8")
        corpus = Corpus(training, files[0])
        tokens = corpus.encode(held_out)
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{parameters:,} parameters, {len(corpus.tokens):,} tokens to train on, "
            f"{len(tokens):,} held out",
            file=sys.stderr,
        )
        curve = train(model, corpus, tokens, recipe)
        loss = held_out_loss(model, corpus, tokens)
        report = {
            "texts": [path.name for path in texts],
            "recipe": asdict(recipe),
            "parameters": parameters,
            "training_tokens": len(corpus.tokens),
            "held_out_loss": loss,
            "held_out_bits_per_byte": loss * len(tokens) / len(held_out.encode()) / math.log(2),
            "curve": [dict(zip(("step", "loss", "held_out_loss"), point)) for point in curve],
        }
        files[2].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        model.save_pretrained(output, extra_files=files)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m mistral_kernels.train",
        description="Pretrain a small Mistral on plain text; the defaults made the bundled model.",
    )
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8, blank lines between paragraphs")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--held-out-chars", type=int, default=32_000, help="kept from the end for evaluation"
    )
    for option in fields(Recipe):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=type(option.default),
            default=option.default,
            help=f"default {option.default}",
        )
    return run(_train, parser.parse_args(argv))


def _train(args: argparse.Namespace) -> None:
    recipe = Recipe(**{option.name: getattr(args, option.name) for option in fields(Recipe)})
    train_on_texts(args.text, args.output, args.held_out_chars, recipe)


if __name__ == "__main__":
    sys.exit(main())
