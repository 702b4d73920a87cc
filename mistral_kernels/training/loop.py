"""Training loop: batches of a text, and the optimization."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_kernels.model.cache import Packing
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops import extension
from mistral_kernels.ops.cross_entropy import linear_cross_entropy
from mistral_kernels.tokenizer import MistralTokenizer
from mistral_kernels.training.state import Saving, check_structure
from mistral_kernels.utils.ranges import COUNT, SEED, Range

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_AVERAGES = ("exp_avg", "exp_avg_sq")  # AdamW's averages of gradients and of squared gradients
_REMEDY = "use a lower learning rate (--learning-rate)"
_LARGEST_BATCH = 1 << 28  # tokens; offsets into a packed batch are int32


def _setting(default: Any, allowed: Range | None = None, text: str = "") -> Any:
    return field(default=default, metadata={"range": allowed, "help": text})


@dataclass(frozen=True)
class Recipe:
    """Settings of the optimization: AdamW, linear warmup, cosine decay to 10 % of the peak.

    A step has `accumulate` batches of `batch_size * seqlen` tokens each.

    Raises `ValueError` if a field is out of range and `TypeError` if it is not a number; the
    message names the field.
    """

    steps: int = _setting(1400, COUNT)
    batch_size: int = _setting(16, COUNT, "sequences per batch, over all ranks")
    seqlen: int = _setting(256, COUNT)
    learning_rate: float = _setting(2e-3, Range(float, 0))
    warmup_steps: int = _setting(100, Range(int, 0, COUNT.high))
    weight_decay: float = _setting(0.5, Range(float, 0))
    max_grad_norm: float = _setting(1.0, Range(float, 0, above=True))
    eval_every: int = _setting(100, COUNT)
    seed: int = _setting(0, SEED)
    accumulate: int = _setting(1, COUNT, "batches per step; their gradients are summed in float32")
    pack: bool = _setting(
        False,
        text="fill each batch of batch-size * seqlen tokens with whole paragraphs, each as one "
        "sequence; longer paragraphs are split every seqlen tokens, and the last one is truncated",
    )
    checkpoint_activations: bool = _setting(
        False, text="store only each layer's input and recompute the layer in the backward pass"
    )
    dtype: str = _setting("bf16", text="dtype of the weights, bf16 or fp32; master copies in fp32")

    def __post_init__(self) -> None:
        for each in fields(self):
            if (allowed := each.metadata["range"]) is not None:
                value = allowed.check(each.name, getattr(self, each.name))
                object.__setattr__(self, each.name, value)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch_size * self.seqlen > _LARGEST_BATCH:
            raise ValueError(
                f"batch_size * seqlen must be at most {_LARGEST_BATCH} tokens, got "
                f"{self.batch_size} * {self.seqlen}; accumulate more and smaller batches"
            )

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens per optimizer step."""
        return self.accumulate * self.batch_size * self.seqlen

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


