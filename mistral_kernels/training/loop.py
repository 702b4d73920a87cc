"""Training loop: the optimization of a model, in one process or several."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_kernels.model.cache import Packing
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops import extension
from mistral_kernels.ops.cross_entropy import linear_cross_entropy
from mistral_kernels.training.corpus import Corpus
from mistral_kernels.training.metrics import MetricsWriter, StepMetrics
from mistral_kernels.training.recipe import DTYPES, Recipe
from mistral_kernels.training.state import Saving, check_structure
from mistral_kernels.utils.ranges import Range

_AVERAGES = ("exp_avg", "exp_avg_sq")  # AdamW's averages of gradients and of squared gradients
_REMEDY = "use a lower learning rate (--learning-rate)"


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

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to an L2 norm of `max_norm`; return their norm before."""

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

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to an L2 norm of `max_norm`; return their norm before."""
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm).item()

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

    def advance(self, corpus: Corpus, batches: Iterator[Sequence[Tensor]]) -> StepMetrics:
        """Make one step and return its measurements. Update no weight if the loss is not finite."""
        recipe, started = self.recipe, time.perf_counter()
        rate = recipe.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = [self.backend.backward(corpus, next(batches)) for _ in range(recipe.accumulate)]
        # All batches have the same number of tokens, so this is the mean over all tokens.
        loss, norm = sum(losses) / recipe.accumulate, math.nan
        if math.isfinite(loss):
            if recipe.accumulate > 1:
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                torch._foreach_div_(gradients, recipe.accumulate)
            norm = self.backend.clip_gradients(recipe.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.backend.update_weights()
        self.step += 1
        self.running += loss
        speed = recipe.tokens_per_step / (time.perf_counter() - started)
        return StepMetrics(self.step, loss, rate, norm, speed)

    def check_finite(self, name: str, loss: float) -> None:
        """Raise ValueError if a loss of the current step is not finite."""
        if not math.isfinite(loss):
            raise ValueError(f"the {name} is {loss} at step {self.step}: {_REMEDY}")

    def add_point(self, loss: float) -> None:
        """Add a held-out loss to the curve; store the weights if it is the lowest so far."""
        since = self.step - (self.curve[-1][0] if self.curve else 0)
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
    saving: Saving | None = None, writers: Sequence[MetricsWriter] = (),
) -> list[tuple[int, float, float]]:  # fmt: skip
    """Make all steps of the run, then set the model's weights to those of the lowest held-out loss.

    Args:
        run: the run.
        corpus: training text.
        held_out: (n,) int64, tokens for the evaluations.
        log: file for one line per evaluation, and for a progress bar if it is a terminal; None:
            stderr.
        saving: storage of the run's state; None: do not save.
        writers: destinations of the measurements of each step.

    Returns:
        (step, training loss, held-out loss) of each evaluation, losses in nats per token.

    Raises:
        ValueError: a loss is not finite. Its measurements are written, and the last saved state has
            a finite loss.
        CheckpointError: `saving` or a writer cannot write.
    """
    log, recipe = log or sys.stderr, run.recipe
    batches = corpus.batches(recipe, run.generator)
    # This may compile the C++ operators. Do it before the clock starts.
    extension.load(run.backend.model.device.type)
    first, started = run.step, time.perf_counter()
    with tqdm(
        total=recipe.steps, initial=first, unit="step", file=log, disable=not log.isatty()
    ) as bar:
        while run.step < recipe.steps:
            metrics = run.advance(corpus, batches)
            last = run.step == recipe.steps
            evaluates = last or run.step % recipe.eval_every == 0
            if evaluates and math.isfinite(metrics.loss):
                loss = run.backend.held_out_loss(corpus, held_out)
                metrics = replace(metrics, held_out_loss=loss)
            for writer in writers:
                writer.write(metrics)
            run.check_finite("loss", metrics.loss)
            if metrics.held_out_loss is not None:
                run.check_finite("held-out loss", metrics.held_out_loss)
                run.add_point(metrics.held_out_loss)
            if saving is not None and saving.every and (last or run.step % saving.every == 0):
                if not evaluates:  # never replace a state by one whose loss is not finite
                    loss = run.backend.held_out_loss(corpus, held_out[: recipe.seqlen])
                    run.check_finite("held-out loss", loss)
                saving.save(run.state)
            seconds = time.perf_counter() - started
            rate = f"{(run.step - first) * recipe.tokens_per_step / seconds:,.0f} tokens/s"
            bar.set_postfix_str(f"loss {metrics.loss:.4f}, {rate}", refresh=False)
            bar.update()
            if evaluates:
                with tqdm.external_write_mode(file=log):
                    _, mean, held_out_mean = run.curve[-1]
                    line = f"step {run.step:5d}  loss {mean:.4f}  held-out {held_out_mean:.4f}"
                    print(f"{line}  {rate}", file=log, flush=True)
    run.take_best()
    return run.curve
