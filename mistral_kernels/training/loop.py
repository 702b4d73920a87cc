"""The training loop: batches of a text, and the optimisation."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_kernels.model.cache import Packing
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops import extension
from mistral_kernels.ops.cross_entropy import linear_cross_entropy
from mistral_kernels.tokenizer import MistralTokenizer
from mistral_kernels.training.state import Saving, check_like
from mistral_kernels.utils.ranges import COUNT, SEED, Range

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_REMEDY = "use a lower learning rate (--learning-rate)"
_LARGEST_BATCH = 1 << 28  # tokens; offsets into a packed batch are int32


def _setting(default: Any, allowed: Range | None = None, text: str = "") -> Any:
    return field(default=default, metadata={"range": allowed, "help": text})


@dataclass(frozen=True)
class Recipe:
    """Everything about the optimisation: AdamW, linear warm-up, cosine decay to a tenth.

    A step sees `accumulate` batches of `batch_size * seqlen` tokens, one after the other.

    Raises `ValueError` or `TypeError` naming the field that is out of range or no number.
    """

    steps: int = _setting(1400, COUNT)
    batch_size: int = _setting(16, COUNT, "sequences a batch, over all ranks")
    seqlen: int = _setting(256, COUNT)
    learning_rate: float = _setting(2e-3, Range(float, 0))
    warmup_steps: int = _setting(100, Range(int, 0, COUNT.high))
    weight_decay: float = _setting(0.5, Range(float, 0))
    max_grad_norm: float = _setting(1.0, Range(float, 0, above=True))
    eval_every: int = _setting(100, COUNT)
    seed: int = _setting(0, SEED)
    accumulate: int = _setting(1, COUNT, "batches a step, whose gradients are added up in float32")
    pack: bool = _setting(
        False,
        text="fill a batch's batch-size * seqlen tokens with whole paragraphs, each a sequence of "
        "its own (one longer than seqlen in stretches of seqlen), the last one cut",
    )
    checkpoint_activations: bool = _setting(
        False, text="keep each layer's input alone and compute the layer again going backwards"
    )
    dtype: str = _setting("bf16", text="of the weights, bf16 or fp32; their masters are float32")

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
        return self.accumulate * self.batch_size * self.seqlen

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


class Corpus:
    """A text's tokens, a line of it a paragraph, in sequences that begin, behind BOS, where a
    paragraph begins, as prompts do.

    `tokens` (n,) int64; `starts` (paragraphs,) where each paragraph begins in them.

    Raises `TokenizerError` for a `tokenizer_path` that is none, `ValueError` for one without BOS.
    """

    def __init__(self, text: str, tokenizer_path: Path) -> None:
        self.tokenizer = MistralTokenizer.from_pretrained(tokenizer_path)
        bos = self.tokenizer.bos_token_id
        if bos is None:
            raise ValueError(f"{self.tokenizer.path} has no BOS token for sequences to begin with")
        self.bos = bos
        self.tokens, self.starts = self._encode(text)

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        """The text's tokens, and where its paragraphs begin."""
        encode = self.tokenizer.encode
        paragraphs = [encode(line + "\n", bos=False, eos=False) for line in text.splitlines()]
        lengths = torch.tensor([len(paragraph) for paragraph in paragraphs], dtype=torch.int64)
        tokens = [token for paragraph in paragraphs for token in paragraph]
        return torch.tensor(tokens, dtype=torch.int64), lengths.cumsum(0) - lengths

    def encode(self, text: str) -> Tensor:
        """Tokens of another text, without BOS."""
        return self._encode(text)[0]

    def with_bos(self, targets: Tensor) -> Tensor:
        """Inputs for `targets` (..., seqlen): BOS, then all but the last."""
        bos = targets.new_full((*targets.shape[:-1], 1), self.bos)
        return torch.cat((bos, targets[..., :-1]), dim=-1)

    def sample(self, batch_size: int, seqlen: int, generator: torch.Generator) -> Tensor:
        """Targets (batch_size, seqlen)."""
        starts = self.starts[self.starts <= len(self.tokens) - seqlen]
        if not len(starts):
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, too few for seqlen {seqlen}; use a "
                "smaller one (--seqlen), or more text"
            )
        chosen = starts[torch.randint(len(starts), (batch_size,), generator=generator)]
        return self.tokens[chosen[:, None] + torch.arange(seqlen)]

    def batches(self, recipe: Recipe, generator: torch.Generator) -> Iterator[Sequence[Tensor]]:
        """Batches without end: the targets of each sequence, batch_size * seqlen tokens in all.

        Nothing is drawn from `generator` before it is asked for.
        """
        while not recipe.pack:
            yield list(self.sample(recipe.batch_size, recipe.seqlen, generator))
        paragraphs = self.tokens.tensor_split(self.starts[1:])
        whole = [part for paragraph in paragraphs for part in paragraph.split(recipe.seqlen)]
        whole = [part for part in whole if len(part)]  # a tokenizer may drop a line
        while True:
            batch, room = [], recipe.batch_size * recipe.seqlen
            while room:
                chosen = int(torch.randint(len(whole), (), generator=generator))
                batch.append(whole[chosen][:room])
                room -= len(batch[-1])
            yield batch