class Corpus:
    """Tokens of a text with one paragraph per line.

    Each training sequence is BOS followed by tokens from the beginning of a paragraph, like a
    prompt.

    Attributes:
        tokens: (n,) int64, tokens of the text without BOS.
        starts: (paragraphs,) int64, index of each paragraph's first token in `tokens`.

    Raises `TokenizerError` for an invalid `tokenizer_path`, and `ValueError` for a tokenizer
    without BOS.
    """

    def __init__(self, text: str, tokenizer_path: Path) -> None:
        self.tokenizer = MistralTokenizer.from_pretrained(tokenizer_path)
        bos = self.tokenizer.bos_token_id
        if bos is None:
            raise ValueError(
                "the tokenizer must have a BOS token, which begins every sequence, got none in "
                f"{self.tokenizer.path}"
            )
        self.bos = bos
        self.tokens, self.starts = self._encode(text)

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Return the tokens of a text, and the index of each paragraph's first token."""
        encode = self.tokenizer.encode
        paragraphs = [encode(line + "\n", bos=False, eos=False) for line in text.splitlines()]
        lengths = torch.tensor([len(paragraph) for paragraph in paragraphs], dtype=torch.int64)
        tokens = [token for paragraph in paragraphs for token in paragraph]
        return torch.tensor(tokens, dtype=torch.int64), lengths.cumsum(0) - lengths

    def encode(self, text: str) -> Tensor:
        """Return the tokens of another text, without BOS."""
        return self._encode(text)[0]

    def with_bos(self, targets: Tensor) -> Tensor:
        """Return the inputs for `targets`, (..., seqlen): BOS, then all targets except the last."""
        bos = targets.new_full((*targets.shape[:-1], 1), self.bos)
        return torch.cat((bos, targets[..., :-1]), dim=-1)

    def sample(self, batch_size: int, seqlen: int, generator: torch.Generator) -> Tensor:
        """Return random targets, (batch_size, seqlen), each from the beginning of a paragraph."""
        starts = self.starts[self.starts <= len(self.tokens) - seqlen]
        if not len(starts):
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, too few for seqlen {seqlen}; use a "
                "smaller one (--seqlen), or more text"
            )
        chosen = starts[torch.randint(len(starts), (batch_size,), generator=generator)]
        return self.tokens[chosen[:, None] + torch.arange(seqlen)]

    def batches(self, recipe: Recipe, generator: torch.Generator) -> Iterator[Sequence[Tensor]]:
        """Yield batches endlessly: the targets of each sequence, batch_size * seqlen tokens in all.

        `generator` is used only when a batch is requested.
        """
        while not recipe.pack:
            yield list(self.sample(recipe.batch_size, recipe.seqlen, generator))
        paragraphs = self.tokens.tensor_split(self.starts[1:])
        whole = [part for paragraph in paragraphs for part in paragraph.split(recipe.seqlen)]
        whole = [part for part in whole if len(part)]  # a tokenizer may drop a whole line
        while True:
            batch, room = [], recipe.batch_size * recipe.seqlen
            while room:
                chosen = int(torch.randint(len(whole), (), generator=generator))
                batch.append(whole[chosen][:room])
                room -= len(batch[-1])
            yield batch


def packed_loss(model: MistralForCausalLM, corpus: Corpus, targets: Sequence[Tensor]) -> Tensor:
    """Return the mean loss, in nats per token, of sequences with these targets, (seqlen,) each."""
    seqlens = [len(sequence) for sequence in targets]
    packing = Packing.of(seqlens, [0] * len(seqlens), model.device)
    inputs = torch.cat([corpus.with_bos(sequence) for sequence in targets]).to(model.device)
    hidden = model.model(inputs, packing)
    flat = torch.cat(list(targets)).to(model.device)
    return linear_cross_entropy(hidden, model.lm_head.weight, flat)


@torch.inference_mode()
def held_out_loss(model: MistralForCausalLM, corpus: Corpus, tokens: Tensor) -> float:
    """Return the mean loss, in nats per token, of `tokens` as one sequence after BOS."""
    return packed_loss(model, corpus, [tokens]).item()


class Backend(Protocol):
    """Interface to the process or processes of a run: `SingleProcess` or `fsdp.Sharded`.

    Attributes:
        model: the model.
        parameters: float32 tensors that AdamW updates, by the names of the model's parameters.
    """

    model: MistralForCausalLM
    parameters: dict[str, Tensor]

    def backward(self, corpus: Corpus, batch: Sequence[Tensor]) -> float:
        """Add the gradients of the batch's mean loss to those of `parameters`; return the loss."""

    def update_weights(self) -> None:
        """Set the weights of the model to `parameters`, rounded to the dtype of the weights."""

    def held_out_loss(self, corpus: Corpus, tokens: Tensor) -> float:
        """Return the mean loss per token of `tokens` as one sequence."""

    def write(self, directory: Path, extra_files: Iterable[Path]) -> None:
        """Write the checkpoint of the model; see `MistralForCausalLM.save_pretrained`."""