def packed_loss(model: MistralForCausalLM, corpus: Corpus, targets: Sequence[Tensor]) -> Tensor:
    """Mean loss, in nats a token, of sequences of any lengths, given by their targets (seqlen,)."""
    seqlens = [len(sequence) for sequence in targets]
    packing = Packing.of(seqlens, [0] * len(seqlens), model.device)
    inputs = torch.cat([corpus.with_bos(sequence) for sequence in targets]).to(model.device)
    hidden = model.model(inputs, packing)
    flat = torch.cat(list(targets)).to(model.device)
    return linear_cross_entropy(hidden, model.lm_head.weight, flat)


@torch.inference_mode()
def held_out_loss(model: MistralForCausalLM, corpus: Corpus, tokens: Tensor) -> float:
    """Mean loss, in nats a token, of `tokens` read as one sequence behind BOS."""
    return packed_loss(model, corpus, [tokens]).item()


class Run:
    """A model on its way. All that a later step depends on is in `state` between two steps.

    The model computes in its own dtype; AdamW works on float32 masters of its weights.
    """

    def __init__(self, model: MistralForCausalLM, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        model.model.checkpoint_activations = recipe.checkpoint_activations
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.weights: list[Tensor] = list(model.parameters())
        self.masters = self._masters()
        groups: list[dict[str, Any]] = [
            {
                "params": [m for m in self.masters if m.ndim > 1],
                "weight_decay": recipe.weight_decay,
            },
            {"params": [m for m in self.masters if m.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.step, self.running = 0, 0.0  # steps made; the sum of the losses since an evaluation
        self.curve: list[tuple[int, float, float]] = []
        self.best: dict[str, Tensor] = {}

    def _masters(self) -> list[Tensor]:
        return [weight.detach().float().clone() for weight in self.weights]

    @property
    def progress(self) -> dict[str, Any]:
        """What of the state is no weight's."""
        return {
            "step": self.step,
            "running": self.running,
            "curve": self.curve,
            "generator": self.generator.get_state(),
        }

    @property
    def state(self) -> dict[str, Any]:
        return {
            **self.progress,
            "best": self.best,
            "masters": self.masters,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, saving: Saving) -> bool:
        """Resume from the state that was saved, if there is one."""
        if (state := saving.load(self.state, self.check_state)) is None:
            return False
        self._set_progress(state)
        self.best = state["best"]
        # All else in the optimizer's state follows from the recipe.
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**own, "state": state["optimizer"]["state"]})
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
        self._update_weights()
        return True

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for a state that this run cannot have saved."""
        self._check_progress(state)
        weights = dict(self.model.state_dict()) if state["curve"] else {}
        check_like("best", state["best"], weights)
        check_like("masters", state["masters"], self.masters)
        if type(state["optimizer"]) is not dict:
            raise ValueError(f"optimizer must be dict, got {type(state['optimizer']).__name__}")
        averages = [
            {"step": torch.tensor(0.0), "exp_avg": master, "exp_avg_sq": master}
            for group in self.optimizer.param_groups
            for master in group["params"]
        ]
        check_like("optimizer", state["optimizer"]["state"], dict(enumerate(averages)))
        for each in state["optimizer"]["state"].values():
            if each["step"] != state["step"]:
                raise ValueError(f"optimizer is at step {each['step']:g}, not {state['step']}")

    def _check_progress(self, state: Mapping[str, Any]) -> None:
        recipe, step = self.recipe, state["step"]
        check_like("step", step, 0)
        Range(int, 1, recipe.steps).check("step", step)
        check_like("running", state["running"], 0.0)
        curve, last = state["curve"], step == recipe.steps and step % recipe.eval_every > 0
        points = step // recipe.eval_every + last
        if type(curve) is not list or len(curve) != points:
            raise ValueError(f"curve must be a list of {points} points")
        check_like("curve", curve, [(0, 0.0, 0.0)] * points)
        evaluated = [recipe.eval_every * (i + 1) for i in range(points - last)] + last * [step]
        if [point[0] for point in curve] != evaluated:
            raise ValueError("curve has points at other steps than those of the evaluations")
        torch.Generator().set_state(state["generator"])

    def _set_progress(self, state: Mapping[str, Any]) -> None:
        self.step, self.running, self.curve = state["step"], state["running"], state["curve"]
        self.generator.set_state(state["generator"])

    def advance(self, corpus: Corpus, batches: Iterator[Sequence[Tensor]]) -> float:
        """One step; its mean loss."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step)
        total = sum(self._backward(corpus, next(batches)) for _ in range(recipe.accumulate))
        if recipe.accumulate > 1:
            # All batches have as many tokens: the mean over them is the mean over all tokens.
            torch._foreach_div_(
                [m.grad for m in self.masters if m.grad is not None], recipe.accumulate
            )
        torch.nn.utils.clip_grad_norm_(self.masters, recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_weights()
        self.step += 1
        self.running += total / recipe.accumulate
        return total / recipe.accumulate

    def _backward(self, corpus: Corpus, batch: Sequence[Tensor]) -> float:
        """Add a batch's gradients to the masters'; its mean loss."""
        loss = packed_loss(self.model, corpus, batch)
        self._check_finite(loss)
        loss.backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            if weight.grad is not None:
                grad = weight.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
            weight.grad = None
        return loss.item()

    def _check_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.step}: {_REMEDY}")

    def _update_weights(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def held_out_loss(self, corpus: Corpus, tokens: Tensor) -> float:
        return held_out_loss(self.model, corpus, tokens)

    def finite_held_out_loss(self, corpus: Corpus, tokens: Tensor) -> float:
        """Return `held_out_loss`. Raises ValueError where it is not finite."""
        loss = self.held_out_loss(corpus, tokens)
        if not math.isfinite(loss):
            raise ValueError(f"the held-out loss is {loss} at step {self.step}: {_REMEDY}")
        return loss

    def evaluate(self, corpus: Corpus, held_out: Tensor) -> None:
        """Add a point to the curve; keep the weights if they are the best so far.

        Raises ValueError for a loss that is not finite.
        """
        since = self.step - (self.curve[-1][0] if self.curve else 0)
        loss = self.finite_held_out_loss(corpus, held_out)
        self.curve.append((self.step, self.running / since, loss))
        self.running = 0.0
        if loss == min(point[2] for point in self.curve):
            self._keep_best()

    def _keep_best(self) -> None:
        self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def take_best(self) -> None:
        """Give the model the weights of the lowest held-out loss."""
        self.model.load_state_dict(self.best)

    def write(self, directory: Path, extra_files: Iterable[Path]) -> None:
        """The model's checkpoint; see `MistralForCausalLM.save_pretrained`."""
        self.model.cpu().save_pretrained(directory, extra_files=extra_files)


def train(
    model: MistralForCausalLM,
    corpus: Corpus,
    held_out: Tensor,
    recipe: Recipe,
    log: TextIO | None = None,
    saving: Saving | None = None,
) -> list[tuple[int, float, float]]:
    """Optimise `model` in place; leaves it with the weights of the lowest held-out loss.

    With `saving`, goes on from the state that its file holds, if there is one. `log` (default:
    stderr) gets a line an evaluation, and where it is a terminal a progress bar.
    Returns (step, training loss, held-out loss) at every evaluation.

    Raises `ValueError` for a loss that is not finite, `CheckpointError` as `Saving` does. What has
    been saved is then a state whose loss was finite.
    """
    return finish(Run(model, recipe), corpus, held_out, log, saving)


def finish(
    run: Run, corpus: Corpus, held_out: Tensor, log: TextIO | None = None,
    saving: Saving | None = None,
) -> list[tuple[int, float, float]]:  # fmt: skip
    """`train`, for a run of any kind and the saving that goes with it."""
    log, recipe = log or sys.stderr, run.recipe
    if saving is not None and run.restore(saving):
        print(f"going on from step {run.step}, saved in {saving.path}", file=log, flush=True)
    batches = corpus.batches(recipe, run.generator)
    extension.load(run.model.device.type)  # which may compile: no part of a step's time
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
                if not evaluates:  # a state whose loss is not finite must not replace another
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