class SingleProcess:
    """Backend for one process. `parameters` are float32 master copies of the model's weights."""

    def __init__(self, model: MistralForCausalLM) -> None:
        self.model = model
        self.weights: list[Tensor] = list(model.parameters())
        self.parameters = {
            name: weight.detach().float().clone() for name, weight in model.named_parameters()
        }

    def backward(self, corpus: Corpus, batch: Sequence[Tensor]) -> float:
        """Add the gradients of the batch's mean loss to those of `parameters`; return the loss."""
        loss = packed_loss(self.model, corpus, batch)
        loss.backward()
        for master, weight in zip(self.parameters.values(), self.weights, strict=True):
            if weight.grad is not None:
                grad = weight.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
            weight.grad = None
        return loss.item()

    def update_weights(self) -> None:
        """Set the weights of the model to `parameters`, rounded to the dtype of the weights."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, list(self.parameters.values()))

    def held_out_loss(self, corpus: Corpus, tokens: Tensor) -> float:
        """Return the mean loss per token of `tokens` as one sequence."""
        return held_out_loss(self.model, corpus, tokens)

    def write(self, directory: Path, extra_files: Iterable[Path]) -> None:
        """Write the checkpoint of the model; see `MistralForCausalLM.save_pretrained`."""
        self.model.cpu().save_pretrained(directory, extra_files=extra_files)


class Run:
    """Training state: parameters, AdamW, best weights, RNG. `state` is complete between steps."""

    def __init__(self, backend: Backend, recipe: Recipe) -> None:
        self.backend, self.recipe = backend, recipe
        backend.model.model.checkpoint_activations = recipe.checkpoint_activations
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.parameters = list(backend.parameters.values())
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in self.parameters if p.ndim > 1],
                "weight_decay": recipe.weight_decay,
            },
            {"params": [p for p in self.parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        # AdamW creates these tensors in the first step, but `restore` needs them before that.
        for parameter in self.parameters:
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{average: torch.zeros_like(parameter) for average in _AVERAGES},
            }
        self.step = 0  # number of completed steps
        self.running = 0.0  # sum of the losses since the last evaluation
        self.curve: list[tuple[int, float, float]] = []  # step, training loss, held-out loss
        self._keep_best()

    @property
    def state(self) -> dict[str, Any]:
        """All values that later steps depend on. The tensors are those of the run, not copies."""
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.backend.parameters.items():
            tensors[f"master.{name}"] = parameter.detach()
            for average in _AVERAGES:
                tensors[f"{average}.{name}"] = self.optimizer.state[parameter][average]
        return {
            "step": self.step,
            "running": self.running,
            "curve": self.curve,
            "generator": self.generator.get_state(),
            "tensors": tensors,
        }

    def restore(self, saving: Saving) -> bool:
        """Resume from the saved state; return False if there is none."""
        if (state := saving.load(self.state, self._check)) is None:
            return False
        self.step, self.running, self.curve = state["step"], state["running"], state["curve"]
        self.generator.set_state(state["generator"])
        for parameter in self.parameters:
            self.optimizer.state[parameter]["step"].fill_(self.step)
        self.backend.update_weights()
        return True

    def _check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for a state that this run cannot have saved."""
        recipe, step = self.recipe, state["step"]
        check_structure("step", step, 0)
        Range(int, 1, recipe.steps).check("step", step)
        check_structure("running", state["running"], 0.0)
        curve, last = state["curve"], step == recipe.steps and step % recipe.eval_every > 0
        points = step // recipe.eval_every + last
        if type(curve) is not list or len(curve) != points:
            got = f"{len(curve)} points" if type(curve) is list else type(curve).__name__
            raise ValueError(f"curve must be a list of {points} points, got {got}")
        check_structure("curve", curve, [(0, 0.0, 0.0)] * points)
        evaluated = [recipe.eval_every * (i + 1) for i in range(points - last)] + last * [step]
        if [point[0] for point in curve] != evaluated:
            steps = [point[0] for point in curve]
            raise ValueError(f"curve must have points at steps {evaluated}, got {steps}")
        torch.Generator().set_state(state["generator"])

    def advance(self, corpus: Corpus, batches: Iterator[Sequence[Tensor]]) -> float:
        """Make one step and return its mean loss. Raises ValueError if the loss is not finite."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step)
        losses = [self.backend.backward(corpus, next(batches)) for _ in range(recipe.accumulate)]
        # All batches have the same number of tokens, so this is the mean over all tokens.
        loss = sum(losses) / recipe.accumulate
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step}: {_REMEDY}")
        if recipe.accumulate > 1:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_div_(gradients, recipe.accumulate)
        torch.nn.utils.clip_grad_norm_(self.parameters, recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.backend.update_weights()
        self.step += 1
        self.running += loss
        return loss

    def finite_held_out_loss(self, corpus: Corpus, tokens: Tensor) -> float:
        """Return the backend's `held_out_loss`. Raises ValueError if it is not finite."""
        loss = self.backend.held_out_loss(corpus, tokens)
        if not math.isfinite(loss):
            raise ValueError(f"the held-out loss is {loss} at step {self.step}: {_REMEDY}")
        return loss

    def evaluate(self, corpus: Corpus, held_out: Tensor) -> None:
        """Add a point to the curve; store the weights if their held-out loss is the lowest so far.

        Raises ValueError if the loss is not finite.
        """
        since = self.step - (self.curve[-1][0] if self.curve else 0)
        loss = self.finite_held_out_loss(corpus, held_out)
        self.curve.append((self.step, self.running / since, loss))
        self.running = 0.0
        if loss == min(point[2] for point in self.curve):
            self._keep_best()

    def _keep_best(self) -> None:
        dtype = DTYPES[self.recipe.dtype]
        self.best = {
            name: parameter.detach().to(dtype, copy=True)
            for name, parameter in self.backend.parameters.items()
        }

    @torch.no_grad()
    def take_best(self) -> None:
        """Set the model's weights to those of the lowest held-out loss."""
        for name, parameter in self.backend.parameters.items():
            parameter.copy_(self.best[name])
        self.backend.update_weights()


def train(
    run: Run, corpus: Corpus, held_out: Tensor, log: TextIO | None = None,
    saving: Saving | None = None,
) -> list[tuple[int, float, float]]:  # fmt: skip
    """Make all steps of the run, then set the model's weights to those of the lowest held-out loss.

    Args:
        run: the run.
        corpus: training text.
        held_out: (n,) int64, tokens for the evaluations.
        log: file for one line per evaluation, and for a progress bar if it is a terminal; None:
            stderr.
        saving: storage of the run's state. If it holds a state, the run resumes from it.

    Returns:
        (step, training loss, held-out loss) of each evaluation, losses in nats per token.

    Raises:
        ValueError: a loss is not finite. The last saved state has a finite loss.
        CheckpointError: `saving` cannot load or save the state.
    """
    log, recipe = log or sys.stderr, run.recipe
    if saving is not None and run.restore(saving):
        print(f"resuming from step {run.step}, saved in {saving.path}", file=log, flush=True)
    batches = corpus.batches(recipe, run.generator)
    # This may compile the C++ operators. Do it before the clock starts.
    extension.load(run.backend.model.device.type)
    first, started = run.step, time.perf_counter()
    with tqdm(
        total=recipe.steps, initial=first, unit="step", file=log, disable=not log.isatty()
    ) as bar:
        while run.step < recipe.steps:
            loss = run.advance(corpus, batches)
            last = run.step == recipe.steps
            evaluates = last or run.step % recipe.eval_every == 0
            if evaluates:
                run.evaluate(corpus, held_out)
            if saving is not None and saving.every and (last or run.step % saving.every == 0):
                if not evaluates:  # never replace a state by one whose loss is not finite
                    run.finite_held_out_loss(corpus, held_out[: recipe.seqlen])
                saving.save(run.state)
            seconds = time.perf_counter() - started
            rate = f"{(run.step - first) * recipe.tokens_per_step / seconds:,.0f} tokens/s"
            bar.set_postfix_str(f"loss {loss:.4f}, {rate}", refresh=False)
            bar.update()
            if evaluates:
                with tqdm.external_write_mode(file=log):
                    _, mean, held_out_mean = run.curve[-1]
                    line = f"step {run.step:5d}  loss {mean:.4f}  held-out {held_out_mean:.4f}"
                    print(f"{line}  {rate}", file=log, flush=True)
    run.take_best()
    return run.curve
